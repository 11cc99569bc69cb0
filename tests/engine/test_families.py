# SPDX-License-Identifier: Apache-2.0
"""Every architecture of `families`, in float32, gives transformers' greedy tokens and log-probabilities."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from engine.describe_models import DOCUMENT, with_table
from engine.families import (
    FAMILIES,
    LOG_PROBABILITY_TOLERANCE,
    NUM_NEW_TOKENS,
    PROMPT_LENGTHS,
    SPREADS,
    Reference,
    reference,
)
from engine.generate import Answer
from engine.launch import AT_LESS_COST, Running, job, started
from engine.models import VOCAB_SIZE, random_prompts

ONE_NPU = "1 NPU"
MIN_DISTINCT_TOKENS = 5
"""A model that repeats itself is easily agreed with; those with norms after each layer tend to."""
SETUPS = [(name, ONE_NPU) for name in FAMILIES] + [
    (name, spread) for spread in SPREADS for name, family in FAMILIES.items() if spread in family.spread
]
PROMPTS = random_prompts(PROMPT_LENGTHS)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("families")
    for name, family in FAMILIES.items():
        family.tiny.save(folder / name)
    return {name: folder / name for name in FAMILIES}


@pytest.fixture(scope="module")
def engines(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    jobs = [
        job(
            folders[name],
            [PROMPTS] * FAMILIES[name].times,
            NUM_NEW_TOKENS,
            dtype="float32",
            block_size=FAMILIES[name].tiny.block_size,
            kv_cache_memory_bytes=FAMILIES[name].tiny.cache_bytes,
            **SPREADS.get(setup, {}),
        )
        for name, setup in SETUPS
    ]
    with started(jobs, tmp_path_factory.mktemp("engines"), AT_LESS_COST) as running:
        yield running


@pytest.fixture(scope="module")
def references(folders: dict[str, Path], engines: Running) -> dict[str, Reference]:
    """The engines start before this is computed, and run at the same time."""
    return {name: reference(folder, PROMPTS) for name, folder in folders.items()}


@pytest.fixture(scope="module")
def answers(engines: Running) -> dict[tuple[str, str], list[Answer]]:
    """By architecture and setup, one time after the other."""
    return {
        setup: [answer for answers in batches for answer in answers]
        for setup, batches in zip(SETUPS, engines.answers(), strict=True)
    }


@pytest.mark.parametrize("name", FAMILIES)
def test_references_wander_and_differ(name: str, references: dict[str, Reference]) -> None:
    tokens = references[name].tokens
    assert all(len(set(output)) >= MIN_DISTINCT_TOKENS for output in tokens)
    assert len({tuple(output) for output in tokens}) == len(tokens)
    assert all(0 <= token < VOCAB_SIZE for output in tokens for token in output)


@pytest.mark.parametrize(("name", "setup"), SETUPS)
def test_greedy_tokens_are_those_of_transformers(
    name: str, setup: str, references: dict[str, Reference], answers: dict[tuple[str, str], list[Answer]]
) -> None:
    expected = references[name].tokens * FAMILIES[name].times
    assert [answer.tokens for answer in answers[name, setup]] == expected


@pytest.mark.parametrize(("name", "setup"), SETUPS)
def test_log_probabilities_are_those_of_transformers(
    name: str, setup: str, references: dict[str, Reference], answers: dict[tuple[str, str], list[Answer]]
) -> None:
    given = torch.tensor([answer.log_probabilities for answer in answers[name, setup]])
    expected = references[name].log_probabilities.repeat(FAMILIES[name].times, 1)
    assert (given - expected).abs().max() <= LOG_PROBABILITY_TOLERANCE


@pytest.mark.parametrize(
    ("name", "setup"), [(name, setup) for name, setup in SETUPS if FAMILIES[name].times > 1]
)
def test_prefixes_are_cached_the_second_time(
    name: str, setup: str, answers: dict[tuple[str, str], list[Answer]]
) -> None:
    size = FAMILIES[name].tiny.block_size
    assert size is not None
    whole_blocks = [(len(prompt) - 1) // size * size for prompt in PROMPTS]
    cached = [answer.num_cached_tokens for answer in answers[name, setup]]
    assert cached == [0] * len(PROMPTS) + whole_blocks


def test_the_table_of_models_is_in_step() -> None:
    document = DOCUMENT.read_text()
    assert with_table(document) == document, "write docs/models.md anew; engine/describe_models.py says how"
