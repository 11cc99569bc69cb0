# SPDX-License-Identifier: Apache-2.0
"""Which blocks to pull, and which lie next to each other on both sides."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_ascend.kv_transfer.blocks import Blocks, neighbours, positions_of, runs_of, state_block, tokens_seen
from vllm_ascend.kv_transfer.topology import Span


@pytest.mark.parametrize(
    ("cached", "prompt", "expected"),
    [
        pytest.param(0, 1, (0, 1), id="one token takes one block"),
        pytest.param(0, 127, (0, 1), id="one token short of a block"),
        pytest.param(0, 128, (0, 1), id="exactly a block"),
        pytest.param(0, 129, (0, 2), id="one token into the second block"),
        pytest.param(256, 512, (2, 4), id="a prefix hit of two blocks leaves the other two"),
        pytest.param(256, 300, (2, 3), id="a prefix hit leaves a partial block"),
        pytest.param(512, 512, (4, 4), id="a hit of the whole prompt leaves nothing"),
    ],
)
def test_positions_of(cached, prompt, expected):
    span = positions_of(Span(cached, prompt), block_size=128)
    assert (span.start, span.stop) == expected


@pytest.mark.parametrize(
    ("tokens", "window", "expected"),
    [
        pytest.param((0, 300), None, (0, 300), id="no window"),
        pytest.param((0, 300), 1000, (0, 300), id="a window that the prompt does not fill"),
        pytest.param((0, 300), 301, (0, 300), id="token 300 sees tokens 0 to 300"),
        pytest.param((0, 300), 300, (1, 300), id="token 300 sees tokens 1 to 300"),
        pytest.param((0, 640), 257, (384, 640), id="token 640 sees tokens 384 to 640, itself among them"),
        pytest.param((512, 640), 257, (512, 640), id="a prefix hit reaches into the window"),
        pytest.param((128, 640), 257, (384, 640), id="a prefix hit ends before the window"),
        pytest.param((0, 640), 1, (640, 640), id="a token that sees itself alone"),
    ],
)
def test_tokens_seen(tokens, window, expected):
    seen = tokens_seen(Span(*tokens), window)
    assert (seen.start, seen.stop) == expected


@pytest.mark.parametrize(
    ("remote", "local", "longest", "expected"),
    [
        pytest.param([], [], 8, [], id="nothing to pull"),
        pytest.param([7], [2], 8, [(7, 2, 1)], id="one block"),
        pytest.param([3, 4, 5], [8, 9, 10], 8, [(3, 8, 3)], id="neighbours on both sides are one run"),
        pytest.param([3, 4, 5], [8, 10, 11], 8, [(3, 8, 1), (4, 10, 2)], id="a gap here starts a new run"),
        pytest.param([3, 5, 6], [8, 9, 10], 8, [(3, 8, 1), (5, 9, 2)], id="a gap there starts a new run"),
        pytest.param([5, 4], [1, 2], 8, [(5, 1, 1), (4, 2, 1)], id="descending on one side: no neighbours"),
        pytest.param([5, 4, 3], [9, 8, 7], 8, [(3, 7, 3)], id="descending on both sides: one run"),
        pytest.param([0, 1, 2], [4, 5, 6], 2, [(0, 4, 2), (2, 6, 1)], id="a long run is cut"),
    ],
)
def test_neighbours(remote, local, longest, expected):
    runs = neighbours(np.array(remote, dtype=np.int64), np.array(local, dtype=np.int64), 1, longest)
    assert list(zip(runs.remote_start, runs.local_start, runs.length, strict=True)) == expected


@pytest.mark.parametrize(
    ("tokens", "remote", "local", "expected"),
    [
        pytest.param(
            (0, 5), Blocks([3, 4], 4, 4), Blocks([7, 8], 4, 4), [(12, 28, 8)], id="pages alike: whole pages"
        ),
        pytest.param(
            (4, 8), Blocks([3, 6], 4, 4), Blocks([7, 9], 4, 4), [(24, 36, 4)], id="behind a prefix hit"
        ),
        pytest.param(
            (0, 8),
            Blocks([5, 2], 4, 2),
            Blocks([1], 8, 2),
            [(20, 8, 4), (8, 12, 4)],
            id="pages alike, blocks cut into two and four",
        ),
        pytest.param(
            (0, 8),
            Blocks([5, 2], 4, 4),
            Blocks([1], 8, 8),
            [(20, 8, 4), (8, 12, 4)],
            id="smaller pages there: a run for each of them",
        ),
        pytest.param(
            (0, 6),
            Blocks([3], 8, 8),
            Blocks([1, 2], 4, 4),
            [(24, 4, 4), (28, 8, 4)],
            id="smaller pages here: a run for each of them, the last one whole",
        ),
        pytest.param(
            (0, 5),
            Blocks([5, 2], 4, 4),
            Blocks([1], 8, 8),
            [(20, 8, 4), (8, 12, 4)],
            id="the last page here stays empty behind the last page there",
        ),
        pytest.param(
            (6, 11),
            Blocks([5, 2, 9], 4, 4),
            Blocks([0, 1], 6, 6),
            [(10, 6, 2), (36, 8, 4)],
            id="neither size divides the other, a prefix hit ends inside a page there",
        ),
        pytest.param(
            (0, 6),
            Blocks([5, 2], 4, 4),
            Blocks([1], 6, 6),
            [(20, 6, 4), (8, 10, 2)],
            id="neither size divides the other, the end is inside a page there",
        ),
    ],
)
def test_runs_of(tokens, remote, local, expected):
    runs = runs_of(Span(*tokens), remote, local, longest=100)
    assert list(zip(runs.remote_start, runs.local_start, runs.length, strict=True)) == expected


@pytest.mark.parametrize(
    ("blocks", "num_tokens", "tokens_per_state", "expected"),
    [
        pytest.param([7], 300, 4096, 7, id="one block for the longest request"),
        pytest.param([0, 5, 8], 33, 16, 8, id="the first token of a block: the state before is still listed"),
        pytest.param([0, 5, 8], 32, 16, 5, id="the last token of a block, the next one is there already"),
        pytest.param([9], 1, 16, 9, id="one token"),
        pytest.param([0, 0], 33, 16, 0, id="no block is listed for the last token"),
    ],
)
def test_the_state_is_in_the_block_of_the_last_token(blocks, num_tokens, tokens_per_state, expected):
    assert state_block(blocks, num_tokens, tokens_per_state) == expected


@given(
    st.lists(st.tuples(st.integers(0, 40), st.integers(0, 40)), max_size=40, unique_by=lambda pair: pair[1]),
    st.integers(1, 10),
)
def test_runs_list_the_same_pairs(pairs, longest):
    remote = np.array([pair[0] for pair in pairs], dtype=np.int64)
    local = np.array([pair[1] for pair in pairs], dtype=np.int64)
    runs = neighbours(remote, local, 1, longest)
    listed = zip(runs.remote().tolist(), runs.local().tolist(), strict=True)
    assert sorted(listed) == sorted(pairs)
    assert all(length <= longest for length in runs.length)
