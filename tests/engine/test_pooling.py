# SPDX-License-Identifier: Apache-2.0
"""Every architecture of `pooling`, in float32, gives transformers' embeddings and scores.

The engines of a size start in turn in one process for each rank. Each gets prompts of all lengths at once and
computes them in several steps of several prompts; those without causality keep no KV cache, and a prompt of
theirs comes whole.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from engine.families import SPREADS
from engine.launch import AT_LESS_COST, MAX_BATCHED_TOKENS, started
from engine.pool import PoolJob
from engine.pooling import (
    COSINE_DISTANCE_TOLERANCE,
    POOLING_FAMILIES,
    PROMPT_LENGTHS,
    SCORE_TOLERANCE,
    prompts_of,
    reference,
    save,
)

ONE_NPU = "1 NPU"
CLEARLY_DIFFERENT = 10
"""By how many tolerances answers to two prompts differ: less, and any two engines might agree."""
SETUPS = [(name, spread) for name, family in POOLING_FAMILIES.items() for spread in (ONE_NPU, *family.spread)]

References = dict[str, list[torch.Tensor]]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pooling")
    for name in POOLING_FAMILIES:
        save(name, folder / name)
    return {name: folder / name for name in POOLING_FAMILIES}


@pytest.fixture(scope="module")
def references(folders: dict[str, Path]) -> References:
    return {name: reference(name, folder) for name, folder in folders.items()}


@pytest.fixture(scope="module")
def answers(
    folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[tuple[str, str], list[torch.Tensor]]:
    jobs = [job_of(name, setup, folders[name]) for name, setup in SETUPS]
    with started(jobs, tmp_path_factory.mktemp("engines"), AT_LESS_COST) as running:
        given = [[torch.tensor(answer) for answer in each] for each in running.results()]
    return dict(zip(SETUPS, given, strict=True))


def job_of(name: str, setup: str, folder: Path) -> PoolJob:
    family, prompts = POOLING_FAMILIES[name], prompts_of(name)
    longest = max(PROMPT_LENGTHS)
    options: dict[str, Any] = {
        "dtype": "float32",
        "max_model_len": longest + 30,
        "max_num_batched_tokens": MAX_BATCHED_TOKENS if family.causal else longest + 30,
        "max_num_seqs": 4,
        "kv_cache_memory_bytes": family.tiny.cache_bytes,
        "pooler_config": {} if family.pooling is None else {"seq_pooling_type": family.pooling},
    }
    return PoolJob(
        str(folder),
        options | family.options | SPREADS.get(setup, {}),
        family.task,
        [prompt.tokens for prompt in prompts],
        [prompt.second_text_from for prompt in prompts],
    )


def distance(name: str, one: torch.Tensor, other: torch.Tensor) -> float:
    """In tolerances: of the cosine for embeddings, of the score that differs most for others."""
    if POOLING_FAMILIES[name].task == "embed":
        return (1 - torch.cosine_similarity(one, other, dim=0).item()) / COSINE_DISTANCE_TOLERANCE
    return (one - other).abs().max().item() / SCORE_TOLERANCE


@pytest.mark.parametrize("name", POOLING_FAMILIES)
def test_references_differ(name: str, references: References) -> None:
    firsts = [
        answer[:5] if POOLING_FAMILIES[name].task == "token_classify" else answer
        for answer in references[name]
    ]
    for index, one in enumerate(firsts):
        assert all(distance(name, one, other) > CLEARLY_DIFFERENT for other in firsts[:index])


@pytest.mark.parametrize(("name", "setup"), SETUPS)
def test_answers_are_those_of_transformers(
    name: str, setup: str, references: References, answers: dict[tuple[str, str], list[torch.Tensor]]
) -> None:
    for given, expected in zip(answers[name, setup], references[name], strict=True):
        assert given.shape == expected.shape
        assert distance(name, given, expected) <= 1
