# SPDX-License-Identifier: Apache-2.0
"""Checkpoints, and engines that ran on them: one process per kind of engine, all tests read its answers."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import pytest
from engine.generate import Answer, Answers, Job
from engine.models import (
    FULL_ATTENTION_MODELS,
    NUM_NEW_TOKENS,
    RANDOM_MODELS,
    RECALL,
    RECALL_FOLDER,
    RUNS,
    block_size_of,
    cache_bytes_of,
    prompts_of,
)

MAX_BATCHED_TOKENS = 96
"""Less than the longer prompts have, so that those are computed in chunks."""

ON_EMULATOR_WITH_FLOAT32 = ("-m", "vllm_ascend.emulator", "--devices", "2", "--allow-fp32", sys.executable)


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("checkpoints")
    for name, model in RANDOM_MODELS.items():
        model.save(folder / name)
    return {name: folder / name for name in RANDOM_MODELS} | {RECALL: RECALL_FOLDER}


@pytest.fixture(scope="session")
def float32_answers(
    checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[int, Answers]:
    """By tensor-parallel size. Every batch is asked twice, the second time with its prefixes cached.

    A card's attention takes no float32, so this needs the emulator and its option.
    """
    jobs = [job(name, checkpoints[name], 2, "float32", size) for size, name in RUNS]
    results: dict[int, Answers] = {}
    for (size, name), answers in zip(
        RUNS, run(jobs, tmp_path_factory.mktemp("float32"), ON_EMULATOR_WITH_FLOAT32), strict=True
    ):
        results.setdefault(size, {})[name] = answers
    return results


@pytest.fixture(scope="session")
def bfloat16_answers(
    checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[int, Answers]:
    """By tensor-parallel size."""
    sizes = (1, 2)
    names = FULL_ATTENTION_MODELS
    jobs = [job(name, checkpoints[name], 1, "bfloat16", size) for size in sizes for name in names]
    answers = iter(run(jobs, tmp_path_factory.mktemp("bfloat16")))
    return {size: {name: next(answers) for name in names} for size in sizes}


@pytest.fixture(scope="session")
def pipeline_answers(
    checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> list[list[Answer]]:
    """An engine of two pipeline stages, which share the model's three layers; every batch asked twice."""
    jobs = [job("llama", checkpoints["llama"], 2, "float32", 1, stages=2)]
    (answers,) = run(jobs, tmp_path_factory.mktemp("pipeline"), ON_EMULATOR_WITH_FLOAT32)
    return answers


def job(name: str, folder: Path, times: int, dtype: str, size: int, stages: int = 1) -> Job:
    """Ask an engine of tensor-parallel size `size` all prompts of the model, `times` times."""
    options = {
        "dtype": dtype,
        "tensor_parallel_size": size,
        "pipeline_parallel_size": stages,
        "max_model_len": 384,
        "max_num_batched_tokens": MAX_BATCHED_TOKENS,
        "max_num_seqs": 8,
        "kv_cache_memory_bytes": cache_bytes_of(name),
        "block_size": block_size_of(name),
    }
    return Job(str(folder), options, [prompts_of(name)] * times, NUM_NEW_TOKENS)


def run(jobs: Sequence[Job], folder: Path, launcher: Sequence[str] = ()) -> Iterator[list[list[Answer]]]:
    """Run the jobs in a process of their own, started through `launcher`; what it printed is in the error."""
    (folder / "jobs.json").write_text(json.dumps([asdict(job) for job in jobs]))
    done = subprocess.run(
        [
            sys.executable,
            *launcher,
            Path(__file__).with_name("generate.py"),
            folder / "jobs.json",
            folder / "results.json",
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-8000:]
    for batches in json.loads((folder / "results.json").read_text()):
        yield [[Answer(**answer) for answer in batch] for batch in batches]
