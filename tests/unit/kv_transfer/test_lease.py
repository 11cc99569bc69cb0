# SPDX-License-Identifier: Apache-2.0
"""How long prefill keeps blocks: renewals, readers, ends. Time is a number given by the test."""

from __future__ import annotations

import threading

import pytest

from vllm_ascend.kv_transfer.lease import LeaseTable


def freed(leases: LeaseTable, now_s: float) -> tuple[set[str], set[str]]:
    taken = leases.take_freed(now_s)
    return set(taken.read), set(taken.expired)


def test_blocks_are_held_until_the_last_of_the_announced_readers_is_done():
    leases = LeaseTable()
    leases.grant("a", seconds=30, now_s=0)
    assert leases.done("a", "decode/0", num_readers=2)
    assert freed(leases, 1) == (set(), set())
    assert leases.done("a", "decode/1", num_readers=2)
    assert freed(leases, 1) == ({"a"}, set())
    assert len(leases) == 0


def test_a_lease_that_nobody_renews_ends_and_is_reported_once():
    leases = LeaseTable()
    leases.grant("a", seconds=30, now_s=0)
    assert freed(leases, 29.9) == (set(), set())
    assert freed(leases, 30) == (set(), {"a"})
    assert freed(leases, 31) == (set(), set())


def test_a_renewal_starts_the_lease_anew():
    leases = LeaseTable()
    leases.grant("a", seconds=30, now_s=0)
    assert leases.renew(["a"], now_s=20) == []
    assert freed(leases, 40) == (set(), set())
    assert freed(leases, 50) == (set(), {"a"})


def test_renewing_what_is_gone_says_so():
    leases = LeaseTable()
    leases.grant("a", seconds=30, now_s=0)
    assert leases.renew(["a", "never-heard-of"], now_s=1) == ["never-heard-of"]


def test_a_reader_that_is_done_after_the_end_learns_that_its_lease_did_not_hold():
    leases = LeaseTable()
    leases.grant("a", seconds=30, now_s=0)
    freed(leases, 30)
    assert not leases.done("a", "decode/0", num_readers=1)


def test_a_lease_past_its_end_holds_until_its_blocks_are_given_away():
    leases = LeaseTable()
    leases.grant("a", seconds=30, now_s=0)
    assert leases.done("a", "decode/0", num_readers=1)
    assert freed(leases, 100) == ({"a"}, set())


def test_saying_done_twice_counts_once():
    leases = LeaseTable()
    leases.grant("a", seconds=30, now_s=0)
    assert leases.done("a", "decode/0", num_readers=2)
    assert leases.done("a", "decode/0", num_readers=2)
    assert freed(leases, 1) == (set(), set())


def test_a_reader_whose_answer_was_lost_gets_the_same_answer_again():
    leases = LeaseTable()
    leases.grant("a", seconds=30, now_s=0)
    leases.done("a", "decode/0", num_readers=1)
    freed(leases, 1)
    assert leases.done("a", "decode/0", num_readers=1)
    assert not leases.done("a", "decode/1", num_readers=1)


def test_a_request_of_the_same_name_starts_with_no_memory_of_the_first():
    leases = LeaseTable()
    leases.grant("a", seconds=30, now_s=0)
    leases.done("a", "decode/0", num_readers=1)
    freed(leases, 1)
    leases.grant("a", seconds=30, now_s=2)
    assert freed(leases, 3) == (set(), set())


def test_an_answer_is_forgotten_after_a_minute():
    leases = LeaseTable()
    leases.grant("a", seconds=30, now_s=0)
    leases.done("a", "decode/0", num_readers=1)
    freed(leases, 1)
    freed(leases, 62)
    assert not leases.done("a", "decode/0", num_readers=1)


def test_decode_may_decline_and_declining_the_unknown_is_harmless():
    leases = LeaseTable()
    leases.grant("a", seconds=30, now_s=0)
    leases.release(["a", "never-heard-of"])
    assert freed(leases, 1) == ({"a"}, set())


@pytest.mark.parametrize(
    "give_back",
    [
        pytest.param(lambda leases: leases.release(["a"]), id="released"),
        pytest.param(lambda leases: leases.done("a", "reader", 1), id="read"),
    ],
)
def test_waiting_for_a_release_ends_with_it(give_back):
    leases = LeaseTable()
    leases.grant("a", seconds=30, now_s=0)
    waiting = threading.Thread(target=leases.await_release, args=(60,))
    waiting.start()
    give_back(leases)
    waiting.join(timeout=10)
    assert not waiting.is_alive()


def test_waiting_ends_at_once_when_nothing_is_held_and_in_time_when_nothing_is_released():
    leases = LeaseTable()
    leases.await_release(longest_s=60)
    leases.grant("a", seconds=30, now_s=0)
    leases.await_release(longest_s=0.01)
    assert len(leases) == 1
