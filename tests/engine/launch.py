# SPDX-License-Identifier: Apache-2.0
"""Starts the process in which engines run, see `generate`, and says what engines of tests have in common."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from engine.generate import Answer, Job

MAX_BATCHED_TOKENS = 96
"""Less than the longer prompts have, so that those are computed in chunks."""

ON_EMULATOR_WITH_FLOAT32 = ("-m", "vllm_ascend.emulator", "--devices", "2", "--allow-fp32", sys.executable)


def job(folder: Path, batches: list[list[list[int]]], num_new_tokens: int, **options: Any) -> Job:
    """Batches for an engine of these and the usual small options."""
    usual = {
        "max_model_len": 384,
        "max_num_batched_tokens": MAX_BATCHED_TOKENS,
        "max_num_seqs": 8,
        "kv_cache_memory_bytes": 32 << 20,
    }
    return Job(str(folder), usual | options, batches, num_new_tokens)


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
        timeout=300 + 120 * len(jobs),
        check=False,
    )
    assert done.returncode == 0, done.stdout[-8000:]
    for batches in json.loads((folder / "results.json").read_text()):
        yield [[Answer(**answer) for answer in batch] for batch in batches]
