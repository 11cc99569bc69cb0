# SPDX-License-Identifier: Apache-2.0
"""Tiny models that see, with processors and tokenizers written here, and what they are asked.

Nothing here imports transformers: its modules for pictures need torchvision, which not every process has.
`see` uses them, in a process of its own.
"""

from __future__ import annotations

import base64
import importlib.util
import io
import json
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL.Image import Image

NUM_NEW_TOKENS = 32
BLOCK_SIZE = 16
PICTURES_FOLDER = Path(sys.prefix) / "pictures"
"""Where the installer puts torchvision: not among the other packages, where it would break transformers
in processes without the plugin, if its build does not fit torch's."""

_NUM_WORDS = 506
_SPECIALS = ["<bos>", "<eos>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
VOCAB_SIZE = _NUM_WORDS + len(_SPECIALS)
PICTURE_ID, FILM_ID = _NUM_WORDS + 4, _NUM_WORDS + 5
_START_ID, _END_ID = _NUM_WORDS + 2, _NUM_WORDS + 3


@dataclass(frozen=True)
class Question:
    """Words around pictures; `pictures` holds (seed, width, height) of each."""

    pictures: tuple[tuple[int, int, int], ...]
    num_words_before: int
    num_words: int


QUESTIONS = [
    Question((), 0, 17),
    Question((), 0, 70),
    Question(((1, 32, 32),), 0, 9),
    Question(((2, 32, 32),), 0, 9),  # the same words about another picture of the same size
    Question(((3, 40, 24),), 5, 20),
    Question(((4, 72, 16),), 30, 12),
    Question(((5, 56, 64), (6, 17, 33)), 3, 40),
    Question(((1, 32, 32), (2, 32, 32)), 0, 33),
]
SAME_WORDS = (2, 3)
"""Questions that differ only in what their picture shows."""


@dataclass(frozen=True)
class Seeing:
    """One architecture; `config` names a configuration class of transformers, `sizes` fill it."""

    config: str
    shows: str
    """For the table in docs/models.md."""
    placeholder: str
    """What stands for a picture in a prompt."""
    sizes: dict[str, Any]
    processors: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Files of the checkpoint beside the model and the tokenizer."""
    published: tuple[tuple[str, str], ...] = ()
    """How names of weights begin in what transformers writes, and in the checkpoints that people have."""


_TEXT = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
_MARKED = "<|vision_start|><|image_pad|><|vision_end|>"
_MARKS = {
    "image_token_id": PICTURE_ID,
    "video_token_id": FILM_ID,
    "vision_start_token_id": _START_ID,
    "vision_end_token_id": _END_ID,
    "tie_word_embeddings": False,
}


def _patches(processor: str, kind: str) -> dict[str, dict[str, Any]]:
    """Processors of the models whose pictures keep their shape: patches of 4, of which 2 x 2 make a token."""
    sizes = {"shortest_edge": 64, "longest_edge": 64 * 64}
    common = {"patch_size": 4, "temporal_patch_size": 2, "merge_size": 2, "size": sizes}
    common |= {"image_mean": [0.5] * 3, "image_std": [0.25] * 3}
    return {
        "preprocessor_config.json": common
        | {"image_processor_type": "Qwen2VLImageProcessor", "processor_class": processor},
        "video_preprocessor_config.json": common
        | {"video_processor_type": kind, "processor_class": processor},
        "processor_config.json": {"processor_class": processor},
    }


SEEING = {
    "Qwen2_5_VLForConditionalGeneration": Seeing(
        "Qwen2_5_VLConfig",
        "pictures of any shape, windows in the tower, three positions a token (mrope)",
        _MARKED,
        _MARKS
        | {
            "text_config": _TEXT
            | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 6, 6]}},
            "vision_config": {
                "depth": 3,
                "hidden_size": 160,
                "intermediate_size": 96,
                "num_heads": 2,
                "patch_size": 4,
                "window_size": 16,
                "fullatt_block_indexes": [1],
                "out_hidden_size": 128,
            },
        },
        _patches("Qwen2_5_VLProcessor", "Qwen2VLVideoProcessor"),
    ),
    "Qwen3VLForConditionalGeneration": Seeing(
        "Qwen3VLConfig",
        "layers of the tower feed layers of the text model; positions interleaved",
        _MARKED,
        _MARKS
        | {
            "text_config": _TEXT
            | {
                "head_dim": 32,
                "rope_parameters": {
                    "rope_type": "default",
                    "rope_theta": 1e4,
                    "mrope_section": [6, 5, 5],
                    "mrope_interleaved": True,
                },
            },
            "vision_config": {
                "depth": 3,
                "hidden_size": 144,
                "intermediate_size": 96,
                "num_heads": 2,
                "patch_size": 4,
                "num_position_embeddings": 64,
                "deepstack_visual_indexes": [0, 1],
                "out_hidden_size": 128,
            },
        },
        _patches("Qwen3VLProcessor", "Qwen3VLVideoProcessor"),
    ),
    "LlavaForConditionalGeneration": Seeing(
        "LlavaConfig",
        "a CLIP tower, pictures cut to squares",
        "<|image_pad|>",
        {
            "image_token_index": PICTURE_ID,
            "vision_feature_layer": -2,
            "vision_feature_select_strategy": "default",
            "image_seq_length": 16,
            "tie_word_embeddings": False,
            "text_config": _TEXT | {"model_type": "llama"},
            "vision_config": {
                "model_type": "clip_vision_model",
                "hidden_size": 96,
                "intermediate_size": 128,
                "num_hidden_layers": 3,
                "num_attention_heads": 3,
                "image_size": 32,
                "patch_size": 8,
                "projection_dim": 64,
            },
        },
        {
            "preprocessor_config.json": {
                "image_processor_type": "CLIPImageProcessor",
                "processor_class": "LlavaProcessor",
                "size": {"shortest_edge": 32},
                "crop_size": {"height": 32, "width": 32},
            },
            "processor_config.json": {
                "processor_class": "LlavaProcessor",
                "image_token": "<|image_pad|>",
                "patch_size": 8,
                "num_additional_image_tokens": 1,
                "vision_feature_select_strategy": "default",
            },
        },
        (("vision_tower.", "vision_tower.vision_model."),),
    ),
}

DISAGGREGATED = "Qwen2_5_VLForConditionalGeneration"
"""The one that goes through two engines too, prefill with two ranks and decode with one."""


def prompt_of(model: Seeing, question: Question) -> str:
    """The question's words, its pictures between those before and those after."""
    before, after = _words_of(question)
    return " ".join([*before, *[model.placeholder] * len(question.pictures), *after])


def pictures_of(question: Question) -> list[Image]:
    """Colours that change slowly over noise."""
    import numpy as np
    from PIL import Image

    pictures = []
    for seed, width, height in question.pictures:
        draw = np.random.default_rng(seed)
        slopes = draw.uniform(-4, 4, size=(2, 3))
        rows, columns = np.mgrid[:height, :width]
        colours = 128 + rows[..., None] * slopes[0] + columns[..., None] * slopes[1]
        colours = colours + draw.normal(0, 30, size=colours.shape)
        pictures.append(Image.fromarray(colours.clip(0, 255).astype(np.uint8)))
    return pictures


def chat_of(question: Question) -> list[dict[str, Any]]:
    """The question as messages for /v1/chat/completions, its pictures as PNG in the request."""
    before, after = _words_of(question)
    parts: list[dict[str, Any]] = [{"type": "text", "text": " ".join(before)}]
    for picture in pictures_of(question):
        file = io.BytesIO()
        picture.save(file, format="PNG")
        data = base64.b64encode(file.getvalue()).decode()
        parts.append({"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}})
    return [{"role": "user", "content": [*parts, {"type": "text", "text": " ".join(after)}]}]


def save(name: str, folder: Path) -> None:
    """Write the checkpoint: float32, the same weights every time, tokenizer and processors."""
    import torch
    import transformers

    model = SEEING[name]
    torch.manual_seed(20)
    config = getattr(transformers, model.config)(**model.sizes)
    network = getattr(transformers, name)._from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for tensor in network.state_dict().values():
            if tensor.dim() == 1:
                tensor.add_(torch.randn_like(tensor), alpha=0.25)
            else:
                # Wide enough that an answer depends on every word and picture.
                tensor.normal_(std=2 / tensor[0].numel() ** 0.5)
        # Words alone are said.
        network.get_output_embeddings().weight[_NUM_WORDS:] = 0
    network.save_pretrained(folder)
    _rename_weights(folder / "model.safetensors", model.published)
    _save_tokenizer(folder, model)
    for file, content in model.processors.items():
        (folder / file).write_text(json.dumps(content))


def environment(*folders: Path) -> dict[str, str]:
    """What a process that prepares pictures needs beside what this one has; it imports from `folders` too.

    Raises FileNotFoundError if torchvision is nowhere.
    """
    if importlib.util.find_spec("torchvision") is None:
        folders = (PICTURES_FOLDER, *folders)
    if PICTURES_FOLDER in folders and not PICTURES_FOLDER.is_dir():
        raise FileNotFoundError(
            f"pictures need torchvision, and it is neither installed nor in {PICTURES_FOLDER}; run "
            f".setup/install.sh"
        )
    paths = [*map(str, folders), os.environ.get("PYTHONPATH", "")]
    return {"PYTHONPATH": os.pathsep.join(path for path in paths if path)}


def _words_of(question: Question) -> tuple[list[str], list[str]]:
    words = [f"w{(7 * index * index + 3 * question.num_words) % _NUM_WORDS}" for index in range(200)]
    return words[100 : 100 + question.num_words_before], words[: question.num_words]


def _rename_weights(file: Path, beginnings: tuple[tuple[str, str], ...]) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(file)
    for written, published in beginnings:
        weights = {name.replace(written, published, 1): tensor for name, tensor in weights.items()}
    save_file(weights, file, metadata={"format": "pt"})


def _save_tokenizer(folder: Path, model: Seeing) -> None:
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
