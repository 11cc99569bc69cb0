# SPDX-License-Identifier: Apache-2.0
"""Jobs in, results out, and no job lost without a word."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import pytest

from vllm_ascend.errors import ReadFailed, ReadUnsettled
from vllm_ascend.kv_transfer.reader import ReaderPool, Result, SideBySide
from vllm_ascend.kv_transfer.transport import Copies, Region, Session


def nothing() -> None:
    pass


def take(pool: ReaderPool[Result], count: int, patience_s: float = 5) -> list[Result]:
    """As the engine does: look again and again, never wait inside."""
    taken: list[Result] = []
    deadline = time.monotonic() + patience_s
    while len(taken) < count and time.monotonic() < deadline:
        taken += pool.take_finished()
    return taken


def result(value: int) -> int:
    return value


def test_every_job_ends_in_one_result():
    pool: ReaderPool[int] = ReaderPool(3, nothing)
    for value in range(50):
        pool.submit(partial(result, value))
    assert sorted(take(pool, 50)) == list(range(50))
    assert pool.take_finished() == []
    pool.close()


def test_taking_does_not_wait_for_a_running_job():
    pool: ReaderPool[int] = ReaderPool(1, nothing)
    gate = threading.Event()

    def slow() -> int:
        gate.wait()
        return 1

    pool.submit(slow)
    assert pool.take_finished() == []
    gate.set()
    assert take(pool, 1) == [1]
    pool.close()


def test_no_more_jobs_run_at_once_than_there_are_threads_and_each_thread_is_entered_once():
    entered: list[str] = []
    running, most, lock = 0, 0, threading.Lock()

    def job() -> int:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        time.sleep(0.01)
        with lock:
            running -= 1
        return 0

    pool: ReaderPool[int] = ReaderPool(2, lambda: entered.append(threading.current_thread().name))
    for number in range(10):
        pool.submit(job, peer=number)
    take(pool, 10)
    pool.close()
    assert most == 2
    assert len(entered) == len(set(entered)) == 2


def test_what_a_job_did_not_foresee_is_raised_where_results_are_taken():
    pool: ReaderPool[int] = ReaderPool(1, nothing)

    def broken() -> int:
        raise ZeroDivisionError("not foreseen")

    pool.submit(broken)
    with pytest.raises(ZeroDivisionError, match="not foreseen"):
        take(pool, 1)
    pool.close()


def test_closing_waits_for_the_running_job_and_drops_the_waiting_ones():
    pool: ReaderPool[int] = ReaderPool(1, nothing)
    done: list[int] = []

    def job(value: int) -> Callable[[], int]:
        def run() -> int:
            time.sleep(0.05)
            done.append(value)
            return value

        return run

    for value in range(5):
        pool.submit(job(value))
    pool.close()
    pool.close()
    assert 1 <= len(done) < 5


def test_a_peer_that_hangs_with_many_jobs_leaves_a_thread_for_another():
    pool: ReaderPool[str] = ReaderPool(2, nothing)
    gate = threading.Event()

    def hanging() -> str:
        gate.wait()
        return "hanging"

    for _ in range(5):
        pool.submit(hanging, peer="hanging")
    for _ in range(3):
        pool.submit(partial(str, "lively"), peer="lively")
    assert take(pool, 3) == ["lively"] * 3
    gate.set()
    assert take(pool, 5) == ["hanging"] * 5
    pool.close()


def test_a_small_job_overtakes_a_large_one_that_waits():
    pool: ReaderPool[str] = ReaderPool(1, nothing)
    gate = threading.Event()
    pool.submit(lambda: str(gate.wait()))
    pool.submit(partial(str, "large"), size=100)
    pool.submit(partial(str, "small"), size=1)
    gate.set()
    assert take(pool, 3) == ["True", "small", "large"]
    pool.close()


def test_a_job_without_a_result_is_none():
    pool: ReaderPool[str] = ReaderPool(1, nothing)
    # What a job submits runs after it.
    pool.submit(lambda: pool.submit(partial(str, "second")))
    assert take(pool, 1) == ["second"]
    pool.close()


class Gates:
    """A transport whose reads wait for the gate of their source, if it has one."""

    def __init__(self, **gates: threading.Event | threading.Barrier) -> None:
        self.gates = gates
        self.read_from: list[str] = []
        self.failing: dict[str, ReadFailed] = {}

    @property
    def session(self) -> Session:
        return Session("here")

    def register(self, regions: Sequence[Region]) -> None:
        pass

    def read(self, peer: Session, copies: Copies) -> None:
        if (gate := self.gates.get(peer)) is not None:
            gate.wait(5)
        self.read_from.append(peer)
        if peer in self.failing:
            raise self.failing[peer]

    def close(self) -> None:
        pass


NOTHING = Copies(*(np.empty(0, dtype=np.int64) for _ in range(3)))


def reads_of(*sources: str) -> list[tuple[Session, Copies]]:
    return [(Session(source), NOTHING) for source in sources]


def test_the_sources_of_a_request_are_read_at_the_same_time():
    # Nobody passes the barrier before all three are in flight.
    barrier = threading.Barrier(3)
    transport = Gates(a=barrier, b=barrier, c=barrier)
    sources = SideBySide(transport, 2, nothing)
    sources.read_all(reads_of("a", "b", "c"))
    assert sorted(transport.read_from) == ["a", "b", "c"]
    sources.close()


def test_a_request_goes_on_alone_where_all_helpers_hang():
    gate = threading.Event()
    transport = Gates(hanging=gate)
    sources = SideBySide(transport, 1, nothing)
    held = threading.Thread(target=sources.read_all, args=(reads_of("first", "hanging"),))
    held.start()
    while "first" not in transport.read_from:
        time.sleep(0.001)
    sources.read_all(reads_of("a", "b", "c"))
    assert transport.read_from[1:] == ["a", "c", "b"]
    gate.set()
    held.join(5)
    sources.close()


def test_what_was_begun_goes_on_while_nobody_waits_for_it():
    gate = threading.Event()
    transport = Gates(b=gate)
    sources = SideBySide(transport, 2, nothing)
    wait = sources.begin(reads_of("a", "b"))
    while transport.read_from != ["a"]:
        time.sleep(0.001)
    gate.set()
    wait()
    assert transport.read_from == ["a", "b"]
    sources.close()


def test_what_was_begun_is_read_by_who_waits_for_it_where_all_helpers_hang():
    gate = threading.Event()
    transport = Gates(hanging=gate)
    sources = SideBySide(transport, 1, nothing)
    hanging, ours = sources.begin(reads_of("hanging")), sources.begin(reads_of("a", "b"))
    ours()
    assert transport.read_from == ["b", "a"]
    gate.set()
    hanging()
    sources.close()


def test_who_waits_learns_of_a_failure_of_what_was_begun():
    transport = Gates()
    transport.failing = {"bad": ReadFailed("the cable is cut")}
    sources = SideBySide(transport, 1, nothing)
    wait = sources.begin(reads_of("a", "bad"))
    with pytest.raises(ReadFailed, match="cable"):
        wait()
    sources.close()


def test_a_source_that_fails_ends_the_read_when_no_other_writes_any_more():
    gate, settled = threading.Event(), threading.Event()
    transport = Gates(slow=gate)
    transport.failing = {
        "bad": ReadFailed("the cable is cut"),
        "slow": ReadUnsettled("nothing came", settled.is_set),
    }
    sources = SideBySide(transport, 1, nothing)
    failures: list[ReadFailed] = []

    def read() -> None:
        try:
            sources.read_all(reads_of("bad", "slow", "never begun"))
        except ReadFailed as failure:
            failures.append(failure)

    reading = threading.Thread(target=read)
    reading.start()
    reading.join(0.05)
    assert failures == []
    gate.set()
    reading.join(5)
    (failure,) = failures
    assert str(failure) == "the cable is cut"
    assert isinstance(failure, ReadUnsettled)
    assert not failure.settled()
    settled.set()
    assert failure.settled()
    assert "never begun" not in transport.read_from
    sources.close()
