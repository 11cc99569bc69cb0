# SPDX-License-Identifier: Apache-2.0
"""One tiny random model for each architecture that is compared with transformers, token by token.

The table of `docs/models.md` is written from here, by `describe_models`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from engine.greedy import greedy_after
from engine.models import RANDOM_MODELS, Tiny

NUM_NEW_TOKENS = 32
PROMPT_LENGTHS = (5, 16, 17, 33, 48, 64, 97, 130)
"""Around the ends of blocks of 16 and 32 tokens, beyond every window, and beyond a batch of 96."""
LOG_PROBABILITY_TOLERANCE = 1e-3

SPREADS = {
    "TP 2": {"tensor_parallel_size": 2},
    "EP 2": {"tensor_parallel_size": 2, "enable_expert_parallel": True},
    "head-major pages": {"additional_config": {"kv_cache_layout": "head_major"}},
}
"""Options of vLLM for each way to use two NPUs, or to lay out the cache."""

_SMALL = {"hidden_size": 128, "intermediate_size": 192, "num_attention_heads": 4, "num_key_value_heads": 2}
_EXPERTS = _SMALL | {"intermediate_size": 64, "num_local_experts": 8, "num_experts_per_tok": 2}
_WINDOWED = {
    "sliding_window": 24,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
}
_SCALED = {
    "embedding_multiplier": 2.0,
    "logits_scaling": 0.5,
    "residual_multiplier": 0.7,
    "attention_multiplier": 0.2,
}
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


@dataclass(frozen=True)
class Family:
    """An architecture, and what it has that not every one has."""

    tiny: Tiny
    shows: str
    """For the table in docs/models.md."""
    spread: tuple[str, ...] = ()
    """What else it is compared on; keys of SPREADS."""
    times: int = 1
    """How often its prompts are asked; from the second time on their prefixes are cached."""


def _family(config: str, shows: str, *, block_size: int | None = None, **sizes: Any) -> Family:
    return Family(Tiny(config, block_size, sizes), shows)


FAMILIES = {
    "LlamaForCausalLM": Family(RANDOM_MODELS["llama"], "Llama 3's rope scaling"),
    "MistralForCausalLM": Family(RANDOM_MODELS["mistral"], "a window in every layer"),
    "Qwen2ForCausalLM": Family(RANDOM_MODELS["qwen2"], "biases, tied embeddings"),
    "Qwen3ForCausalLM": Family(RANDOM_MODELS["qwen3"], "norms of query and key heads"),
    "GemmaForCausalLM": _family(
        "GemmaConfig",
        "gated GELU, one KV head, scaled embeddings",
        **_SMALL | {"num_key_value_heads": 1, "head_dim": 64, "tie_word_embeddings": False},
    ),
    "Gemma2ForCausalLM": Family(
        Tiny(
            "Gemma2Config",
            16,
            _SMALL
            | _WINDOWED
            | {
                "head_dim": 32,
                "query_pre_attn_scalar": 4,
                "attn_logit_softcapping": 2.0,
                "final_logit_softcapping": 5.0,
            },
            embedding_factor=0.02,
            last_norm_offset=50.0,
        ),
        "capped attention scores and logits, windows beside full attention",
    ),
    "Gemma3ForCausalLM": Family(RANDOM_MODELS["gemma3"], "windows beside full attention, two rope bases"),
    "PhiForCausalLM": _family(
        "PhiConfig",
        "layer norm, GELU, partial rotary, attention beside the MLP",
        **_SMALL | {"num_key_value_heads": 4, "partial_rotary_factor": 0.5},
    ),
    "Phi3ForCausalLM": _family("Phi3Config", "fused projections in the checkpoint", **_SMALL),
    "GlmForCausalLM": _family(
        "GlmConfig",
        "partial rotary of neighbours, biases",
        **_SMALL | {"head_dim": 32, "attention_bias": True},
    ),
    "Glm4ForCausalLM": _family("Glm4Config", "four norms a layer", **_SMALL | {"head_dim": 32}),
    "GraniteForCausalLM": _family(
        "GraniteConfig", "factors on embeddings, residuals, scores and logits", **_SMALL | _SCALED
    ),
    "OlmoForCausalLM": _family("OlmoConfig", "layer norm without weights", **_SMALL),
    "Olmo2ForCausalLM": _family("Olmo2Config", "norms after the layers, over all heads", **_SMALL),
    "Olmo3ForCausalLM": _family(
        "Olmo3Config", "windows beside full attention", block_size=16, **_SMALL | _WINDOWED
    ),
    "StableLmForCausalLM": _family(
        "StableLmConfig", "layer norm with SwiGLU, partial rotary", **_SMALL | {"use_qkv_bias": True}
    ),
    "Starcoder2ForCausalLM": _family(
        "Starcoder2Config", "layer norm, biases everywhere, GELU", **_SMALL | {"sliding_window": None}
    ),
    "GPTNeoXForCausalLM": _family(
        "GPTNeoXConfig",
        "a quarter of each head rotated, attention beside the MLP",
        hidden_size=128,
        intermediate_size=192,
        num_attention_heads=4,
        rotary_pct=0.25,
    ),
    "MixtralForCausalLM": Family(
        Tiny("MixtralConfig", None, _EXPERTS | {"intermediate_size": 96}),
        "experts by softmax, weights that sum to 1",
        ("EP 2",),
    ),
    "Qwen2MoeForCausalLM": _family(
        "Qwen2MoeConfig",
        "weights as the softmax gives them, a shared expert with a gate",
        block_size=16,
        **_SMALL
        | {
            "moe_intermediate_size": 48,
            "shared_expert_intermediate_size": 96,
            "num_experts": 8,
            "num_experts_per_tok": 4,
        },
    ),
    "Qwen3MoeForCausalLM": _family(
        "Qwen3MoeConfig",
        "more and smaller experts",
        block_size=32,
        **_SMALL
        | {
            "head_dim": 32,
            "moe_intermediate_size": 64,
            "num_experts": 16,
            "num_experts_per_tok": 4,
            "norm_topk_prob": True,
        },
    ),
    "OlmoeForCausalLM": _family(
        "OlmoeConfig",
        "experts behind norms over all heads",
        **_SMALL | {"intermediate_size": 64, "num_experts": 8, "num_experts_per_tok": 3},
    ),
    "Glm4MoeForCausalLM": Family(
        Tiny(
            "Glm4MoeConfig",
            None,
            _SMALL
            | {
                "moe_intermediate_size": 64,
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
        "DeepSeek-V3's choice of experts: sigmoid, bias, groups, scale; shared experts",
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
        ("TP 2", "head-major pages"),
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
    "GptOssForCausalLM": Family(
        Tiny(
            "GptOssConfig",
            16,
            _EXPERTS
            | {
                "head_dim": 32,
                "sliding_window": 24,
                "rope_parameters": {
                    "rope_type": "yarn",
                    "rope_theta": 10000.0,
                    "factor": 4.0,
                    "beta_fast": 32.0,
                    "beta_slow": 1.0,
                    "truncate": False,
                    "original_max_position_embeddings": 128,
                },
            },
        ),
        "attention sinks, YaRN, biases of experts, clipped SwiGLU",
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
    # The other implementations of attention leave caps out.
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )
    answers = [greedy_after(model, NUM_NEW_TOKENS, prompt) for prompt in prompts]
    return Reference(
        [answer.tokens for answer in answers], torch.stack([answer.log_probabilities for answer in answers])
    )
