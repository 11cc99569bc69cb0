# SPDX-License-Identifier: Apache-2.0
"""Whose turn it is, without a thread: the order in which jobs begin and end is written out."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from vllm_ascend.kv_transfer.turns import MOST_OVERTAKES, Turns


def taken(turns: Turns[str]) -> Iterator[str]:
    """Every job that may begin now."""
    while (turn := turns.take()) is not None:
        yield turn[1]


@pytest.mark.parametrize(
    ("num_threads", "expected"),
    [
        pytest.param(1, 1, id="one thread serves whoever is there"),
        pytest.param(2, 1, id="of two, one stays for another peer"),
        pytest.param(4, 2, id="of four, two do"),
        pytest.param(7, 4, id="of seven, three do"),
        pytest.param(8, 4, id="of eight, four do"),
    ],
)
def test_one_peer_gets_half_of_the_threads(num_threads, expected):
    turns: Turns[str] = Turns(num_threads)
    for number in range(20):
        turns.add(f"job {number}", "a", size=1)
    assert len(list(taken(turns))) == expected


def test_peers_that_hang_leave_a_thread_for_the_next():
    turns: Turns[str] = Turns(8)
    counts = []
    for peer in "abcd":
        for _ in range(20):
            turns.add(peer, peer, size=1)
        counts.append(len(list(taken(turns))))
    assert counts == [4, 2, 1, 1]


def test_a_peers_share_is_free_again_when_its_job_ends():
    turns: Turns[str] = Turns(3)
    for name in ("a1", "a2", "a3"):
        turns.add(name, "a", size=1)
    turns.add("b1", "b", size=1)
    assert list(taken(turns)) == ["a1", "b1"]
    turns.ended("b")
    assert list(taken(turns)) == ["a2"]
    turns.ended("a")
    assert list(taken(turns)) == ["a3"]


def test_peers_with_equally_many_take_turns():
    turns: Turns[str] = Turns(1)
    for name in ("a1", "b1", "a2", "b2"):
        turns.add(name, name[0], size=1)
    order = []
    while (turn := turns.take()) is not None:
        order.append(turn[1])
        turns.ended(turn[0])
    assert order == ["a1", "b1", "a2", "b2"]


def test_the_smallest_goes_first_and_equals_in_the_order_of_their_arrival():
    turns: Turns[str] = Turns(1)
    for name, size in (("large", 9), ("small", 1), ("middle", 5), ("small too", 1)):
        turns.add(name, "a", size)
    order = []
    while (turn := turns.take()) is not None:
        order.append(turn[1])
        turns.ended("a")
    assert order == ["small", "small too", "middle", "large"]


def test_a_large_job_is_overtaken_so_often_and_no_more():
    turns: Turns[str] = Turns(1)
    turns.add("large", "a", size=100)
    order = []
    for _ in range(MOST_OVERTAKES + 2):
        turns.add("small", "a", size=1)
        order += taken(turns)
        turns.ended("a")
    assert order == ["small"] * MOST_OVERTAKES + ["large", "small"]
