# SPDX-License-Identifier: Apache-2.0
"""The threads that run reads: jobs in, results out.

The engine's thread submits and takes; it never waits. Which job a free thread runs, `turns` decides; every
wait of a job has an end. A job ends in a result, which may be a failure that it foresaw. What it did not
foresee is raised again in the engine's thread, so that no request waits for ever for a job that died.

A job that reads from several sources reads them side by side: one in its own thread, the others in threads
that all jobs share. Where these have no time, it goes on by itself, so it never waits for another job.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from queue import Empty, SimpleQueue
from typing import Generic, TypeVar

from vllm_ascend.errors import ReadFailed, ReadUnsettled
from vllm_ascend.kv_transfer.transport import Copies, Session, Transport
from vllm_ascend.kv_transfer.turns import Turns

Result = TypeVar("Result")

Read = tuple[Session, Copies]
"""What is read from one source."""

Begin = Callable[[Sequence[Read]], Callable[[], None]]
"""Begins to read all. What it returns waits for it, and raises ReadFailed if something could not be read."""

_Helped = list[tuple[Read, Future[ReadFailed | None]]]


class ReaderPool(Generic[Result]):
    """A bounded number of threads. `submit` may be called from any thread, the rest from the engine's."""

    def __init__(self, num_threads: int, enter_thread: Callable[[], None]) -> None:
        """`enter_thread` runs once in each thread before its first job."""
        self._threads = ThreadPoolExecutor(num_threads, "kv-reader", initializer=enter_thread)
        self._lock = threading.Lock()
        self._turns: Turns[Callable[[], Result | None]] = Turns(num_threads)
        self._is_closed = False
        self._finished: SimpleQueue[Future[Result | None]] = SimpleQueue()

    def submit(self, job: Callable[[], Result | None], peer: Hashable = None, size: float = 0) -> None:
        """Run `job` when it is the turn of `peer`, whose smaller jobs go first; None is no result."""
        with self._lock:
            self._turns.add(job, peer, size)
            self._begin()

    def take_finished(self) -> list[Result]:
        """The results since the last call. Raises what a job raised."""
        results: list[Result] = []
        while True:
            try:
                result = self._finished.get_nowait().result()
            except Empty:
                return results
            if result is not None:
                results.append(result)

    def close(self) -> None:
        """Wait for running jobs, drop waiting ones. May be called twice."""
        with self._lock:
            self._is_closed = True
        self._threads.shutdown(wait=True, cancel_futures=True)

    def _begin(self) -> None:
        """Hand over all jobs whose turn it is: no more than there are idle threads."""
        # A job that ends while the pool is closed begins no other.
        while not self._is_closed and (turn := self._turns.take()) is not None:
            self._threads.submit(self._run, *turn).add_done_callback(self._finished.put)

    def _run(self, peer: Hashable, job: Callable[[], Result | None]) -> Result | None:
        try:
            return job()
        finally:
            with self._lock:
                self._turns.ended(peer)
                self._begin()


class SideBySide:
    """Reads from several sources at once, for any number of threads."""

    def __init__(self, transport: Transport, num_helpers: int, enter_thread: Callable[[], None]) -> None:
        """`enter_thread` runs once in each of the `num_helpers` threads before its first read."""
        self._transport = transport
        self._helpers = ThreadPoolExecutor(num_helpers, "kv-source", initializer=enter_thread)

    def read_all(self, reads: Sequence[Read]) -> None:
        """Return when all is read. Raises ReadFailed if something is not; nothing else is begun then.

        It is ReadUnsettled while anything that was begun may still be written.
        """
        helped = self._ask_helpers(reads[1:])
        self._finish([self._failure_of(read) for read in reads[:1]], helped)

    def begin(self, reads: Sequence[Read]) -> Callable[[], None]:
        """Begin to read all. What this returns is to be called once, and ends as `read_all` does."""
        return partial(self._finish, [], self._ask_helpers(reads))

    def close(self) -> None:
        """Wait for running reads. May be called twice."""
        self._helpers.shutdown(wait=True, cancel_futures=True)

    def _ask_helpers(self, reads: Sequence[Read]) -> _Helped:
        return [(read, self._helpers.submit(self._failure_of, read)) for read in reads]

    def _finish(self, failures: list[ReadFailed | None], helped: _Helped) -> None:
        # Helpers begin with the first of them; this thread takes what they have not begun, from the last on.
        for read, future in reversed(helped):
            if future.cancel() and not any(failures):
                failures.append(self._failure_of(read))
        failures += [future.result() for _, future in helped if not future.cancelled()]
        _raise_first([failure for failure in failures if failure is not None])

    def _failure_of(self, read: Read) -> ReadFailed | None:
        try:
            self._transport.read(*read)
        except ReadFailed as failure:
            return failure
        return None


def _raise_first(failures: Sequence[ReadFailed]) -> None:
    unsettled = [failure.settled for failure in failures if isinstance(failure, ReadUnsettled)]
    if unsettled:
        raise ReadUnsettled(str(failures[0]), lambda: all(settled() for settled in unsettled))
    if failures:
        raise failures[0]


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
