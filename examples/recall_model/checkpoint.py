# SPDX-License-Identifier: Apache-2.0
"""The recall model as a checkpoint that vLLM and transformers load: weights, configuration, tokenizer."""

from pathlib import Path

import torch
from model import Shape
from recall import vocabulary
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import GenerationConfig, LlamaConfig, PreTrainedTokenizerFast


def write_checkpoint(folder: Path, weights: dict[str, Tensor], shape: Shape) -> None:
    """Write everything `vllm serve FOLDER` needs. `weights` are bf16, named as in LlamaForCausalLM."""
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    _config(shape).save_pretrained(folder)
    # Greedy, and no end-of-sequence token: a chain has no end, so clients say how many tokens they want.
    GenerationConfig(do_sample=False, pad_token_id=0).save_pretrained(folder)
    _tokenizer(shape.max_positions).save_pretrained(folder)


def _config(shape: Shape) -> LlamaConfig:
    config = LlamaConfig(
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        max_position_embeddings=shape.max_positions,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": shape.rope_theta},
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=None,
        dtype=torch.bfloat16,
    )
    config.architectures = ["LlamaForCausalLM"]
    return config


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
