# SPDX-License-Identifier: Apache-2.0
"""Tiny models and prompts for them: what the engine is compared with transformers on.

The recall model of the examples is one. The others have random weights.

Those are drawn wide enough that a greedy continuation wanders through the vocabulary and depends on every
token of its prompt; with the usual width it would repeat one token, and any two engines would agree.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import recall
import torch
import transformers
from engine.greedy import greedy_after

VOCAB_SIZE = 512
NUM_NEW_TOKENS = 64
PROMPT_LENGTHS = (9, 16, 33, 64, 100, 129, 200, 257)
"""Around the ends of blocks of 16, 32 and 128 tokens, and beyond a batch of 96."""

RECALL = "recall"
RECALL_FOLDER = Path(recall.__file__).parent
QUESTIONS = [recall.make_question(seed, n, NUM_NEW_TOKENS) for seed, n in enumerate(PROMPT_LENGTHS)]
_WORDS = recall.vocabulary()


@dataclass(frozen=True)
class Tiny:
    """One model; `config` names a configuration class of transformers, `sizes` fill it."""

    config: str
    block_size: int | None
    """Tokens per KV block in the engine; None is the engine's choice."""
    sizes: dict[str, Any]
    window: int | None = None
    """Tokens that any layer's last token sees, where no layer sees all of them."""
    cache_bytes: int = 32 << 20
    """Memory for the engine's KV blocks."""

    auto: str = "AutoModelForCausalLM"
    """The class of transformers that builds the model from its configuration and reads it again."""
    embedding_factor: float = 1.0
    """Less than 1 where embeddings are tied and scaled up: a token's own would outweigh all else."""
    last_norm_offset: float = 0.0
    """Added to the weights of the last norm: makes up for small embeddings, or logits would hardly differ."""

    def save(self, folder: Path) -> None:
        """Write the checkpoint: float32, the same weights every time."""
        torch.manual_seed(20)
        usual = {
            "vocab_size": VOCAB_SIZE,
            "max_position_embeddings": 512,
            "num_hidden_layers": 3,
            "initializer_range": 0.25,
            "bos_token_id": None,
            "eos_token_id": None,
            "pad_token_id": None,
        }
        config = getattr(transformers, self.config)(**usual | self.sizes)
        model = getattr(transformers, self.auto).from_config(config, dtype=torch.float32)
        with torch.no_grad():
            # Biases start as zeros and norms as ones, which would hide an engine that leaves them out. The
            # biases of routers are buffers, so all that a checkpoint holds is gone through.
            for tensor in model.state_dict().values():
                if tensor.dim() == 1:
                    tensor.add_(torch.randn_like(tensor), alpha=0.25)
            model.get_input_embeddings().weight.mul_(self.embedding_factor)
            if self.last_norm_offset:
                model.get_decoder().norm.weight.add_(self.last_norm_offset)
        model.save_pretrained(folder)


RANDOM_MODELS = {
    "llama": Tiny(
        "LlamaConfig",
        None,
        {
            "hidden_size": 128,
            "intermediate_size": 256,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 10000.0,
                "factor": 4.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 128,
            },
        },
    ),
    "qwen2": Tiny(
        "Qwen2Config",
        16,
        {
            "hidden_size": 128,
            "intermediate_size": 192,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "tie_word_embeddings": True,
        },
    ),
    "qwen3": Tiny(
        "Qwen3Config",
        32,
        {
            "hidden_size": 96,
            "intermediate_size": 256,
            "num_attention_heads": 6,
            "num_key_value_heads": 6,
            "head_dim": 32,
        },
    ),
    "mistral": Tiny(
        "MistralConfig",
        16,
        {
            "hidden_size": 128,
            "intermediate_size": 192,
            "num_attention_heads": 8,
            "num_key_value_heads": 2,
            "sliding_window": 40,
        },
        window=40,
        # 64 blocks for prompts and answers of 1320 tokens: those left of the window are used again.
        cache_bytes=64 * 3 * 16 * 2 * 2 * 16 * 4,
    ),
    # A group of layers that see everything and two that do not, in the same memory.
    "gemma3": Tiny(
        "Gemma3TextConfig",
        16,
        {
            "hidden_size": 96,
            "intermediate_size": 192,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 32,
            "query_pre_attn_scalar": 32,
            "sliding_window": 24,
            # Tied, a token's own embedding would outweigh everything, and the model would repeat it.
            "tie_word_embeddings": False,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
}

MODELS = (*RANDOM_MODELS, RECALL)
FULL_ATTENTION_MODELS = ("llama", "qwen2", "qwen3")

RUNS = [(size, name) for size in (1, 2) for name in MODELS if (size, name) != (2, "mistral")]
"""Tensor-parallel sizes and models on which engines are run; gemma3 stands for all windows with two ranks."""


HEAD_MAJOR_RUNS = {"llama": 1, "gemma3": 1, "qwen2": 2}
"""Models that also run on head-major pages, with the tensor-parallel size: qwen2 has one head per rank."""


def prompts_of(name: str) -> list[list[int]]:
    """One prompt of every length in PROMPT_LENGTHS, as token ids."""
    if name == RECALL:
        return [[_WORDS.index(word) for word in question.prompt.split()] for question in QUESTIONS]
    return random_prompts(PROMPT_LENGTHS)


def random_prompts(lengths: Sequence[int]) -> list[list[int]]:
    """The same for every model with VOCAB_SIZE tokens."""
    draw = random.Random(1)
    return [[draw.randrange(VOCAB_SIZE) for _ in range(length)] for length in lengths]


def block_size_of(name: str) -> int | None:
    """Tokens per KV block that the engine is asked for; None leaves it to the engine."""
    return None if name == RECALL else RANDOM_MODELS[name].block_size


def cache_bytes_of(name: str) -> int:
    """Memory for KV blocks that the engine is given."""
    return Tiny.cache_bytes if name == RECALL else RANDOM_MODELS[name].cache_bytes


def farthest_token_that_matters(name: str, num_prompt_tokens: int) -> int:
    """The first token of a prompt that some layer's attention sees from the prompt's last token."""
    window = RANDOM_MODELS[name].window
    return 0 if window is None else max(0, num_prompt_tokens - window)


def text_of(tokens: list[int]) -> str:
    """What the recall model says with these tokens."""
    return " ".join(_WORDS[token] for token in tokens)


def greedy_tokens(folder: Path, prompts: list[list[int]]) -> list[list[int]]:
    """What transformers generates in float32 on the CPU, NUM_NEW_TOKENS for each prompt."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return [greedy_after(model, NUM_NEW_TOKENS, prompt).tokens for prompt in prompts]


def log_probabilities(
    folder: Path, prompts: list[list[int]], outputs: list[list[int]], dtype: torch.dtype
) -> torch.Tensor:
    """What transformers gives every output token after what precedes it: [prompts, NUM_NEW_TOKENS], float32.

    Weights are rounded to bfloat16; `dtype` is that of the arithmetic.
    """
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).to(dtype).eval()
    results = []
    for prompt, output in zip(prompts, outputs, strict=True):
        with torch.inference_mode():
            logits = model(torch.tensor([prompt + output])).logits[0, len(prompt) - 1 : -1]
        chosen = logits.float().log_softmax(-1).gather(1, torch.tensor(output)[:, None])
        results.append(chosen[:, 0])
    return torch.stack(results)
