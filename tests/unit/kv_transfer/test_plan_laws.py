# SPDX-License-Identifier: Apache-2.0
"""Laws of a plan, over every valid pair of engines, on real memory.

Valid is what vLLM allows: a TP size divides the KV heads or is a multiple of them, so two sizes need not
divide one another; layers are split among pipeline stages anywhere; blocks, and the pages that attention cuts
them into, have any size; a page has K and V or latent rows, of all heads or of one; of a sliding window only
the end is wanted. States move between equal TP sizes, from pages padded in one way to pages padded in
another.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from vllm_ascend.attention.cache_layout import HeadMajor, PageLayout
from vllm_ascend.kv_transfer.blocks import Blocks, Runs, neighbours, runs_of, tokens_seen
from vllm_ascend.kv_transfer.cover import prove_cover
from vllm_ascend.kv_transfer.plan import PairPlan, RankMemory, plan_pair, share_positions
from vllm_ascend.kv_transfer.topology import Span, turns_of
from vllm_ascend.kv_transfer.transport import Address, Copies, InProcessTransport, Region, Session

HEAD_SIZE, HEAD_BYTES = 16, 32
NUM_SLOTS, LAYERS = 24, 3
UNTOUCHED = 0xEE


@dataclass(frozen=True)
class Sizes:
    """One engine."""

    tp_size: int
    stages: tuple[Span, ...]
    """The layers of each pipeline stage."""
    page_size: int
    pages_per_block: int

    @property
    def block_size(self) -> int:
        return self.page_size * self.pages_per_block


@dataclass(frozen=True)
class Transfer:
    num_kv_heads: int
    prefill: Sizes
    decode: Sizes
    tokens: Span
    remote_ids: list[int]
    local_ids: list[int]
    request: int
    """Requests that went before."""
    planes: int
    """2: K and V. 1: latent rows, which all ranks store."""
    head_major: bool
    """On both sides."""

    @property
    def remote(self) -> Blocks:
        return Blocks(self.remote_ids, self.prefill.block_size, self.prefill.page_size)

    @property
    def local(self) -> Blocks:
        return Blocks(self.local_ids, self.decode.block_size, self.decode.page_size)

    def runs(self, longest: int = NUM_SLOTS) -> Runs:
        return runs_of(self.tokens, self.remote, self.local, longest)

    def pulled(self) -> range:
        """The tokens and what is read around them: up to where pages of both sides could begin and end."""
        common = math.gcd(self.prefill.page_size, self.decode.page_size)
        return range(self.tokens.start // common * common, -(-self.tokens.stop // common) * common)


def heads_of(rank: int, tp_size: int, num_kv_heads: int) -> Span:
    """Written apart from the code under test: vLLM gives each rank equal, consecutive heads, or one copy."""
    if tp_size <= num_kv_heads:
        per_rank = num_kv_heads // tp_size
        return Span(rank * per_rank, (rank + 1) * per_rank)
    head = rank // (tp_size // num_kv_heads)
    return Span(head, head + 1)


@st.composite
def transfers(draw: st.DrawFn) -> Transfer:
    planes = draw(st.sampled_from([2, 2, 1]))
    num_kv_heads = draw(st.sampled_from([1, 2, 3, 4, 6, 8, 12] if planes == 2 else [1]))
    tp_sizes = st.sampled_from([n for n in range(1, 17) if num_kv_heads % n == 0 or n % num_kv_heads == 0])
    cuts = st.lists(st.integers(1, LAYERS - 1), unique=True).map(lambda at: [0, *sorted(at), LAYERS])
    stages = cuts.map(lambda at: tuple(Span(*ends) for ends in itertools.pairwise(at)))
    # Up to two pages per block, which divide the slots.
    sizes = st.builds(Sizes, tp_sizes, stages, st.sampled_from([1, 2, 3, 4, 6]), st.integers(1, 2))
    prefill, decode = draw(sizes), draw(sizes)
    stop = draw(st.integers(1, NUM_SLOTS - 1))
    start = draw(st.integers(0, (stop - 1) // decode.block_size)) * decode.block_size
    remote_ids, local_ids = (
        draw(st.permutations(range(NUM_SLOTS // side.block_size)))[: -(-stop // side.block_size)]
        for side in (prefill, decode)
    )
    tokens = tokens_seen(Span(start, stop), draw(st.none() | st.integers(2, NUM_SLOTS)))
    request = draw(st.integers(0, 5))
    head_major = draw(st.booleans())
    return Transfer(num_kv_heads, prefill, decode, tokens, remote_ids, local_ids, request, planes, head_major)


class Cache:
    """One rank's cache, empty: `bytes` shows `raw` as [layer, block, plane, token, head, byte].

    A page that is nobody's follows each layer, head-major each block, so that they do not touch.
    """

    def __init__(self, heads: Span, layers: Span, page_size: int, planes: int, head_major: bool) -> None:
        page = PageLayout(page_size, len(heads), HEAD_SIZE, itemsize_bytes=2, planes=planes)
        num_blocks = NUM_SLOTS // page_size
        self._shape = (len(layers), num_blocks, planes, page_size, len(heads), HEAD_BYTES)
        self._head_major = head_major
        if head_major:
            head_bytes = len(layers) * page.page_bytes // len(heads)
            block_bytes = len(heads) * head_bytes + page.page_bytes
            page = replace(page, apart=HeadMajor(head_bytes, block_bytes))
            self.raw = np.full((num_blocks, block_bytes), UNTOUCHED, dtype=np.uint8)
            self.apart_bytes, layer_bytes = block_bytes, page.page_bytes
        else:
            self.apart_bytes = layer_bytes = (num_blocks + 1) * page.page_bytes
            self.raw = np.full((len(layers), layer_bytes), UNTOUCHED, dtype=np.uint8)
        self.bytes = self.in_order(self.raw)
        self.layers = layers
        base = self.raw.ctypes.data
        self.region = Region(Address(base), self.raw.nbytes)
        self.memory = RankMemory(
            heads,
            page,
            num_blocks,
            tuple(f"layer.{layer}" for layer in range(layers.start, layers.stop)),
            tuple(Address(base + i * layer_bytes) for i in range(len(layers))),
        )

    def in_order(self, raw: np.ndarray) -> np.ndarray:
        """A view of memory like `raw` without what is nobody's."""
        layers, num_blocks, planes, tokens, heads, head_bytes = self._shape
        used = raw[:, : math.prod(self._shape) // len(raw)]
        if self._head_major:
            return used.reshape(num_blocks, heads, layers, planes, tokens, head_bytes).transpose(
                2, 0, 3, 4, 1, 5
            )
        return used.reshape(self._shape)

    def at(self, slots: Sequence[int]) -> tuple[slice, list[int], slice, list[int]]:
        """What to index `bytes` with to get the tokens in `slots`, as [slot, layer, plane, head, byte]."""
        size = self.memory.page.block_size
        return slice(None), [slot // size for slot in slots], slice(None), [slot % size for slot in slots]

    def part_of(self, reference: np.ndarray) -> np.ndarray:
        """This rank's layers and heads of `reference` [token or slot, layer, plane, head, byte]."""
        layers, heads = self.layers, self.memory.heads
        return reference[:, layers.start : layers.stop, :, heads.start : heads.stop]


def caches_of(sizes: Sizes, transfer: Transfer) -> list[Cache]:
    """Every rank's, stage after stage."""
    return [
        Cache(
            heads_of(rank, sizes.tp_size, transfer.num_kv_heads),
            stage,
            sizes.page_size,
            transfer.planes,
            transfer.head_major,
        )
        for stage in sizes.stages
        for rank in range(sizes.tp_size)
    ]


def slots_of(blocks: Blocks, tokens: Iterable[int]) -> list[int]:
    """Written apart from the code under test."""
    return [
        blocks.ids[token // blocks.block_size] * blocks.block_size + token % blocks.block_size
        for token in tokens
    ]


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


def plans(transfer: Transfer, prefill: Sequence[Cache]) -> Iterator[tuple[Cache, PairPlan]]:
    """Every decode rank's empty cache, and its plan for the request."""
    tp_size = transfer.decode.tp_size
    for place, decode in enumerate(caches_of(transfer.decode, transfer)):
        turns = turns_of(place % tp_size, tp_size, transfer.num_kv_heads)
        turn = next(itertools.islice(turns, transfer.request, None))
        yield decode, plan_pair(decode.memory, [cache.memory for cache in prefill], turn)


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
    assume(transfer.prefill.tp_size % transfer.decode.tp_size == 0)
    assume(transfer.prefill.page_size == transfer.decode.page_size)
    assume(not transfer.head_major)
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
    transfer = replace(transfer, head_major=True)
    assume(transfer.prefill.page_size == transfer.decode.page_size)
    assume(transfer.prefill.stages == transfer.decode.stages)
    runs = transfer.runs()
    for _, plan in plans(transfer, caches_of(transfer.prefill, transfer)):
        num_blocks = runs.total // transfer.decode.page_size
        assert [len(copies) for _, copies in plan.copies(runs)] == [num_blocks] * len(plan.sources)
