# SPDX-License-Identifier: Apache-2.0
"""Tiny models that see, and what they are asked; `see` asks."""

from __future__ import annotations

import base64
import importlib.util
import io
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.sensing import END_ID, FILM_ID, PICTURE_ID, START_ID, VOCAB_SIZE, Sensing, words

if TYPE_CHECKING:
    from PIL.Image import Image

PICTURES_FOLDER = Path(sys.prefix) / "pictures"
"""Where the installer puts torchvision: not among the other packages, where it would break transformers
in processes without the plugin, if its build does not fit torch's."""


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
_LIMITS = {"limit_mm_per_prompt": {"image": 2, "video": 0}}
_MARKED = "<|vision_start|><|image_pad|><|vision_end|>"
_MARKS = {
    "image_token_id": PICTURE_ID,
    "video_token_id": FILM_ID,
    "vision_start_token_id": START_ID,
    "vision_end_token_id": END_ID,
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
    "Qwen2_5_VLForConditionalGeneration": Sensing(
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
        options=_LIMITS,
    ),
    "Qwen3VLForConditionalGeneration": Sensing(
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
        options=_LIMITS,
    ),
    "LlavaForConditionalGeneration": Sensing(
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
        options=_LIMITS,
    ),
}

DISAGGREGATED = "Qwen2_5_VLForConditionalGeneration"
"""The one that goes through two engines too, prefill with two ranks and decode with one."""


def request(name: str, question: Question) -> dict[str, Any]:
    """The question as vLLM takes it."""
    pictures = {"multi_modal_data": {"image": pictures_of(question)}} if question.pictures else {}
    return {"prompt": _prompt_of(name, question)} | pictures


def inputs(name: str, processor: Any, question: Question) -> dict[str, Any]:
    """The question as the model of transformers takes it."""
    inputs: dict[str, Any] = processor(
        text=[_prompt_of(name, question)], images=pictures_of(question) or None, return_tensors="pt"
    )
    return inputs


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


def _prompt_of(name: str, question: Question) -> str:
    """The question's words, its pictures between those before and those after."""
    before, after = _words_of(question)
    return " ".join([*before, *[SEEING[name].placeholder] * len(question.pictures), *after])


def _words_of(question: Question) -> tuple[list[str], list[str]]:
    seed = question.num_words
    return words(seed, 100, 100 + question.num_words_before), words(seed, 0, question.num_words)
