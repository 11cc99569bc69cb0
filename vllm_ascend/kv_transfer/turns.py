# SPDX-License-Identifier: Apache-2.0
"""Whose turn it is: which of many waiting jobs a free thread runs next.

Between peers: a peer gets another thread only if more threads are idle than it has already, and of several
peers the one that has the fewest. So of n threads one peer alone gets half, the next half of the rest, and
one that hangs with any number of jobs leaves room for others.

Among the jobs of one peer: the smallest, since it is over soonest and so shortens the wait of most; but one
that others have overtaken `MOST_OVERTAKES` times goes before all of them, so that none waits for ever.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Generic, TypeVar

Job = TypeVar("Job")

MOST_OVERTAKES = 8
"""How often a job may see a later one of its peer begin before it."""


@dataclass
class _Waiting(Generic[Job]):
    job: Job
    size: float
    overtaken: int = 0


class Turns(Generic[Job]):
    """Jobs that wait, by peer, and how many of each peer run. Knows nothing of threads; not thread-safe."""

    def __init__(self, num_threads: int) -> None:
        self._idle = num_threads
        self._waiting: dict[Hashable, list[_Waiting[Job]]] = {}
        self._running: Counter[Hashable] = Counter()

    def add(self, job: Job, peer: Hashable, size: float) -> None:
        """Let `job` of `peer` wait; `size` is in any unit that all jobs share."""
        self._waiting.setdefault(peer, []).append(_Waiting(job, size))

    def take(self) -> tuple[Hashable, Job] | None:
        """The job to begin now, and its peer; None: none may."""
        may_begin = [peer for peer in self._waiting if self._running[peer] < self._idle]
        if not may_begin:
            return None
        # The first of equals: peers that were served stand at the end.
        peer = min(may_begin, key=self._running.__getitem__)
        jobs = self._waiting.pop(peer)
        job = _take_next(jobs)
        if jobs:
            self._waiting[peer] = jobs
        self._running[peer] += 1
        self._idle -= 1
        return peer, job

    def ended(self, peer: Hashable) -> None:
        """A job of `peer` that was taken has ended."""
        self._idle += 1
        self._running[peer] -= 1
        if not self._running[peer]:
            del self._running[peer]


def _take_next(jobs: list[_Waiting[Job]]) -> Job:
    """Remove and return the job that is next; `jobs` are in the order of their arrival."""
    out_of_patience = (at for at, waiting in enumerate(jobs) if waiting.overtaken >= MOST_OVERTAKES)
    smallest = min(range(len(jobs)), key=lambda at: jobs[at].size)
    at = next(out_of_patience, smallest)
    for earlier in jobs[:at]:
        earlier.overtaken += 1
    return jobs.pop(at).job
