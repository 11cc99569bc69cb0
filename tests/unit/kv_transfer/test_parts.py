# SPDX-License-Identifier: Apache-2.0
"""Parts of a load are taken in their order by one reader, and told of once."""

from __future__ import annotations

from vllm_ascend.kv_transfer.parts import Parts, Stopped

GIVEN_UP = Stopped("its request has ended", None)


def test_one_reader_takes_the_parts_in_their_order():
    parts: Parts[str] = Parts()
    assert [parts.add(part) for part in ("a", "b")] == [True, False]
    assert [parts.take(), parts.take(), parts.take()] == ["a", "b", None]
    # The reader has gone, and the next part needs another.
    assert parts.add("c")
    assert parts.take() == "c"


def test_what_comes_after_the_end_is_dropped():
    parts: Parts[str] = Parts()
    parts.add("a")
    parts.take()
    parts.add("b")
    parts.end()
    assert not parts.add("c")
    assert not parts.stop(GIVEN_UP)


def test_a_load_that_is_stopped_between_two_parts_is_told_of_by_who_stops_it():
    parts: Parts[str] = Parts()
    parts.add("a")
    assert [parts.take(), parts.take()] == ["a", None]
    assert parts.stop(GIVEN_UP)
    assert not parts.stop(GIVEN_UP)
    assert not parts.add("b")


def test_a_load_that_is_stopped_while_it_is_read_is_told_of_by_its_reader():
    parts: Parts[str] = Parts()
    parts.add("a")
    assert parts.take() == "a"
    parts.add("b")
    assert not parts.stop(GIVEN_UP)
    assert parts.take() == GIVEN_UP
