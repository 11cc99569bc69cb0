# SPDX-License-Identifier: Apache-2.0
"""Which blocks to pull, and which lie next to each other on both sides."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_ascend.kv_transfer.blocks import blocks_to_pull, kernel_blocks, neighbours
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
def test_blocks_to_pull(cached, prompt, expected):
    span = blocks_to_pull(Span(cached, prompt), block_size=128)
    assert (span.start, span.stop) == expected


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
    runs = neighbours(np.array(remote, dtype=np.int64), np.array(local, dtype=np.int64), longest)
    assert list(zip(runs.remote_start, runs.local_start, runs.length, strict=True)) == expected


def test_kernel_blocks_of_a_split_block_are_its_neighbours_in_token_order():
    assert kernel_blocks([5, 2], per_block=4).tolist() == [20, 21, 22, 23, 8, 9, 10, 11]


@given(
    st.lists(st.tuples(st.integers(0, 40), st.integers(0, 40)), max_size=40, unique_by=lambda pair: pair[1]),
    st.integers(1, 10),
)
def test_runs_list_the_same_pairs(pairs, longest):
    remote = np.array([pair[0] for pair in pairs], dtype=np.int64)
    local = np.array([pair[1] for pair in pairs], dtype=np.int64)
    runs = neighbours(remote, local, longest)
    listed = zip(runs.remote_blocks().tolist(), runs.local_blocks().tolist(), strict=True)
    assert sorted(listed) == sorted(pairs)
    assert all(length <= longest for length in runs.length)
