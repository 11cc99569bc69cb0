# SPDX-License-Identifier: Apache-2.0
"""The threads that run reads: jobs in, results out.

The engine's thread submits and takes; it never waits. A job ends in a result, which may be a failure that the
job foresaw. What it did not foresee is raised again in the engine's thread, so that no request waits for ever
for a job that died.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
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
        self._finished: SimpleQueue[Future[Result]] = SimpleQueue()

    def submit(self, job: Callable[[], Result]) -> None:
        """Run `job` when a thread is free, in the order of submission."""
        self._threads.submit(job).add_done_callback(self._finished.put)

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
