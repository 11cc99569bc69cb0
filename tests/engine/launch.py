# SPDX-License-Identifier: Apache-2.0
"""Starts the processes in which engines run, see `generate`, and says what these engines have in common."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from engine.ask import Inquiry, Report, report_of
from engine.generate import Answer, Job
from engine.pool import PoolJob

MAX_BATCHED_TOKENS = 96
"""Less than the longer prompts have, so that those are computed in chunks."""

_EMULATOR_WITH_FLOAT32 = ("-m", "vllm_ascend.emulator", "--devices", "2", "--allow-fp32")
ON_EMULATOR_WITH_FLOAT32 = (*_EMULATOR_WITH_FLOAT32, sys.executable)
AT_LESS_COST = (*_EMULATOR_WITH_FLOAT32, "env", "TASK_QUEUE_ENABLE=0", sys.executable)
"""The same without torch_npu's task queue, whose thread looks every microsecond: a fifth less."""

_POLL_S = 0.1
_TESTS = Path(__file__).parents[1]


def job(folder: Path, batches: list[list[list[int]]], num_new_tokens: int, **options: Any) -> Job:
    """Batches for an engine of these and the usual small options."""
    usual = {
        "max_model_len": 384,
        "max_num_batched_tokens": MAX_BATCHED_TOKENS,
        "max_num_seqs": 8,
        "kv_cache_memory_bytes": 32 << 20,
    }
    return Job(str(folder), usual | options, batches, num_new_tokens)


@dataclass(frozen=True)
class _Group:
    """Jobs over the same number of tensor-parallel ranks, and the process of each rank."""

    jobs: list[int]
    """Indices among all jobs."""
    processes: list[subprocess.Popen[bytes]]
    logs: list[Path]
    results: list[Path]


class Running:
    """Processes that run jobs."""

    def __init__(self, groups: Sequence[_Group], num_jobs: int) -> None:
        self._groups = groups
        self._num_jobs = num_jobs
        self._deadline_s = time.monotonic() + 300 + 120 * num_jobs

    def answers(self) -> list[list[list[Answer]]]:
        """Of each job, in the order in which they were given; waits until all are there."""
        return [[[Answer(**answer) for answer in batch] for batch in batches] for batches in self.results()]

    def reports(self) -> list[Report]:
        """As `answers`, of inquiries."""
        return [report_of(result) for result in self.results()]

    def results(self) -> list[Any]:
        """What the processes wrote for each job, in the order in which they were given; waits likewise."""
        self._wait()
        results: list[Any] = [None] * self._num_jobs
        for group in self._groups:
            first, *others = [json.loads(path.read_text()) for path in group.results]
            assert all(other == first for other in others), "the ranks of an engine give different answers"
            for index, result in zip(group.jobs, first, strict=True):
                results[index] = result
        return results

    def _wait(self) -> None:
        """Until all have ended, or one in failure: then what it printed is in the error."""
        while True:
            ended = [
                (process.poll(), log)
                for g in self._groups
                for process, log in zip(g.processes, g.logs, strict=True)
            ]
            for status, log in ended:
                assert not status, log.read_text()[-8000:]
            if all(status == 0 for status, _ in ended):
                return
            late = "\n".join(log.read_text()[-4000:] for status, log in ended if status is None)
            assert time.monotonic() < self._deadline_s, late
            time.sleep(_POLL_S)


@contextmanager
def started(
    jobs: Sequence[Job] | Sequence[Inquiry] | Sequence[PoolJob], folder: Path, launcher: Sequence[str] = ()
) -> Iterator[Running]:
    """The jobs run side by side: those of each tensor-parallel size in processes of their own.

    They are started through `launcher`, and what is left of them ends with the context. Jobs with pipeline
    stages start processes for these themselves, as a server does.
    """
    by_size: dict[int, list[int]] = {}
    for index, each in enumerate(jobs):
        by_size.setdefault(each.options.get("tensor_parallel_size", 1), []).append(index)
    with ExitStack() as stack:
        groups = [
            _start(size, indices, [jobs[i] for i in indices], folder, launcher, stack)
            for size, indices in by_size.items()
        ]
        yield Running(groups, len(jobs))


def run(jobs: Sequence[Job], folder: Path, launcher: Sequence[str] = ()) -> list[list[list[Answer]]]:
    """Start the jobs and wait for their answers."""
    with started(jobs, folder, launcher) as running:
        return running.answers()


def _start(
    size: int,
    indices: list[int],
    jobs: Sequence[Job | Inquiry | PoolJob],
    folder: Path,
    launcher: Sequence[str],
    stack: ExitStack,
) -> _Group:
    if size > 1:
        jobs = [replace(job, port=port) for job, port in zip(jobs, _free_ports(len(jobs)), strict=True)]
    written = folder / f"jobs-{size}.json"
    written.write_text(json.dumps([asdict(job) for job in jobs]))
    group = _Group(indices, [], [], [])
    for rank in range(size):
        log, results = folder / f"log-{size}-{rank}.txt", folder / f"results-{size}-{rank}.json"
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1"}
        process = subprocess.Popen(
            [sys.executable, *launcher, "-m", type(jobs[0]).__module__, written, results],
            stdout=stack.enter_context(log.open("wb")),
            stderr=subprocess.STDOUT,
            env=os.environ
            | {"PYTHONPATH": f"{_TESTS}:{os.environ.get('PYTHONPATH', '')}"}
            | ({name: str(value) for name, value in place.items()} if size > 1 else {}),
        )
        stack.callback(process.wait)
        stack.callback(process.kill)
        group.processes.append(process)
        group.logs.append(log)
        group.results.append(results)
    return group


def _free_ports(number: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(number)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
