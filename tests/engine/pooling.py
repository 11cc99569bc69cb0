# SPDX-License-Identifier: Apache-2.0
"""One tiny random model for each architecture that embeds, classifies or reranks, compared with transformers.

The second table of `docs/models.md` is written from here, by `describe_models`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from engine.models import VOCAB_SIZE, Tiny, random_prompts
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit

PROMPT_LENGTHS = (5, 16, 17, 33, 48, 64, 97, 130)
"""Beyond every window, and beyond a batch of 96 where a prompt can be computed in chunks."""
COSINE_DISTANCE_TOLERANCE = 1e-4
SCORE_TOLERANCE = 1e-3

Task = Literal["embed", "classify", "token_classify"]
"""What vLLM calls a vector for a prompt, scores for a prompt, and scores for each token."""

_ENCODER = {"hidden_size": 96, "intermediate_size": 160, "num_attention_heads": 4}
_DECODER = {"hidden_size": 128, "intermediate_size": 192, "num_attention_heads": 4, "num_key_value_heads": 2}
_WINDOWED = _ENCODER | {
    "local_attention": 32,
    "layer_types": ["full_attention", "sliding_attention", "sliding_attention"],
    "cls_token_id": None,
    "sep_token_id": None,
}
_NO, _YES = 7, 11


@dataclass(frozen=True)
class PoolingFamily:
    """An architecture, and what it has that not every one has."""

    tiny: Tiny
    task: Task
    shows: str
    """For the table in docs/models.md."""
    pooling: Literal["CLS", "MEAN", "LAST"] | None = None
    """Which hidden states make an embedding: the first token's, all, the last's."""
    causal: bool = False
    """Then a prompt may be computed in chunks."""
    options: dict[str, Any] = field(default_factory=dict)
    """For vLLM, beside the usual ones."""
    pairs: bool = False
    """Prompts are two texts, which the model is told apart."""
    spread: tuple[str, ...] = ()
    """Ways over two NPUs that are compared too; keys of families.SPREADS."""


def _embeds(config: str, sizes: dict[str, Any], shows: str, pooling: str, **more: Any) -> PoolingFamily:
    return PoolingFamily(Tiny(config, None, sizes, auto="AutoModel"), "embed", shows, pooling, **more)


def _classifies(config: str, sizes: dict[str, Any], shows: str, **more: Any) -> PoolingFamily:
    tiny = Tiny(config, None, sizes, auto="AutoModelForSequenceClassification")
    return PoolingFamily(tiny, "classify", shows, **more)


POOLING_FAMILIES = {
    "BertModel": _embeds(
        "BertConfig", _ENCODER, "the first token's state, heads of 24 elements", "CLS", spread=("TP 2",)
    ),
    "XLMRobertaModel": _embeds(
        "XLMRobertaConfig",
        _ENCODER | {"pad_token_id": 1, "position_embedding_type": "absolute"},
        "the mean, positions from 2 on",
        "MEAN",
    ),
    "ModernBertModel": _embeds(
        "ModernBertConfig",
        _WINDOWED,
        "windows to both sides beside full attention, rotary",
        "MEAN",
    ),
    "Gemma3TextModel": _embeds(
        "Gemma3TextConfig",
        _DECODER
        | {
            "head_dim": 32,
            "query_pre_attn_scalar": 32,
            "sliding_window": 24,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "use_bidirectional_attention": True,
        },
        "EmbeddingGemma's way: a decoder's layers and grouped heads, both directions, windows",
        "MEAN",
    ),
    "Qwen3ForCausalLM": PoolingFamily(
        Tiny("Qwen3Config", None, _DECODER | {"head_dim": 32}),
        "embed",
        "Qwen3-Embedding's way: the last token's state, prompts in chunks",
        "LAST",
        causal=True,
        options={"runner": "pooling", "convert": "embed"},
    ),
    "BertForSequenceClassification": _classifies(
        "BertConfig", _ENCODER | {"num_labels": 1}, "a cross-encoder's score of two texts", pairs=True
    ),
    "RobertaForSequenceClassification": _classifies(
        "RobertaConfig", _ENCODER | {"pad_token_id": 1, "num_labels": 3}, "a head of two layers"
    ),
    "ModernBertForSequenceClassification": _classifies(
        "ModernBertConfig",
        _WINDOWED | {"num_labels": 4, "classifier_pooling": "mean"},
        "windows to both sides, a head with a norm",
    ),
    "LlamaForSequenceClassification": _classifies(
        "LlamaConfig", _DECODER | {"num_labels": 3}, "labels from the last token's state", causal=True
    ),
    "Qwen2ForSequenceClassification": _classifies(
        "Qwen2Config", _DECODER | {"num_labels": 2}, "the same with biases", causal=True
    ),
    "Qwen3ForSequenceClassification": PoolingFamily(
        Tiny("Qwen3Config", None, _DECODER | {"head_dim": 32}),
        "classify",
        "Qwen3-Reranker's way: a generating model, yes against no",
        causal=True,
        options={
            "hf_overrides": {
                "architectures": ["Qwen3ForSequenceClassification"],
                "classifier_from_token": [f"w{_NO}", f"w{_YES}"],
                "is_original_qwen3_reranker": True,
            }
        },
    ),
    "BertForTokenClassification": PoolingFamily(
        Tiny("BertConfig", None, _ENCODER | {"num_labels": 5}, auto="AutoModelForTokenClassification"),
        "token_classify",
        "scores for every token",
    ),
}


@dataclass(frozen=True)
class Prompt:
    tokens: list[int]
    second_text_from: int | None
    """Tokens before it are of the first text; None where there is one text."""


def prompts_of(name: str) -> list[Prompt]:
    pairs = POOLING_FAMILIES[name].pairs
    # 1 is padding to some models, and transformers gives that no position wherever it stands.
    prompts = [[max(token, 2) for token in prompt] for prompt in random_prompts(PROMPT_LENGTHS)]
    return [Prompt(prompt, len(prompt) // 3 if pairs else None) for prompt in prompts]


def save(name: str, folder: Path) -> None:
    """Write the checkpoint, and a tokenizer of words w0, w1 and so on with blanks between."""
    POOLING_FAMILIES[name].tiny.save(folder)
    words = Tokenizer(WordLevel({f"w{token}": token for token in range(VOCAB_SIZE)}, unk_token="w0"))
    words.pre_tokenizer = WhitespaceSplit()
    transformers.PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(folder)


def reference(name: str, folder: Path) -> list[torch.Tensor]:
    """What transformers gives for each prompt in float32: [size], for token_classify [tokens, labels].

    Scores are as the model's last layer gives them, without a softmax or sigmoid.
    """
    family = POOLING_FAMILIES[name]
    model = getattr(transformers, family.tiny.auto).from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )
    model.eval()
    return [_answer(family, model, prompt) for prompt in prompts_of(name)]


@torch.inference_mode()
def _answer(family: PoolingFamily, model: Any, prompt: Prompt) -> torch.Tensor:
    inputs = {"input_ids": torch.tensor([prompt.tokens])}
    if prompt.second_text_from is not None:
        places = torch.arange(len(prompt.tokens))
        inputs["token_type_ids"] = (places >= prompt.second_text_from).long()[None]
    if family.task == "embed":
        states = getattr(model, "model", model)(**inputs).last_hidden_state[0]
        return {"CLS": states[0], "MEAN": states.mean(0), "LAST": states[-1]}[str(family.pooling)]
    logits = model(**inputs).logits[0]
    if family.tiny.auto == "AutoModelForCausalLM":
        return (logits[-1, _YES] - logits[-1, _NO])[None]
    return logits
