# SPDX-License-Identifier: Apache-2.0
"""Which part of a growing prompt is asked for next, and the law of all parts together."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_ascend.kv_transfer.growth import Growth
from vllm_ascend.kv_transfer.topology import Span


@pytest.mark.parametrize(
    ("block_size", "asked", "tokens", "expected"),
    [
        pytest.param(16, 0, 15, (0, 0), id="less than a block"),
        pytest.param(16, 0, 16, (0, 16), id="a block"),
        pytest.param(16, 16, 40, (16, 32), id="the whole blocks of what is new"),
        pytest.param(16, 32, 40, (32, 32), id="nothing new"),
        pytest.param(64, 0, 48, (0, 0), id="three blocks there are less than one here"),
        pytest.param(24, 0, 100, (0, 96), id="blocks of both sides end every 48 tokens"),
        pytest.param(16, 80, 500, (80, 99), id="no more than is wanted"),
    ],
)
def test_what_may_be_read_now(block_size: int, asked: int, tokens: int, expected: tuple[int, int]):
    growth = Growth(Span(0, 99), block_size, lease=5, asked=asked)
    now = growth.readable(lease=5, tokens=tokens, remote_block_size=16)
    assert (now.start, now.stop) == expected


def test_under_another_lease_the_load_begins_anew():
    growth = Growth(Span(32, 99), 16, lease=5, asked=80)
    now = growth.readable(lease=6, tokens=64, remote_block_size=16)
    assert (now.start, now.stop) == (32, 64)
    assert growth.after(6, now) == Growth(Span(32, 99), 16, lease=6, asked=64)
    assert growth.rest(lease=6) == Span(32, 99)
    assert growth.rest(lease=5) == Span(80, 99)


@dataclass(frozen=True)
class Story:
    """How a prompt grows: what is told of it, one after the other, as (lease, tokens in memory)."""

    wanted: Span
    block_size: int
    remote_block_size: int
    told: list[tuple[int, int]]


@st.composite
def stories(draw: st.DrawFn) -> Story:
    prompt = draw(st.integers(2, 400))
    start = draw(st.integers(0, prompt - 2))
    stop = draw(st.integers(start + 1, prompt - 1))
    told, lease, tokens = [], 1, 0
    for step in draw(st.lists(st.integers(0, 120), max_size=12)):
        # Nothing new is a preemption.
        lease, tokens = (lease, min(prompt, tokens + step)) if step else (lease + 1, 0)
        told.append((lease, tokens))
    sizes = st.sampled_from([1, 8, 16, 24, 64])
    return Story(Span(start, stop), draw(sizes), draw(sizes), [*told, (lease, prompt)])


@given(stories())
def test_in_the_end_every_wanted_token_was_read_once_under_the_last_lease_and_never_too_early(story: Story):
    growth = Growth.begun(story.wanted, story.block_size)
    parts: list[tuple[int, Span]] = []
    for lease, tokens in story.told[:-1]:
        part = growth.readable(lease, tokens, story.remote_block_size)
        if len(part):
            assert part.stop <= tokens
            ends = part.stop % story.block_size == part.stop % story.remote_block_size == 0
            assert ends or part.stop == story.wanted.stop
            growth = growth.after(lease, part)
            parts.append((lease, part))
    last, _ = story.told[-1]
    parts.append((last, growth.rest(last)))
    read = [token for lease, part in parts if lease == last for token in range(part.start, part.stop)]
    assert read == list(range(story.wanted.start, story.wanted.stop))
    # A reader begins anew where the load does, and nowhere else.
    of_last_lease = [part for lease, part in parts if lease == last]
    assert of_last_lease[0].start == story.wanted.start
