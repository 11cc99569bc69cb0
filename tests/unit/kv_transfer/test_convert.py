# SPDX-License-Identifier: Apache-2.0
"""Reads out of pages that are cut otherwise: ranges and rows, in bytes and rows counted by hand."""

from __future__ import annotations

import numpy as np
import pytest

from vllm_ascend.attention.cache_layout import HeadMajor, PageLayout
from vllm_ascend.errors import ReadFailed, TopologyError
from vllm_ascend.kv_transfer.blocks import Runs
from vllm_ascend.kv_transfer.convert import NOWHERE, paged_tokens, stages_of
from vllm_ascend.kv_transfer.plan import RankMemory, plan_pair
from vllm_ascend.kv_transfer.topology import Span
from vllm_ascend.kv_transfer.transport import Address, Copies
from vllm_ascend.kv_transfer.windows import Window

LAYERS = 2


def memory(heads: tuple[int, int], base: int, head_major: bool, head_size: int = 16) -> RankMemory:
    """Eight pages of two tokens and rows of 32 bytes: K and V of a head are 128 bytes."""
    num_heads = heads[1] - heads[0]
    page = PageLayout(block_size=2, num_heads=num_heads, head_size=head_size, itemsize_bytes=2)
    layer_bytes = 8 * page.page_bytes
    if head_major:
        page = page.of_size(2, num_heads, HeadMajor(128 * LAYERS, 128 * LAYERS * num_heads))
        layer_bytes = 128
    addresses = tuple(Address(base + layer * layer_bytes) for layer in range(LAYERS))
    return RankMemory(Span(*heads), page, 8, ("layer.0", "layer.1"), addresses)


def runs(*pieces: tuple[int, int, int]) -> Runs:
    """Of (remote slot, local slot, length)."""
    remote, local, length = np.array(pieces, dtype=np.int64).T
    return Runs(remote, local, length)


def ranges(copies: Copies) -> list[tuple[int, int, int]]:
    return list(zip(copies.remote.tolist(), copies.local.tolist(), copies.num_bytes.tolist(), strict=True))


def test_out_of_token_major_pages_all_heads_are_read_and_the_wanted_ones_kept():
    """Heads 2 and 3 of 0 to 3, tokens 1 to 3 of pages 4 and 5, into slots 7, 2 and 3."""
    plan = plan_pair(memory((2, 4), 10_000, head_major=True), [memory((0, 4), 50_000, head_major=False)], 0)
    (stage,) = stages_of(plan)
    tokens = paged_tokens(runs((9, 7, 1), (10, 2, 2)), page_size=2)
    assert (tokens.pages.tolist(), tokens.slots.tolist()) == ([4, 5], [[NOWHERE, 7], [2, 3]])
    # A page has 512 bytes. Layer 1 begins 4,096 bytes after layer 0; in the part they are side by side.
    ((rank, copies),) = stage.copies(Window(range(2), range(2)), tokens, Address(70_000))
    assert (rank, ranges(copies)) == (0, [(52_048, 70_000, 1024), (56_144, 71_024, 1024)])
    # Here a block has 16 rows of 32 bytes: of each head 4 of layer 0, K K V V, and 4 of layer 1. So K of slot
    # 7 in head 0 is row 3 * 16 + 1, V row 3 * 16 + 3; head 1 follows 8 rows later.
    no = [NOWHERE] * 2
    assert stage.targets(tokens, range(2)).reshape(4, 8).tolist() == [
        [*no, *no, *no, 49, 57],
        [*no, *no, *no, 51, 59],
        [*no, 16, 24, *no, 17, 25],
        [*no, 18, 26, *no, 19, 27],
    ]


def test_out_of_head_major_blocks_the_wanted_heads_are_one_range_over_all_layers():
    """Head 1 of rank 0 and head 2 of rank 1, tokens 0 and 1 of blocks 3 and 6, into slots 4, 5 and 0, 1."""
    prefill = [memory((0, 2), 50_000, head_major=True), memory((2, 4), 60_000, head_major=True)]
    plan = plan_pair(memory((1, 3), 10_000, head_major=False), prefill, 0)
    (stage,) = stages_of(plan)
    tokens = paged_tokens(runs((6, 4, 2), (12, 0, 2)), page_size=2)
    # A block has 512 bytes, a head of it 256: both layers. Rank 1's pieces follow those of rank 0.
    found = stage.copies(Window(range(2), range(2)), tokens, Address(70_000))
    assert [(rank, ranges(copies)) for rank, copies in found] == [
        (0, [(51_792, 70_000, 256), (53_328, 70_256, 256)]),
        (1, [(61_536, 70_512, 256), (63_072, 70_768, 256)]),
    ]
    # Of one layer alone, they begin with its page.
    found = stage.copies(Window(range(1, 2), range(1, 2)), tokens, Address(70_000))
    assert [ranges(copies) for _, copies in found] == [[(53_456, 70_000, 128)], [(63_200, 70_128, 128)]]
    # Here a page has 8 rows, K and then V of two tokens with two heads each: slot 4 begins page 2.
    assert stage.targets(tokens, range(2)).tolist() == [
        *(16, 18, 20, 22, 0, 2, 4, 6),
        *(17, 19, 21, 23, 1, 3, 5, 7),
    ]


def test_heads_of_one_block_that_are_all_wanted_are_one_range():
    plan = plan_pair(memory((0, 2), 10_000, head_major=False), [memory((0, 2), 50_000, head_major=True)], 0)
    (stage,) = stages_of(plan)
    tokens = paged_tokens(runs((6, 4, 2)), page_size=2)
    ((_, copies),) = stage.copies(Window(range(2), range(1)), tokens, Address(70_000))
    assert ranges(copies) == [(51_536, 70_000, 512)]


def test_parts_of_token_major_rows_are_scattered_only_where_they_are_staged():
    local, remote = (memory(heads, 10_000, head_major=False) for heads in ((1, 2), (0, 2)))
    assert not plan_pair(local, [remote], 0).converts
    plan = plan_pair(local, [remote], 0, staged_parts=True)
    assert plan.converts
    (stage,) = stages_of(plan)
    tokens = paged_tokens(runs((6, 4, 2)), page_size=2)
    # Of each token two heads are read, of which the second is kept: K and V of slots 4 and 5, page 2 here.
    assert stage.targets(tokens, range(1)).tolist() == [NOWHERE, 8, NOWHERE, 9, NOWHERE, 10, NOWHERE, 11]
    # Whole rows go as they did.
    assert not plan_pair(remote, [remote], 0, staged_parts=True).converts


@pytest.mark.parametrize(
    "wanted",
    [
        pytest.param(runs((4, 0, 2), (6, 1, 2)), id="two tokens into one slot"),
        pytest.param(runs((4, 0, 2), (5, 4, 2)), id="one token into two slots"),
    ],
)
def test_what_is_wanted_twice_is_not_read(wanted):
    with pytest.raises(ReadFailed, match="of 4 tokens two were to be read from, or into, the same slot"):
        paged_tokens(wanted, page_size=2)


def test_rows_that_operators_do_not_take_are_refused():
    local, remote = (memory((0, 2), 10_000, head_major, head_size=8) for head_major in (True, False))
    with pytest.raises(TopologyError, match=r"one head have 16 bytes, .* of 32 are moved; start both"):
        plan_pair(local, [remote], 0)
