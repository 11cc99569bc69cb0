# SPDX-License-Identifier: Apache-2.0
"""Jobs in, results out, and no job lost without a word."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from functools import partial

import pytest

from vllm_ascend.kv_transfer.reader import ReaderPool, Result


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
    for _ in range(10):
        pool.submit(job)
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


def test_peers_take_turns_so_that_one_that_hangs_with_many_jobs_delays_another_by_one():
    pool: ReaderPool[str] = ReaderPool(2, nothing)
    begun: list[str] = []
    gates = [threading.Semaphore(0) for _ in range(5)]

    def hanging(number: int) -> str:
        begun.append(f"hanging {number}")
        gates[number].acquire()
        return "hanging"

    def lively() -> str:
        begun.append("lively")
        return "lively"

    for number in range(5):
        pool.submit(partial(hanging, number), peer="hanging")
    for _ in range(3):
        pool.submit(lively, peer="lively")
    assert take(pool, 1, patience_s=0.1) == []
    gates[0].release()
    assert take(pool, 4) == ["hanging", "lively", "lively", "lively"]
    assert begun[:3] == ["hanging 0", "hanging 1", "lively"]
    for gate in gates[1:]:
        gate.release()
    assert len(take(pool, 4)) == 4
    pool.close()
