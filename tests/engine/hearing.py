# SPDX-License-Identifier: Apache-2.0
"""A tiny model that hears: an encoder of recordings beside a decoder. What it is asked; `see` asks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from engine.sensing import VOCAB_SIZE, Sensing, words

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

SAMPLING_RATE_HZ = 16_000
NUM_POSITIONS = 50
"""That the encoder makes of every recording: one second in steps of 20 ms; shorter ones are filled up."""

_FIRST_ID = 0


@dataclass(frozen=True)
class Question:
    """A recording, and words that begin its text."""

    sound: int
    """Its seed."""
    seconds: float
    num_words: int


QUESTIONS = [
    Question(1, 1.0, 0),
    Question(2, 1.0, 0),  # another recording
    Question(3, 0.25, 4),
    Question(4, 0.6, 16),
    Question(5, 1.0, 17),
    Question(6, 0.9, 40),
    Question(7, 1.0, 5),
    Question(1, 1.0, 33),
]
SAME_WORDS = (0, 1)
"""Questions that differ only in what they hear."""

HEARING = {
    "WhisperForConditionalGeneration": Sensing(
        "WhisperConfig",
        "an encoder of recordings, to which every layer of the decoder attends",
        "",
        {
            "vocab_size": VOCAB_SIZE,
            "d_model": 96,
            "encoder_layers": 2,
            "encoder_attention_heads": 3,
            "encoder_ffn_dim": 128,
            "decoder_layers": 3,
            "decoder_attention_heads": 3,
            "decoder_ffn_dim": 128,
            "max_source_positions": NUM_POSITIONS,
            "max_target_positions": 512,
            "suppress_tokens": None,
            "begin_suppress_tokens": None,
            "bos_token_id": None,
            "eos_token_id": None,
            "pad_token_id": None,
            "decoder_start_token_id": _FIRST_ID,
        },
        {
            "preprocessor_config.json": {
                "feature_extractor_type": "WhisperFeatureExtractor",
                "processor_class": "WhisperProcessor",
                "sampling_rate": SAMPLING_RATE_HZ,
                "chunk_length": 1,
            },
            "processor_config.json": {"processor_class": "WhisperProcessor"},
        },
        # Without these, recordings and places would hardly count beside what is the same in all of them.
        factors={
            "model.encoder.conv2.weight": 4,
            "model.encoder.embed_positions.weight": 20,
            "model.decoder.embed_positions.weight": 20,
            "proj_out.weight": 2,
        },
        # vLLM cuts no prompt beside an encoder into chunks.
        options={"max_num_batched_tokens": 384},
    )
}


def request(name: str, question: Question) -> dict[str, Any]:
    """The question as vLLM takes it."""
    return {
        "prompt": _prompt_of(question),
        "multi_modal_data": {"audio": (sound_of(question), SAMPLING_RATE_HZ)},
    }


def inputs(name: str, processor: Any, question: Question) -> dict[str, Any]:
    """The question as the model of transformers takes it."""
    heard = processor(audio=sound_of(question), sampling_rate=SAMPLING_RATE_HZ, return_tensors="pt")
    said = processor.tokenizer(_prompt_of(question), return_tensors="pt")
    return {"input_features": heard["input_features"], "decoder_input_ids": said["input_ids"]}


def sound_of(question: Question) -> npt.NDArray[np.float32]:
    """[samples]: three tones that come and go, over noise."""
    import numpy as np

    draw = np.random.default_rng(question.sound)
    times = np.arange(int(question.seconds * SAMPLING_RATE_HZ)) / SAMPLING_RATE_HZ
    sound = draw.normal(0, 0.02, size=times.shape)
    for pitch, pace in zip(draw.uniform(100, 4000, 3), draw.uniform(1, 6, 3), strict=True):
        sound += 0.3 * np.sin(2 * np.pi * pitch * times) * np.sin(2 * np.pi * pace * times)
    return sound.astype(np.float32)


def _prompt_of(question: Question) -> str:
    """Its words, after the one that begins every text; vLLM would put that before them otherwise."""
    return " ".join([f"w{_FIRST_ID}", *words(question.num_words, 0, question.num_words)])
