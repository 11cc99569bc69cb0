# SPDX-License-Identifier: Apache-2.0
"""The threads that run reads: jobs in, results out.

The engine's thread submits and takes; it never waits. Peers take turns: a free thread goes to the peer that
has the fewest, so that one which hangs with many jobs delays another's next job by one of its own at the
most, and every wait of a job has an end. A job ends in a result, which may be a failure that it foresaw. What
it did not foresee is raised again in the engine's thread, so that no request waits for ever for a job that
died.
"""

from __future__ import annotations

import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import Generic, TypeVar

from vllm_ascend.kv_transfer.transport import Copies, Session, Transport

Result = TypeVar("Result")


class ReaderPool(Generic[Result]):
    """A bounded number of threads. All methods are for the engine's thread."""

    def __init__(self, num_threads: int, enter_thread: Callable[[], None]) -> None:
        """`enter_thread` runs once in each thread before its first job."""
        self._threads = ThreadPoolExecutor(num_threads, "kv-reader", initializer=enter_thread)
        self._turns: _Turns[Result] = _Turns()
        self._finished: SimpleQueue[Future[Result]] = SimpleQueue()

    def submit(self, job: Callable[[], Result], peer: Hashable = None) -> None:
        """Run `job` when it is the turn of `peer`; jobs of one peer begin in the order of submission."""
        self._turns.add(peer, job)
        self._threads.submit(self._turns.run_next).add_done_callback(self._finished.put)

    def take_finished(self) -> list[Result]:
        """The results since the last call. Raises what a job raised."""
        results = []
        while True:
            try:
                results.append(self._finished.get_nowait().result())
            except Empty:
                return results

    def close(self) -> None:
        """Wait for running jobs, drop waiting ones. May be called twice."""
        self._threads.shutdown(wait=True, cancel_futures=True)


class _Turns(Generic[Result]):
    """Jobs that wait, by peer, and how many of each peer run."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._waiting: dict[Hashable, deque[Callable[[], Result]]] = {}
        self._running: Counter[Hashable] = Counter()

    def add(self, peer: Hashable, job: Callable[[], Result]) -> None:
        with self._lock:
            self._waiting.setdefault(peer, deque()).append(job)

    def run_next(self) -> Result:
        """Run the job whose turn it is; there must be one."""
        peer, job = self._take()
        try:
            return job()
        finally:
            with self._lock:
                self._running[peer] -= 1
                self._running += Counter()  # forgets peers of which nothing runs

    def _take(self) -> tuple[Hashable, Callable[[], Result]]:
        with self._lock:
            peer = min(self._waiting, key=self._running.__getitem__)
            jobs = self._waiting.pop(peer)
            job = jobs.popleft()
            if jobs:
                self._waiting[peer] = jobs  # at the end of the queue of peers
            self._running[peer] += 1
            return peer, job


@dataclass
class Stopwatch:
    """Milliseconds since the last lap, on the monotonic clock."""

    _since_s: float

    @classmethod
    def started(cls) -> Stopwatch:
        return cls(time.monotonic())

    def lap_ms(self) -> float:
        now_s = time.monotonic()
        since_s, self._since_s = self._since_s, now_s
        return (now_s - since_s) * 1000


def read_all(transport: Transport, reads: Sequence[tuple[Session, Copies]]) -> None:
    """Read from one source after the other. Raises ReadFailed at the first that fails."""
    for session, copies in reads:
        transport.read(session, copies)
