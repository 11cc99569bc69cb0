# SPDX-License-Identifier: Apache-2.0
"""Which bytes are read: hand-written ranges for small pages. `test_plan_laws.py` has the laws."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from vllm_ascend.attention.cache_layout import HeadMajor, PageLayout
from vllm_ascend.errors import ReadFailed, TopologyError
from vllm_ascend.kv_transfer.blocks import Blocks, Runs, runs_of
from vllm_ascend.kv_transfer.cover import prove_cover
from vllm_ascend.kv_transfer.plan import PairPlan, RankMemory, plan_pair, share_positions
from vllm_ascend.kv_transfer.topology import Span
from vllm_ascend.kv_transfer.transport import Address, Copies


def rank_memory(heads: tuple[int, int], base: int, layers: int = 1, head_size: int = 16) -> RankMemory:
    """Eight blocks of two tokens; with 32 bytes per head a page of one head is 128 bytes."""
    page = PageLayout(block_size=2, num_heads=heads[1] - heads[0], head_size=head_size, itemsize_bytes=2)
    return RankMemory(
        heads=Span(*heads),
        page=page,
        num_blocks=8,
        layers=tuple(f"layer.{i}" for i in range(layers)),
        addresses=tuple(Address(base + i * 8 * page.page_bytes) for i in range(layers)),
    )


def pulled(*pairs: tuple[int, int]) -> Runs:
    remote, local = zip(*pairs, strict=True)
    return runs_of(Span(0, 2 * len(pairs)), Blocks(remote, 2, 2), Blocks(local, 2, 2), longest=100)


def ranges(plan: PairPlan, runs: Runs) -> list[tuple[int, int, int, int]]:
    return [
        (rank, int(remote), int(local), int(num_bytes))
        for rank, copies in plan.copies(runs)
        for remote, local, num_bytes in zip(copies.remote, copies.local, copies.num_bytes, strict=True)
    ]


@pytest.mark.parametrize(
    ("local", "prefill", "pairs", "expected"),
    [
        pytest.param(
            rank_memory((0, 2), 10000),
            [rank_memory((0, 2), 50000)],
            [(3, 1)],
            [(0, 50768, 10256, 256)],
            id="same heads, one block: the page of 256 bytes in one range",
        ),
        pytest.param(
            rank_memory((0, 2), 10000),
            [rank_memory((0, 2), 50000)],
            [(3, 1), (4, 2), (6, 3)],
            [(0, 50768, 10256, 512), (0, 51536, 10768, 256)],
            id="same heads: neighbouring blocks are one range",
        ),
        pytest.param(
            rank_memory((0, 2), 10000, layers=2),
            [rank_memory((0, 2), 50000, layers=2)],
            [(0, 0)],
            [(0, 50000, 10000, 256), (0, 52048, 12048, 256)],
            id="same heads, two layers: a range each",
        ),
        pytest.param(
            rank_memory((0, 2), 10000),
            [rank_memory((0, 1), 50000), rank_memory((1, 2), 60000)],
            [(3, 1)],
            [(0, 50384, 10256, 128), (1, 60384, 10384, 128)],
            id="two ranks of one head: each fills half of the page",
        ),
        pytest.param(
            rank_memory((0, 2), 10000),
            [rank_memory((0, 1), 50000), rank_memory((1, 2), 60000)],
            [(3, 1), (4, 2)],
            [(0, 50384, 10256, 256), (1, 60384, 10512, 256)],
            id="two ranks, a run of two blocks: each fills half of the run",
        ),
        pytest.param(
            rank_memory((1, 2), 10000),
            [rank_memory((0, 2), 50000)],
            [(0, 0)],
            [(0, 50032, 10000, 32), (0, 50096, 10032, 32), (0, 50160, 10064, 32), (0, 50224, 10096, 32)],
            id="one head of two: K of each token, then V of each token",
        ),
        pytest.param(
            rank_memory((3, 6), 10000),
            [rank_memory((0, 2), 50000), rank_memory((2, 4), 60000), rank_memory((4, 6), 70000)],
            [(0, 0)],
            [
                *[(1, 60032, 10000, 32), (1, 60096, 10096, 32), (1, 60160, 10192, 32), (1, 60224, 10288, 32)],
                *[(2, 70000, 10032, 64), (2, 70064, 10128, 64), (2, 70128, 10224, 64), (2, 70192, 10320, 64)],
            ],
            id="three ranks to two: rows of one head from one rank and of two from the next",
        ),
        pytest.param(
            rank_memory((0, 2), 10000, head_size=8),
            [rank_memory((0, 1), 50000, head_size=8), rank_memory((1, 2), 60000, head_size=8)],
            [(0, 0)],
            [
                *[(0, 50000, 10000, 16), (0, 50016, 10032, 16), (0, 50032, 10064, 16), (0, 50048, 10096, 16)],
                *[(1, 60000, 10016, 16), (1, 60016, 10048, 16), (1, 60032, 10080, 16), (1, 60048, 10112, 16)],
            ],
            id="rows of 16 bytes, which no operator regroups: read to where they belong",
        ),
    ],
)
def test_ranges(local, prefill, pairs, expected):
    runs = pulled(*pairs)
    plan = plan_pair(local, prefill, turn=0)
    assert ranges(plan, runs) == expected
    prove_cover(local, runs, [copies for _, copies in plan.copies(runs)])


def test_layers_are_read_from_the_stage_that_stores_them():
    local = rank_memory((0, 1), 10000, layers=2)
    first = dataclasses.replace(rank_memory((0, 1), 50000), layers=("layer.0",))
    second = dataclasses.replace(rank_memory((0, 1), 60000), layers=("layer.1",))
    plan = plan_pair(local, [first, second], turn=0)
    assert ranges(plan, pulled((2, 0))) == [(0, 50256, 10000, 128), (1, 60256, 11024, 128)]


def test_shares_of_a_run_land_source_after_source():
    # Local blocks 4, 5 are one run and 9 another; two shares per page.
    assert share_positions(pulled((0, 4), (1, 5), (7, 9)).in_pages(2), shares=2).tolist() == [
        [8, 10],
        [9, 11],
        [18, 19],
    ]


def test_a_layer_that_prefill_does_not_store_is_refused_by_name():
    with pytest.raises(TopologyError, match=r"layer layer\.1 is stored by 0 pipeline stages"):
        plan_pair(rank_memory((0, 1), 10000, layers=2), [rank_memory((0, 1), 50000)], turn=0)


@pytest.mark.parametrize(
    ("pair", "message"),
    [
        pytest.param((8, 0), "slots 16 to 17 were asked of prefill rank 0", id="remote block past the end"),
        pytest.param((-1, 0), "slots -2 to -1 were asked of prefill rank 0", id="negative remote block"),
        pytest.param((0, 8), "slots 16 to 17 were asked of this engine", id="local block past the end"),
    ],
)
def test_blocks_outside_the_cache_are_never_read(pair, message):
    plan = plan_pair(rank_memory((0, 2), 10000), [rank_memory((0, 2), 50000)], turn=0)
    with pytest.raises(ReadFailed, match=message):
        plan.copies(pulled(pair))


@pytest.mark.parametrize(
    ("local_start", "num_bytes", "flaw"),
    [
        pytest.param([10256, 10384], [128, 120], "complete: False", id="a byte is missing"),
        pytest.param([10256, 10320], [128, 128], "disjoint: False", id="a byte is written twice"),
        pytest.param([10256, 10512], [128, 128], "inside: False", id="a byte of another block is written"),
        pytest.param([10128, 10384], [256, 0], "inside: False", id="a range begins in another block"),
    ],
)
def test_a_plan_that_does_not_cover_is_not_run(local_start, num_bytes, flaw):
    copies = Copies(np.zeros(2, np.int64), np.array(local_start), np.array(num_bytes))
    with pytest.raises(ReadFailed, match=flaw):
        prove_cover(rank_memory((0, 2), 10000), pulled((3, 1)), [copies])


@pytest.mark.parametrize(
    ("local_start", "num_bytes", "flaw"),
    [
        pytest.param([10256, 12304], [256, 256], None, id="both layers alike"),
        pytest.param([12304, 10256], [256, 256], None, id="the second first"),
        pytest.param([10256, 12304], [256, 255], "complete: False", id="a byte of the second is missing"),
        pytest.param([10256, 12303], [256, 256], "inside: False", id="the second begins a byte early"),
        pytest.param([10256, 10256], [256, 256], "disjoint: False", id="the first twice"),
        pytest.param([10256], [256], "complete: False", id="the second not at all"),
        pytest.param([10256, 12304, 12432], [256, 128, 128], None, id="the second in two ranges"),
    ],
)
def test_every_layer_is_covered(local_start, num_bytes, flaw):
    """Page 1 of two layers, 2,048 bytes apart."""
    local, runs = rank_memory((0, 2), 10000, layers=2), pulled((3, 1))
    copies = [Copies(np.zeros(len(num_bytes), np.int64), np.array(local_start), np.array(num_bytes))]
    if flaw is None:
        prove_cover(local, runs, copies)
        return
    with pytest.raises(ReadFailed, match=flaw):
        prove_cover(local, runs, copies)


def test_layers_that_lie_over_each_other_are_not_run():
    """Each is read alike, and what is read for one overwrites the other."""
    local = dataclasses.replace(
        rank_memory((0, 2), 10000, layers=2), addresses=(Address(10000), Address(10128))
    )
    copies = Copies(np.zeros(2, np.int64), np.array([10256, 10384]), np.array([256, 256]))
    with pytest.raises(ReadFailed, match="disjoint: False"):
        prove_cover(local, pulled((3, 1)), [copies])


def test_a_block_listed_twice_is_not_run():
    local = rank_memory((0, 2), 10000)
    runs = pulled((3, 1), (5, 1))
    plan = plan_pair(local, [rank_memory((0, 2), 50000)], turn=0)
    with pytest.raises(ReadFailed, match="blocks distinct: False"):
        prove_cover(local, runs, [copies for _, copies in plan.copies(runs)])


def head_major_memory(heads: tuple[int, int], base: int, layers: tuple[int, int] = (0, 3)) -> RankMemory:
    """Eight blocks of two tokens; a page of one head is 128 bytes, a head of a block has one per layer."""
    num_heads, num_layers = heads[1] - heads[0], layers[1] - layers[0]
    apart = HeadMajor(head_stride_bytes=128 * num_layers, block_stride_bytes=128 * num_layers * num_heads)
    return RankMemory(
        heads=Span(*heads),
        page=PageLayout(block_size=2, num_heads=num_heads, head_size=16, itemsize_bytes=2, apart=apart),
        num_blocks=8,
        layers=tuple(f"layer.{i}" for i in range(*layers)),
        addresses=tuple(Address(base + i * 128) for i in range(num_layers)),
    )


@pytest.mark.parametrize(
    ("local", "prefill", "pairs", "expected"),
    [
        pytest.param(
            head_major_memory((0, 2), 10000),
            [head_major_memory((0, 2), 50000)],
            [(3, 1), (4, 2), (6, 3)],
            [(0, 52304, 10768, 1536), (0, 54608, 12304, 768)],
            id="same heads: neighbouring blocks are one range over all layers",
        ),
        pytest.param(
            head_major_memory((0, 2), 10000),
            [head_major_memory((0, 1), 50000), head_major_memory((1, 2), 60000)],
            [(3, 1), (4, 2)],
            [(0, 51152, 10768, 384), (0, 51536, 11536, 384), (1, 61152, 11152, 384), (1, 61536, 11920, 384)],
            id="two ranks of one head: a range for each block and rank",
        ),
        pytest.param(
            head_major_memory((1, 2), 10000),
            [head_major_memory((0, 4), 50000)],
            [(3, 1), (4, 2)],
            [(0, 54992, 10384, 384), (0, 56528, 10768, 384)],
            id="one head of four: a range for each block",
        ),
        pytest.param(
            head_major_memory((1, 3), 10000),
            [head_major_memory((0, 2), 50000), head_major_memory((2, 4), 60000)],
            [(0, 1)],
            [(0, 50384, 10768, 384), (1, 60000, 11152, 384)],
            id="sizes that do not divide one another: a range for each source",
        ),
        pytest.param(
            head_major_memory((0, 2), 10000),
            [head_major_memory((0, 2), 50000, (0, 1)), head_major_memory((0, 2), 60000, (1, 3))],
            [(1, 0)],
            [(0, 50256, 10000, 128), (0, 50384, 10384, 128), (1, 60512, 10128, 256), (1, 60768, 10512, 256)],
            id="two stages: a range for each head and stage",
        ),
    ],
)
def test_head_major_ranges(local, prefill, pairs, expected):
    runs = pulled(*pairs)
    plan = plan_pair(local, prefill, turn=0)
    assert ranges(plan, runs) == expected
    assert plan.shares == 1
    prove_cover(local, runs, [copies for _, copies in plan.copies(runs)])


@pytest.mark.parametrize(
    ("local_start", "num_bytes", "flaw"),
    [
        pytest.param([10768], [760], "complete: False", id="a byte is missing"),
        pytest.param([10768, 11152], [384 + 8, 376], "disjoint: False", id="a byte is written twice"),
        pytest.param(
            [10768 - 384, 11152], [384, 384], "inside: False", id="a byte of another block is written"
        ),
    ],
)
def test_a_head_major_plan_that_does_not_cover_is_not_run(local_start, num_bytes, flaw):
    copies = Copies(np.zeros(len(num_bytes), np.int64), np.array(local_start), np.array(num_bytes))
    with pytest.raises(ReadFailed, match=flaw):
        prove_cover(head_major_memory((0, 2), 10000), pulled((3, 1)), [copies])
