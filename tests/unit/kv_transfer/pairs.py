# SPDX-License-Identifier: Apache-2.0
"""Every valid pair of engines, on real memory, for laws of what is read: test_plan_laws, test_convert_laws.

Valid is what vLLM allows: a TP size divides the KV heads or is a multiple of them, so two sizes need not
divide one another; layers are split among pipeline stages anywhere; blocks, and the pages that attention cuts
them into, have any size; a page has K and V or latent rows, of all heads or of one; of a sliding window only
the end is wanted.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from hypothesis import strategies as st

from vllm_ascend.attention.cache_layout import HeadMajor, PageLayout
from vllm_ascend.kv_transfer.blocks import Blocks, Runs, runs_of, tokens_seen
from vllm_ascend.kv_transfer.plan import PairPlan, RankMemory, plan_pair
from vllm_ascend.kv_transfer.topology import Span, turns_of
from vllm_ascend.kv_transfer.transport import Address, Region

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
    head_major: bool

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
def transfers(draw: st.DrawFn, converting: bool = False) -> Transfer:
    """`converting`: rows of single heads are scattered, in an engine that stages parts of rows."""
    planes = 2 if converting else draw(st.sampled_from([2, 2, 1]))
    num_kv_heads = draw(st.sampled_from([2, 3, 4, 6, 8, 12] if converting else [1, 2, 3, 4, 6, 8, 12]))
    num_kv_heads = num_kv_heads if planes == 2 else 1
    cuts = st.lists(st.integers(1, LAYERS - 1), unique=True).map(lambda at: [0, *sorted(at), LAYERS])
    stages = cuts.map(lambda at: tuple(Span(*ends) for ends in itertools.pairwise(at)))
    tp_sizes = [n for n in range(1, 17) if num_kv_heads % n == 0 or n % num_kv_heads == 0]
    sides = list(itertools.product(tp_sizes, (False, True)))
    kinds = [
        (prefill, decode)
        for prefill, decode in itertools.product(sides, repeat=2)
        if _converts(num_kv_heads, prefill, decode, staged_parts=converting) == converting
    ]
    # Up to two pages per block, which divide the slots.
    page_sizes, pages = st.sampled_from([1, 2, 3, 4, 6]), st.integers(1, 2)
    prefill, decode = (
        Sizes(tp_size, draw(stages), draw(page_sizes), draw(pages), head_major)
        for tp_size, head_major in draw(st.sampled_from(kinds))
    )
    stop = draw(st.integers(1, NUM_SLOTS - 1))
    start = draw(st.integers(0, (stop - 1) // decode.block_size)) * decode.block_size
    remote_ids, local_ids = (
        draw(st.permutations(range(NUM_SLOTS // side.block_size)))[: -(-stop // side.block_size)]
        for side in (prefill, decode)
    )
    tokens = tokens_seen(Span(start, stop), draw(st.none() | st.integers(2, NUM_SLOTS)))
    request = draw(st.integers(0, 5))
    return Transfer(num_kv_heads, prefill, decode, tokens, remote_ids, local_ids, request, planes)


def _converts(
    num_kv_heads: int, prefill: tuple[int, bool], decode: tuple[int, bool], staged_parts: bool
) -> bool:
    """Whether rows are scattered between engines of these TP sizes, head-major or not."""
    there, here = (max(1, num_kv_heads // tp_size) for tp_size, _ in (prefill, decode))
    match prefill[1], decode[1]:
        case False, True:
            return there > 1
        case True, False:
            return here > 1
        case False, False:
            return staged_parts and here % there != 0
        case _:
            return False


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
            sizes.head_major,
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


def plans(
    transfer: Transfer, prefill: Sequence[Cache], staged_parts: bool = False
) -> Iterator[tuple[Cache, PairPlan]]:
    """Every decode rank's empty cache, and its plan for the request."""
    tp_size = transfer.decode.tp_size
    for place, decode in enumerate(caches_of(transfer.decode, transfer)):
        turns = turns_of(place % tp_size, tp_size, transfer.num_kv_heads)
        turn = next(itertools.islice(turns, transfer.request, None))
        yield decode, plan_pair(decode.memory, [cache.memory for cache in prefill], turn, staged_parts)
