# SPDX-License-Identifier: Apache-2.0
"""Reads through staging memory: how they are cut, and that every byte lands once, where it is looked for."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_ascend.errors import ReadFailed
from vllm_ascend.kv_transfer.transport import Address, Copies
from vllm_ascend.kv_transfer.windows import (
    SharedPages,
    Window,
    copies_into,
    prove_filled,
    windows,
    windows_of_pages,
)


@pytest.mark.parametrize(
    ("num_layers", "num_pages", "part_bytes", "expected"),
    [
        pytest.param(3, 4, 120, [(0, 3, 0, 4)], id="all at once"),
        pytest.param(3, 4, 119, [(0, 2, 0, 4), (2, 3, 0, 4)], id="two layers, then one"),
        pytest.param(
            2, 4, 39, [(0, 1, 0, 3), (0, 1, 3, 4), (1, 2, 0, 3), (1, 2, 3, 4)], id="parts of a layer"
        ),
        pytest.param(1, 2, 10, [(0, 1, 0, 1), (0, 1, 1, 2)], id="a page at a time"),
        pytest.param(2, 0, 10, [], id="nothing to read"),
    ],
)
def test_windows_are_whole_layers_where_they_fit(num_layers, num_pages, part_bytes, expected):
    cut = windows(num_layers, num_pages, page_bytes=10, part_bytes=part_bytes)
    assert [(w.layers.start, w.layers.stop, w.pages.start, w.pages.stop) for w in cut] == expected


@pytest.mark.parametrize(
    ("num_layers", "num_pages", "part_bytes", "expected"),
    [
        pytest.param(3, 4, 120, [(0, 3, 0, 4)], id="all at once"),
        pytest.param(3, 4, 119, [(0, 3, 0, 3), (0, 3, 3, 4)], id="three pages, then one"),
        pytest.param(
            3, 2, 29, [(0, 2, 0, 1), (2, 3, 0, 1), (0, 2, 1, 2), (2, 3, 1, 2)], id="parts of a page"
        ),
        pytest.param(2, 1, 10, [(0, 1, 0, 1), (1, 2, 0, 1)], id="a layer at a time"),
        pytest.param(2, 0, 10, [], id="nothing to read"),
    ],
)
def test_windows_are_all_layers_of_pages_where_they_fit(num_layers, num_pages, part_bytes, expected):
    cut = windows_of_pages(num_layers, num_pages, page_bytes=10, part_bytes=part_bytes)
    assert [(w.layers.start, w.layers.stop, w.pages.start, w.pages.stop) for w in cut] == expected


def test_pages_that_are_neighbours_at_the_prefill_rank_are_one_range():
    """Layers 1 and 2 of 4, pages 7 8 3 of pages 5 7 8 3 9; pieces of 10 bytes, two shares."""
    source = SharedPages(
        0, share=1, piece_bytes=10, bases=np.array([1000, 2000, 3000]), layers=np.array([0, 1, 2])
    )
    window = Window(range(1, 3), range(1, 4))
    copies = copies_into(window, 2, source, np.array([5, 7, 8, 3, 9]), Address(50_000))
    assert list(
        zip(copies.remote.tolist(), copies.local.tolist(), copies.num_bytes.tolist(), strict=True)
    ) == [
        (2070, 50_030, 20),
        (2030, 50_050, 10),
        (3070, 50_090, 20),
        (3030, 50_110, 10),
    ]


@settings(deadline=None)
@given(
    shares=st.integers(1, 4),
    num_layers=st.integers(1, 5),
    remote_pages=st.lists(st.integers(0, 12), min_size=1, max_size=12, unique=True),
    part_pages=st.integers(1, 70),
    piece_bytes=st.sampled_from([8, 24]),
)
def test_every_piece_lands_once_where_it_is_looked_for(
    shares: int, num_layers: int, remote_pages: list[int], part_pages: int, piece_bytes: int
):
    """Sources of two pipeline stages; a byte of theirs is told by its address, which no two share."""
    page_bytes, at = shares * piece_bytes, Address(10_000_000)
    stages = [np.arange(num_layers // 2), np.arange(num_layers // 2, num_layers)]
    sources = [
        SharedPages(0, share, piece_bytes, bases=(layers * shares + share) * 10_000, layers=layers)
        for share in range(shares)
        for layers in stages
    ]
    found = {}
    for window in windows(num_layers, len(remote_pages), page_bytes, part_pages * page_bytes):
        parts = [copies_into(window, shares, source, np.array(remote_pages), at) for source in sources]
        num_bytes = len(window.layers) * len(window.pages) * page_bytes
        prove_filled(at, num_bytes, parts)
        memory = np.full(num_bytes, -1)
        for copies in parts:
            for remote, local, length in zip(copies.remote, copies.local, copies.num_bytes, strict=True):
                memory[local - at : local - at + length] = np.arange(remote, remote + length)
        shape = (len(window.layers), shares, len(window.pages), piece_bytes)
        for (i, share, j), piece in zip(np.ndindex(shape[:3]), memory.reshape(-1, piece_bytes), strict=True):
            found[window.layers[i], share, window.pages[j]] = piece.tolist()
    assert found == {
        (layer, share, n): [
            (layer * shares + share) * 10_000 + page * piece_bytes + k for k in range(piece_bytes)
        ]
        for layer in range(num_layers)
        for share in range(shares)
        for n, page in enumerate(remote_pages)
    }


@pytest.mark.parametrize(
    "ranges",
    [
        pytest.param([(100, 8)], id="too few"),
        pytest.param([(100, 8), (112, 8)], id="a gap"),
        pytest.param([(100, 12), (108, 12)], id="written twice"),
        pytest.param([(96, 8), (104, 16)], id="begins before"),
        pytest.param([(100, 8), (108, 16)], id="goes on after"),
    ],
)
def test_a_plan_that_does_not_fill_its_memory_is_refused(ranges):
    local, num_bytes = np.array(ranges).T
    with pytest.raises(ReadFailed, match="20 bytes of staging memory does not write every byte"):
        prove_filled(Address(100), 20, [Copies(local, local, num_bytes)])
