# SPDX-License-Identifier: Apache-2.0
"""Laws of a plan, over every valid pair of engines (pairs.py), on real memory.

States move between equal TP sizes, from pages padded in one way to pages padded in another.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from unit.kv_transfer.pairs import (
    HEAD_BYTES,
    LAYERS,
    NUM_SLOTS,
    UNTOUCHED,
    Cache,
    Transfer,
    caches_of,
    plans,
    slots_of,
    transfers,
)

from vllm_ascend.attention.cache_layout import PageLayout
from vllm_ascend.kv_transfer.blocks import Runs, neighbours
from vllm_ascend.kv_transfer.cover import prove_cover
from vllm_ascend.kv_transfer.plan import RankMemory, plan_pair, share_positions
from vllm_ascend.kv_transfer.topology import Span
from vllm_ascend.kv_transfer.transport import Address, Copies, InProcessTransport, Region, Session


def regrouped(cache: Cache, runs: Runs, shares: int) -> np.ndarray:
    """What a regroup has to do, written with plain indexing."""
    if shares == 1:
        return cache.bytes
    result = cache.bytes.copy()
    layers, num_pages, halves, tokens, heads, head_bytes = result.shape
    pieces = cache.bytes.reshape(layers, num_pages * shares, halves, tokens, heads // shares, head_bytes)
    pages = runs.in_pages(tokens)
    for page, positions in zip(pages.local(), share_positions(pages, shares), strict=True):
        result[:, page] = np.concatenate([pieces[:, position] for position in positions], axis=3)
    return result


def with_layout(transfer: Transfer, head_major: bool) -> Transfer:
    """The same, with this layout on both sides."""
    prefill, decode = (replace(side, head_major=head_major) for side in (transfer.prefill, transfer.decode))
    return replace(transfer, prefill=prefill, decode=decode)


def joinable(copies: Copies, apart_bytes: int, base: int) -> int:
    """How many ranges go on where another of the same layer or block ends, at both ends."""
    order = np.argsort(copies.local)
    local, remote, num_bytes = copies.local[order], copies.remote[order], copies.num_bytes[order]
    place = (local - base) // apart_bytes
    goes_on = (np.diff(local) == num_bytes[:-1]) & (np.diff(remote) == num_bytes[:-1])
    return int((goes_on & (np.diff(place) == 0)).sum())


@settings(deadline=None)
@given(transfers(), st.integers(1, 4))
def test_every_decode_rank_gets_its_slice_of_the_reference_and_nothing_else_changes(transfer, longest):
    shape = (NUM_SLOTS, LAYERS, transfer.planes, transfer.num_kv_heads, HEAD_BYTES)
    reference = np.random.default_rng(0).integers(0, 200, shape, dtype=np.uint8)
    prefill = caches_of(transfer.prefill, transfer)
    for cache in prefill:
        cache.bytes[cache.at(range(NUM_SLOTS))] = cache.part_of(reference)
    cluster = {Session(str(place)): [cache.region] for place, cache in enumerate(prefill)}
    runs = transfer.runs(longest)
    for decode, plan in plans(transfer, prefill):
        copies = plan.copies(runs)
        prove_cover(decode.memory, runs, [part for _, part in copies])
        expected = decode.bytes.copy()
        pulled = reference[slots_of(transfer.remote, transfer.pulled())]
        expected[decode.at(slots_of(transfer.local, transfer.pulled()))] = decode.part_of(pulled)

        transport = InProcessTransport(Session("decode"), {**cluster, Session("decode"): [decode.region]})
        for source, part in copies:
            transport.read(Session(str(source)), part)

        assert np.array_equal(regrouped(decode, runs, plan.shares), expected)


@settings(deadline=None)
@given(transfers(), st.integers(1, 4))
def test_every_wanted_byte_is_written_once_and_no_other(transfer, longest):
    for decode, plan in plans(transfer, caches_of(transfer.prefill, transfer)):
        written = np.zeros(decode.raw.nbytes, dtype=int)
        for _, part in plan.copies(transfer.runs(longest)):
            for start, num_bytes in zip(part.local - decode.region.address, part.num_bytes, strict=True):
                written[start : start + num_bytes] += 1
        wanted = np.zeros(decode.raw.shape, dtype=int)
        decode.in_order(wanted)[decode.at(slots_of(transfer.local, transfer.pulled()))] = 1
        assert np.array_equal(written, wanted.reshape(-1))


@settings(deadline=None)
@given(transfers())
def test_no_two_ranges_could_be_one(transfer):
    for decode, plan in plans(transfer, caches_of(transfer.prefill, transfer)):
        for _, part in plan.copies(transfer.runs()):
            assert joinable(part, decode.apart_bytes, decode.region.address) == 0


@settings(deadline=None)
@given(transfers())
def test_where_prefill_ranks_hold_no_unwanted_head_a_range_covers_a_whole_run(transfer):
    transfer = with_layout(transfer, head_major=False)
    assume(transfer.prefill.tp_size % transfer.decode.tp_size == 0)
    assume(transfer.prefill.page_size == transfer.decode.page_size)
    runs = transfer.runs()
    for decode, plan in plans(transfer, caches_of(transfer.prefill, transfer)):
        num_ranges = sum(len(copies) for _, copies in plan.copies(runs))
        assert num_ranges == len(runs) * plan.shares * len(decode.memory.layers)


@settings(deadline=None)
@given(st.data(), st.sampled_from([1, 2, 3, 4]), st.booleans(), st.integers(1, 64))
def test_states_arrive_whole_from_pages_padded_in_any_way(data, tp_size, copied, num_bytes):
    cut = st.integers(0, LAYERS)
    prefill, decode = (
        [
            StateCache(0 if copied else rank, stage, num_bytes, padding)
            for stage in (Span(0, at), Span(at, LAYERS))
            if len(stage)
            for rank in range(tp_size)
        ]
        for at, padding in ((data.draw(cut), data.draw(st.integers(0, 40))) for _ in range(2))
    )
    # Nobody wrote what pads the source's pages, so it must not come along.
    for cache in prefill:
        cache.bytes[:, :, :num_bytes] = np.random.default_rng(cache.part).integers(
            0, 200, (LAYERS, StateCache.NUM_PAGES, num_bytes), dtype=np.uint8
        )[cache.layers.start : cache.layers.stop]
    there, here = (data.draw(st.integers(0, StateCache.NUM_PAGES - 1)) for _ in range(2))
    runs = neighbours(np.array([there]), np.array([here]), size=1, longest=1)
    cluster = {Session(str(place)): [cache.region] for place, cache in enumerate(prefill)}
    for cache in decode:
        plan = plan_pair(cache.memory, [other.memory for other in prefill], turn=0)
        copies = plan.copies(runs)
        prove_cover(cache.memory, runs, [part for _, part in copies])
        expected = cache.bytes.copy()
        for other in prefill:
            for layer in range(LAYERS):
                if other.part == cache.part and layer in other and layer in cache:
                    source = other.bytes[layer - other.layers.start, there, :num_bytes]
                    expected[layer - cache.layers.start, here, :num_bytes] = source
        transport = InProcessTransport(Session("decode"), {**cluster, Session("decode"): [cache.region]})
        for rank, part in copies:
            transport.read(Session(str(rank)), part)
        assert np.array_equal(cache.bytes, expected)


class StateCache:
    """One rank's states, empty: bytes [layer, page, byte]."""

    NUM_PAGES = 4

    def __init__(self, part: int, layers: Span, num_bytes: int, padding_bytes: int) -> None:
        page = PageLayout(1, 1, num_bytes, itemsize_bytes=1, planes=1, padding_bytes=padding_bytes)
        self.part, self.layers = part, layers
        shape = (len(layers), self.NUM_PAGES, num_bytes + padding_bytes)
        self.bytes = np.full(shape, UNTOUCHED, dtype=np.uint8)
        base = self.bytes.ctypes.data
        self.region = Region(Address(base), self.bytes.nbytes)
        names = tuple(f"layer.{layer}" for layer in range(layers.start, layers.stop))
        addresses = tuple(Address(base + i * self.bytes[0].nbytes) for i in range(len(layers)))
        self.memory = RankMemory(Span(part, part + 1), page, self.NUM_PAGES, names, addresses)

    def __contains__(self, layer: int) -> bool:
        return self.layers.start <= layer < self.layers.stop


@settings(deadline=None)
@given(transfers())
def test_head_major_a_range_covers_a_block_for_any_two_sizes(transfer):
    transfer = with_layout(transfer, head_major=True)
    assume(transfer.prefill.page_size == transfer.decode.page_size)
    assume(transfer.prefill.stages == transfer.decode.stages)
    runs = transfer.runs()
    for _, plan in plans(transfer, caches_of(transfer.prefill, transfer)):
        num_blocks = runs.total // transfer.decode.page_size
        assert [len(copies) for _, copies in plan.copies(runs)] == [num_blocks] * len(plan.sources)
