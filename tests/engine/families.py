# SPDX-License-Identifier: Apache-2.0
"""One tiny random model for each architecture that is compared with transformers, token by token.

A row says what its architecture adds to those above it; `docs/models.md` is written from here.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from engine.models import Tiny

NUM_NEW_TOKENS = 32
LOG_PROBABILITY_TOLERANCE = 1e-3


@dataclass(frozen=True)
class Family:
    """An architecture of vLLM, by the name that a checkpoint's configuration gives it."""

    tiny: Tiny
    shows: str
    """What is particular about it, for the table in docs/models.md."""
    spread: tuple[str, ...] = ()
    """Ways over two NPUs that are compared too; keys of SPREADS."""
    times: int = 1
    """How often its prompts are asked; from the second time on their prefixes are cached."""


SPREADS = {
    "TP 2": {"tensor_parallel_size": 2},
    "EP 2": {"tensor_parallel_size": 2, "enable_expert_parallel": True},
}
"""Options of vLLM for each way to use two NPUs."""

_LATENT = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "moe_intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "kv_lora_rank": 512,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 128,
    "v_head_dim": 128,
    "first_k_dense_replace": 1,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
}
"""Heads and latents of the sizes that all DeepSeek models have."""

FAMILIES = {
    "MixtralForCausalLM": Family(
        Tiny(
            "MixtralConfig",
            None,
            {
                "hidden_size": 128,
                "intermediate_size": 96,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "num_local_experts": 8,
                "num_experts_per_tok": 2,
            },
        ),
        "experts chosen by softmax, weights that sum to 1",
        ("EP 2",),
    ),
    "Qwen2MoeForCausalLM": Family(
        Tiny(
            "Qwen2MoeConfig",
            16,
            {
                "hidden_size": 128,
                "intermediate_size": 128,
                "moe_intermediate_size": 48,
                "shared_expert_intermediate_size": 96,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "num_experts": 8,
                "num_experts_per_tok": 4,
            },
        ),
        "weights as the softmax gives them, a shared expert with a gate",
    ),
    "Qwen3MoeForCausalLM": Family(
        Tiny(
            "Qwen3MoeConfig",
            32,
            {
                "hidden_size": 96,
                "intermediate_size": 128,
                "moe_intermediate_size": 64,
                "num_attention_heads": 6,
                "num_key_value_heads": 2,
                "head_dim": 32,
                "num_experts": 16,
                "num_experts_per_tok": 4,
                "norm_topk_prob": True,
            },
        ),
        "more and smaller experts",
    ),
    "OlmoeForCausalLM": Family(
        Tiny(
            "OlmoeConfig",
            None,
            {
                "hidden_size": 128,
                "intermediate_size": 64,
                "num_attention_heads": 4,
                "num_key_value_heads": 4,
                "num_experts": 8,
                "num_experts_per_tok": 3,
            },
        ),
        "norms over all heads of query and key",
    ),
    "Glm4MoeForCausalLM": Family(
        Tiny(
            "Glm4MoeConfig",
            None,
            {
                "hidden_size": 128,
                "intermediate_size": 128,
                "moe_intermediate_size": 64,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "head_dim": 32,
                "n_routed_experts": 16,
                "n_group": 4,
                "topk_group": 2,
                "n_shared_experts": 1,
                "num_experts_per_tok": 3,
                "first_k_dense_replace": 1,
                "routed_scaling_factor": 2.5,
                "use_qk_norm": True,
            },
        ),
        "DeepSeek-V3's choice: sigmoid, bias, groups, scale; shared experts; partial rotary",
        ("TP 2", "EP 2"),
    ),
    "DeepseekV2ForCausalLM": Family(
        Tiny(
            "DeepseekV2Config",
            16,
            _LATENT
            | {
                "q_lora_rank": None,
                "topk_method": "greedy",
                "n_group": 1,
                "topk_group": 1,
                "num_experts_per_tok": 2,
                "norm_topk_prob": False,
                "routed_scaling_factor": 1.0,
            },
        ),
        "latent attention (MLA), its prefixes cached or not",
        ("TP 2",),
        times=2,
    ),
    "DeepseekV3ForCausalLM": Family(
        Tiny(
            "DeepseekV3Config",
            None,
            _LATENT
            | {
                "q_lora_rank": 96,
                "n_group": 2,
                "topk_group": 1,
                "num_experts_per_tok": 2,
                "scoring_func": "sigmoid",
                "topk_method": "noaux_tc",
                "num_nextn_predict_layers": 0,
                "rope_parameters": {
                    "rope_type": "yarn",
                    "rope_theta": 10000.0,
                    "factor": 4.0,
                    "beta_fast": 32.0,
                    "beta_slow": 1.0,
                    "mscale": 1.0,
                    "mscale_all_dim": 1.0,
                    "original_max_position_embeddings": 128,
                },
            },
        ),
        "latent queries too; rotary stretched by YaRN",
        ("TP 2",),
    ),
}


@dataclass(frozen=True)
class Reference:
    """What transformers generates for each prompt in float32 on the CPU."""

    tokens: list[list[int]]
    log_probabilities: torch.Tensor
    """float32 [prompts, NUM_NEW_TOKENS]"""


def reference(folder: Path, prompts: list[list[int]]) -> Reference:
    """Greedy continuations of NUM_NEW_TOKENS tokens."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokens, chosen = [], []
    for prompt in prompts:
        inputs = torch.tensor([prompt])
        output = model.generate(
            inputs,
            attention_mask=torch.ones_like(inputs),
            do_sample=False,
            max_new_tokens=NUM_NEW_TOKENS,
            eos_token_id=None,
            pad_token_id=0,
            return_dict_in_generate=True,
            output_logits=True,
        )
        new = output.sequences[0, len(prompt) :]
        tokens.append(new.tolist())
        chosen.append(torch.cat(output.logits).log_softmax(-1).gather(1, new[:, None])[:, 0])
    return Reference(tokens, torch.stack(chosen))
