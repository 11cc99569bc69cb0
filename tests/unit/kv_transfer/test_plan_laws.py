# SPDX-License-Identifier: Apache-2.0
"""Laws of a plan, over every valid pair of engines, on real memory.

Valid is what vLLM allows: a TP size divides the KV heads or is a multiple of them, so two sizes need not
divide one another; layers are split among pipeline stages anywhere.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from vllm_ascend.attention.cache_layout import PageLayout
from vllm_ascend.kv_transfer.blocks import BlockRuns, neighbours
from vllm_ascend.kv_transfer.plan import PairPlan, RankMemory, plan_pair, prove_cover, share_positions
from vllm_ascend.kv_transfer.topology import Span, turns_of
from vllm_ascend.kv_transfer.transport import Address, Copies, InProcessTransport, Region, Session

HEAD_SIZE, HEAD_BYTES = 16, 32
BLOCK_SIZE, NUM_BLOCKS, LAYERS = 2, 6, 3
UNTOUCHED = 0xEE


@dataclass(frozen=True)
class Sizes:
    """One engine."""

    tp_size: int
    stages: tuple[Span, ...]
    """The layers of each pipeline stage."""


@dataclass(frozen=True)
class Transfer:
    num_kv_heads: int
    prefill: Sizes
    decode: Sizes
    remote_blocks: list[int]
    local_blocks: list[int]
    request: int
    """Requests that went before."""

    def runs(self, longest: int = NUM_BLOCKS) -> BlockRuns:
        return neighbours(np.array(self.remote_blocks), np.array(self.local_blocks), longest)


def heads_of(rank: int, tp_size: int, num_kv_heads: int) -> Span:
    """Written apart from the code under test: vLLM gives each rank equal, consecutive heads, or one copy."""
    if tp_size <= num_kv_heads:
        per_rank = num_kv_heads // tp_size
        return Span(rank * per_rank, (rank + 1) * per_rank)
    head = rank // (tp_size // num_kv_heads)
    return Span(head, head + 1)


@st.composite
def transfers(draw: st.DrawFn) -> Transfer:
    num_kv_heads = draw(st.sampled_from([1, 2, 3, 4, 6, 8, 12]))
    tp_sizes = st.sampled_from([n for n in range(1, 17) if num_kv_heads % n == 0 or n % num_kv_heads == 0])
    cuts = st.lists(st.integers(1, LAYERS - 1), unique=True).map(lambda at: [0, *sorted(at), LAYERS])
    stages = cuts.map(lambda at: tuple(Span(*ends) for ends in itertools.pairwise(at)))
    sizes = st.builds(Sizes, tp_sizes, stages)
    num_blocks = draw(st.integers(1, NUM_BLOCKS))
    ids = st.permutations(range(NUM_BLOCKS))
    return Transfer(
        num_kv_heads,
        draw(sizes),
        draw(sizes),
        draw(ids)[:num_blocks],
        draw(ids)[:num_blocks],
        draw(st.integers(0, 5)),
    )


class Cache:
    """One rank's cache: bytes [layer, block, K/V, token, head, byte] that hold `content`.

    A block that is nobody's follows each layer, so that layers do not touch.
    """

    def __init__(self, heads: Span, layers: Span, content: np.ndarray) -> None:
        page = PageLayout(BLOCK_SIZE, len(heads), HEAD_SIZE, itemsize_bytes=2)
        shape = (len(layers), NUM_BLOCKS + 1, *content.shape[2:])
        self.with_gaps = np.full(shape, UNTOUCHED, dtype=np.uint8)
        self.bytes = self.with_gaps[:, :NUM_BLOCKS]
        self.bytes[:] = content
        self.layer_bytes = (NUM_BLOCKS + 1) * page.page_bytes
        base = self.with_gaps.ctypes.data
        self.region = Region(Address(base), self.with_gaps.nbytes)
        self.memory = RankMemory(
            heads,
            page,
            NUM_BLOCKS,
            tuple(f"layer.{layer}" for layer in range(layers.start, layers.stop)),
            tuple(Address(base + i * self.layer_bytes) for i in range(len(layers))),
        )


def prefill_caches(transfer: Transfer, reference: np.ndarray) -> list[Cache]:
    """Every prefill rank with its part of `reference` [layer, block, K/V, token, head, byte]."""
    return [
        Cache(heads, stage, reference[stage.start : stage.stop, :, :, :, heads.start : heads.stop])
        for stage in transfer.prefill.stages
        for rank in range(transfer.prefill.tp_size)
        for heads in [heads_of(rank, transfer.prefill.tp_size, transfer.num_kv_heads)]
    ]


def decode_ranks(transfer: Transfer) -> Iterator[tuple[Cache, int]]:
    """Every rank of the decode engine, empty, and the turn at which it reads."""
    tp_size, num_kv_heads = transfer.decode.tp_size, transfer.num_kv_heads
    for stage in transfer.decode.stages:
        for rank in range(tp_size):
            heads = heads_of(rank, tp_size, num_kv_heads)
            shape = (len(stage), NUM_BLOCKS, 2, BLOCK_SIZE, len(heads), HEAD_BYTES)
            cache = Cache(heads, stage, np.full(shape, UNTOUCHED, dtype=np.uint8))
            turns = turns_of(rank, tp_size, num_kv_heads)
            yield cache, next(itertools.islice(turns, transfer.request, None))


def regrouped(cache: Cache, runs: BlockRuns, shares: int) -> np.ndarray:
    """What a regroup has to do, written with plain indexing."""
    result = cache.with_gaps.copy()
    layers, pages, halves, tokens, heads, head_bytes = result.shape
    pieces = cache.with_gaps.reshape(layers, pages * shares, halves, tokens, heads // shares, head_bytes)
    for block, positions in zip(runs.local_blocks(), share_positions(runs, shares), strict=True):
        result[:, block] = np.concatenate([pieces[:, position] for position in positions], axis=3)
    return result


def plans(transfer: Transfer, prefill: list[Cache]) -> Iterator[tuple[Cache, PairPlan]]:
    for decode, turn in decode_ranks(transfer):
        yield decode, plan_pair(decode.memory, [cache.memory for cache in prefill], turn)


def reference_of(transfer: Transfer) -> np.ndarray:
    shape = (LAYERS, NUM_BLOCKS, 2, BLOCK_SIZE, transfer.num_kv_heads, HEAD_BYTES)
    return np.random.default_rng(0).integers(0, 200, shape, dtype=np.uint8)


def joinable(copies: Copies, layer_bytes: int, base: int) -> int:
    """How many ranges go on where another of the same layer ends, at both ends."""
    order = np.argsort(copies.local)
    local, remote, num_bytes = copies.local[order], copies.remote[order], copies.num_bytes[order]
    layer = (local - base) // layer_bytes
    goes_on = (np.diff(local) == num_bytes[:-1]) & (np.diff(remote) == num_bytes[:-1])
    return int((goes_on & (np.diff(layer) == 0)).sum())


@settings(deadline=None)
@given(transfers(), st.integers(1, 4))
def test_every_decode_rank_gets_its_slice_of_the_reference_and_nothing_else_changes(transfer, longest):
    reference = reference_of(transfer)
    prefill = prefill_caches(transfer, reference)
    cluster = {Session(str(rank)): [cache.region] for rank, cache in enumerate(prefill)}
    runs = transfer.runs(longest)
    for decode, plan in plans(transfer, prefill):
        copies = plan.copies(runs)
        prove_cover(decode.memory, runs, [part for _, part in copies])
        transport = InProcessTransport(Session("decode"), {**cluster, Session("decode"): [decode.region]})
        for source, part in copies:
            transport.read(Session(str(source)), part)

        heads, layers = decode.memory.heads, [int(name.split(".")[1]) for name in decode.memory.layers]
        expected = np.full_like(decode.with_gaps, UNTOUCHED)
        for own, layer in enumerate(layers):
            pulled = reference[layer, transfer.remote_blocks]
            expected[own, transfer.local_blocks] = pulled[..., heads.start : heads.stop, :]
        assert np.array_equal(regrouped(decode, runs, plan.shares), expected)


@settings(deadline=None)
@given(transfers(), st.integers(1, 4))
def test_every_wanted_byte_is_written_once_and_no_other(transfer, longest):
    runs = transfer.runs(longest)
    for decode, plan in plans(transfer, prefill_caches(transfer, reference_of(transfer))):
        written = np.zeros(decode.with_gaps.nbytes, dtype=int)
        for _, part in plan.copies(runs):
            for start, num_bytes in zip(part.local - decode.region.address, part.num_bytes, strict=True):
                written[start : start + num_bytes] += 1
        wanted = np.zeros(decode.with_gaps.shape, dtype=int)
        wanted[:, transfer.local_blocks] = 1
        assert np.array_equal(written, wanted.reshape(-1))


@settings(deadline=None)
@given(transfers())
def test_no_two_ranges_could_be_one(transfer):
    for decode, plan in plans(transfer, prefill_caches(transfer, reference_of(transfer))):
        for _, part in plan.copies(transfer.runs()):
            assert joinable(part, decode.layer_bytes, decode.region.address) == 0


@settings(deadline=None)
@given(transfers())
def test_where_prefill_ranks_hold_no_unwanted_head_a_range_covers_a_whole_run(transfer):
    assume(transfer.prefill.tp_size % transfer.decode.tp_size == 0)
    runs = transfer.runs()
    for decode, plan in plans(transfer, prefill_caches(transfer, reference_of(transfer))):
        num_ranges = sum(len(copies) for _, copies in plan.copies(runs))
        assert num_ranges == len(runs.length) * plan.shares * len(decode.memory.layers)
