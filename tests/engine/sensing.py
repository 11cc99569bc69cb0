# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of tiny models that see or hear: random weights, a tokenizer of words, processors.

This imports no transformers: its modules for pictures need torchvision, which not every process has.
`see` uses them, in a process of its own.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

NUM_NEW_TOKENS = 32
BLOCK_SIZE = 16

_NUM_WORDS = 506
_SPECIALS = ["<bos>", "<eos>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
VOCAB_SIZE = _NUM_WORDS + len(_SPECIALS)
START_ID, END_ID, PICTURE_ID, FILM_ID = range(_NUM_WORDS + 2, VOCAB_SIZE)


@dataclass(frozen=True)
class Sensing:
    """One architecture; `config` names a configuration class of transformers, `sizes` fill it."""

    config: str
    shows: str
    """For the table in docs/models.md."""
    placeholder: str
    """What stands for a picture in a prompt."""
    sizes: dict[str, Any]
    processors: dict[str, dict[str, Any]]
    """Files of the checkpoint beside the model and the tokenizer."""
    published: tuple[tuple[str, str], ...] = ()
    """How names of weights begin in what transformers writes, and in the checkpoints that people have."""
    factors: dict[str, float] = field(default_factory=dict)
    """By name, weights that are wider or narrower than others, where an answer would repeat itself."""
    options: dict[str, Any] = field(default_factory=dict)
    """For the engine, beside the usual ones."""


def words(seed: int, first: int, stop: int) -> list[str]:
    """Some that follow no pattern: those from `first` to `stop` of an endless row, which `seed` chooses."""
    return [f"w{(7 * index * index + 3 * seed) % _NUM_WORDS}" for index in range(first, stop)]


def save(name: str, model: Sensing, folder: Path) -> None:
    """Write the checkpoint: float32, the same weights every time, tokenizer and processors."""
    import torch
    import transformers

    torch.manual_seed(20)
    config = getattr(transformers, model.config)(**model.sizes)
    network = getattr(transformers, name)._from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for weight, tensor in network.state_dict().items():
            if tensor.dim() == 1:
                tensor.add_(torch.randn_like(tensor), alpha=0.25)
            else:
                # Wide enough that an answer depends on every word, picture and sound.
                tensor.normal_(std=2 * model.factors.get(weight, 1) / tensor[0].numel() ** 0.5)
        # Words alone are said.
        network.get_output_embeddings().weight[_NUM_WORDS:] = 0
    network.save_pretrained(folder)
    _rename_weights(folder / "model.safetensors", model.published)
    _save_tokenizer(folder, model)
    for file, content in model.processors.items():
        (folder / file).write_text(json.dumps(content))


def _rename_weights(file: Path, beginnings: tuple[tuple[str, str], ...]) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(file)
    for written, published in beginnings:
        weights = {name.replace(written, published, 1): tensor for name, tensor in weights.items()}
    save_file(weights, file, metadata={"format": "pt"})


def _save_tokenizer(folder: Path, model: Sensing) -> None:
    import tokenizers
    import transformers

    words = [f"w{index}" for index in range(_NUM_WORDS)]
    vocabulary = {word: index for index, word in enumerate([*words, *_SPECIALS])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="w0"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<bos>",
        eos_token="<eos>",
        additional_special_tokens=_SPECIALS[2:],
        extra_special_tokens={"image_token": "<|image_pad|>", "video_token": "<|video_pad|>"},
        model_max_length=512,
    )
    fast.chat_template = (
        "{%- for message in messages -%}{%- for part in message['content'] -%}"
        "{%- if part['type'] == 'text' -%}{{ part['text'] }}{%- else -%}"
        + model.placeholder
        # A blank in an expression: one beside a tag is stripped.
        + "{%- endif -%}{{ ' ' }}{%- endfor -%}{%- endfor -%}"
    )
    fast.save_pretrained(folder)
