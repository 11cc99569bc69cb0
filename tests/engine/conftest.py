# SPDX-License-Identifier: Apache-2.0
"""Checkpoints, and engines that run on them: started once for each kind, all tests read the answers.

Engines are started before transformers computes what is expected of them, in this process, so that both go on
at the same time.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from engine.generate import Answer, Answers, Job
from engine.launch import ON_EMULATOR_WITH_FLOAT32, Running, job, run, started
from engine.models import (
    FULL_ATTENTION_MODELS,
    HEAD_MAJOR_RUNS,
    NUM_NEW_TOKENS,
    RANDOM_MODELS,
    RECALL,
    RECALL_FOLDER,
    RUNS,
    block_size_of,
    cache_bytes_of,
    greedy_tokens,
    prompts_of,
)


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("checkpoints")
    for name, model in RANDOM_MODELS.items():
        model.save(folder / name)
    return {name: folder / name for name in RANDOM_MODELS} | {RECALL: RECALL_FOLDER}


@pytest.fixture(scope="session")
def float32_engines(
    checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Running]:
    """Engines for RUNS. Every batch is asked twice, the second time with its prefixes cached.

    A card's attention takes no float32, so this needs the emulator and its option.
    """
    jobs = [job_of(name, checkpoints[name], 2, "float32", size) for size, name in RUNS]
    with started(jobs, tmp_path_factory.mktemp("float32"), ON_EMULATOR_WITH_FLOAT32) as running:
        yield running


@pytest.fixture(scope="session")
def references(checkpoints: dict[str, Path], float32_engines: Running) -> dict[str, list[list[int]]]:
    """By model, what transformers generates for each prompt; the engines start before this is computed."""
    return {name: greedy_tokens(folder, prompts_of(name)) for name, folder in checkpoints.items()}


@pytest.fixture(scope="session")
def float32_answers(float32_engines: Running) -> dict[int, Answers]:
    """By tensor-parallel size."""
    results: dict[int, Answers] = {}
    for (size, name), answers in zip(RUNS, float32_engines.answers(), strict=True):
        results.setdefault(size, {})[name] = answers
    return results


@pytest.fixture(scope="session")
def bfloat16_answers(
    checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[int, Answers]:
    """By tensor-parallel size."""
    sizes = (1, 2)
    names = FULL_ATTENTION_MODELS
    jobs = [job_of(name, checkpoints[name], 1, "bfloat16", size) for size in sizes for name in names]
    answers = iter(run(jobs, tmp_path_factory.mktemp("bfloat16")))
    return {size: {name: next(answers) for name in names} for size in sizes}


@pytest.fixture(scope="session")
def pipeline_answers(
    checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> list[list[Answer]]:
    """An engine of two pipeline stages, which share the model's three layers; every batch asked twice."""
    jobs = [job_of("llama", checkpoints["llama"], 2, "float32", 1, pipeline_parallel_size=2)]
    (answers,) = run(jobs, tmp_path_factory.mktemp("pipeline"), ON_EMULATOR_WITH_FLOAT32)
    return answers


@pytest.fixture(scope="session")
def head_major_answers(
    checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, list[list[Answer]]]:
    """By model, on head-major pages; every batch asked twice."""
    jobs = [
        job_of(
            name, checkpoints[name], 2, "float32", size, additional_config={"kv_cache_layout": "head_major"}
        )
        for name, size in HEAD_MAJOR_RUNS.items()
    ]
    folder = tmp_path_factory.mktemp("head_major")
    return dict(zip(HEAD_MAJOR_RUNS, run(jobs, folder, ON_EMULATOR_WITH_FLOAT32), strict=True))


def job_of(name: str, folder: Path, times: int, dtype: str, size: int, **options: Any) -> Job:
    """Ask an engine of tensor-parallel size `size` all prompts of the model, `times` times."""
    return job(
        folder,
        [prompts_of(name)] * times,
        NUM_NEW_TOKENS,
        dtype=dtype,
        tensor_parallel_size=size,
        block_size=block_size_of(name),
        kv_cache_memory_bytes=cache_bytes_of(name),
        **options,
    )
