# SPDX-License-Identifier: Apache-2.0
"""The recall model as a checkpoint that vLLM and transformers load: weights, configuration, tokenizer."""

from pathlib import Path
from typing import Any

import torch
from latent_model import LatentShape
from model import Shape
from recall import vocabulary
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import (
    DeepseekV3Config,
    GenerationConfig,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
)


def write_checkpoint(folder: Path, weights: dict[str, Tensor], shape: Shape) -> None:
    """Write everything `vllm serve FOLDER` needs. `weights` are bf16, named as in checkpoints."""
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = _deepseek_config(shape) if isinstance(shape, LatentShape) else _llama_config(shape)
    config.save_pretrained(folder)
    # Greedy, and no end-of-sequence token: a chain has no end, so clients say how many tokens they want.
    GenerationConfig(do_sample=False, pad_token_id=0).save_pretrained(folder)
    _tokenizer(shape.max_positions).save_pretrained(folder)


def _llama_config(shape: Shape) -> PreTrainedConfig:
    return LlamaConfig(
        **_common(shape),
        architectures=["LlamaForCausalLM"],
        num_key_value_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        tie_word_embeddings=True,
    )


def _deepseek_config(shape: LatentShape) -> PreTrainedConfig:
    return DeepseekV3Config(
        **_common(shape),
        architectures=["DeepseekV3ForCausalLM"],
        num_key_value_heads=shape.num_heads,
        q_lora_rank=None,
        kv_lora_rank=shape.latent_size,
        qk_rope_head_dim=shape.rope_size,
        qk_nope_head_dim=shape.key_size,
        v_head_dim=shape.value_size,
        first_k_dense_replace=shape.num_dense_layers,
        n_routed_experts=shape.num_experts,
        num_experts_per_tok=shape.experts_per_token,
        moe_intermediate_size=shape.expert_size,
        n_shared_experts=1,
        n_group=1,
        topk_group=1,
        norm_topk_prob=True,
        routed_scaling_factor=1.0,
        # vLLM reads these two, and transformers has them built in.
        scoring_func="sigmoid",
        topk_method="noaux_tc",
        num_nextn_predict_layers=0,
        tie_word_embeddings=False,
    )


def _common(shape: Shape) -> dict[str, Any]:
    return {
        "vocab_size": shape.vocab_size,
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.intermediate_size,
        "num_hidden_layers": shape.num_layers,
        "num_attention_heads": shape.num_heads,
        "max_position_embeddings": shape.max_positions,
        "rms_norm_eps": shape.norm_eps,
        "rope_parameters": {"rope_type": "default", "rope_theta": shape.rope_theta},
        "pad_token_id": 0,
        "bos_token_id": None,
        "eos_token_id": None,
        "dtype": torch.bfloat16,
    }


def _tokenizer(max_positions: int) -> PreTrainedTokenizerFast:
    """Words between spaces are tokens; nothing is added before or after them."""
    words = {word: index for index, word in enumerate(vocabulary())}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        unk_token="<unk>",
        model_max_length=max_positions,
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    )
