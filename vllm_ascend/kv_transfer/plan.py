# SPDX-License-Identifier: Apache-2.0
"""Which bytes to read from which rank: the product of three intersections, heads x layers x tokens.

A pair of engines is planned once (`plan_pair`): for this rank's heads and layers, which prefill ranks to read
and how a page of theirs maps into a page of ours. A request then costs what its blocks cost
(`PairPlan.copies`): NumPy spreads the page's mapping over its layers and its runs of neighbouring blocks.

How a page maps depends on the heads that are wanted of a rank.

  All that it stores, every source gives equally many, and a page holds as many tokens there as here: its
  pages move whole, a run of n pages as one range per layer. With one source that is all. With S sources the
  run's n local pages are cut into S shares, and share s receives the n (smaller) pages of source s, in
  source order:

      local pages of a run   [ source 0: page, page, page ][ source 1: page, page, page ]

  so that no other memory is needed; afterwards `regroup` puts the heads of each token side by side.

  Otherwise, and where the rows of a share are too small for the operators that regroup: K and V of each token
  are read to where they belong, a range for each, or for as many as lie in a row on both sides. Nothing is
  regrouped.

Head-major pages (cache_layout.py) are simpler. Where a block holds as many tokens there as here, the heads
that a rank gives are one strip of each of its blocks over all layers, and one strip of ours: a range for each
block and source, for any two sizes. A strip is cut where layers are on different pipeline stages. Where
blocks differ, K and V of each head are read to where they belong, as far as they lie in a row on both sides.
The same goes for pages of which one side's are head-major and the other's hold one head, such as latents.

Otherwise, where one side is head-major and the other is not, nothing larger than K of one token and head lies
in a row on both: the read is no list of ranges, and goes through staging memory (see `convert`). So do parts
of rows, token-major on both sides, if the engine stages what it regroups.

Layers that differ in shape, or lie in KV cache groups with blocks of their own, are planned apart. Recurrent
state is planned like rows: its parts for heads, its pages for tokens, and what pads them is left out.

Before anything moves, `cover` proves that every wanted byte is written exactly once, and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import assert_never

import numpy as np
import numpy.typing as npt

from vllm_ascend.attention.cache_layout import OPERATOR_ROW_BYTES, PageLayout
from vllm_ascend.errors import ReadFailed, TopologyError
from vllm_ascend.kv_transfer.blocks import Runs
from vllm_ascend.kv_transfer.topology import HeadRead, Span, plan_head_reads
from vllm_ascend.kv_transfer.transport import Address, Copies

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class RankMemory:
    """The KV cache of one rank: what it holds and where that begins."""

    heads: Span
    """The KV heads it stores, numbered over the whole model."""
    page: PageLayout
    num_blocks: int
    """Blocks of attention in every layer."""
    layers: tuple[str, ...]
    """Names of the layers that it stores."""
    addresses: tuple[Address, ...]
    """Where block 0 of each of these layers begins, head-major the page of its first head."""


@dataclass(frozen=True)
class WholePages:
    """A rank's pages as they are, into share `share` of every run."""

    share: int


@dataclass(frozen=True)
class Rows:
    """`num_bytes` of K and of V of each token, from an offset in the remote row to one in the local row."""

    remote_offset: int
    local_offset: int
    num_bytes: int


@dataclass(frozen=True)
class Strips:
    """Ranges of each block that are neither cut nor rearranged, one for each of the source's bases."""

    num_bytes: Ints


@dataclass(frozen=True)
class Scattered:
    """`heads` of each token, numbered over the whole model: each row of one head to its own place."""

    heads: Span


@dataclass(frozen=True)
class Source:
    """What one prefill rank contributes, for every block of a request."""

    prefill_rank: int
    mapping: WholePages | Rows | Strips | Scattered
    remote: RankMemory
    remote_bases: Ints
    """What is read of block 0 at the prefill rank: where each layer begins, or page, or strip."""
    local_bases: Ints
    """Where the same begins here; of rows that are scattered, where each layer does."""


@dataclass(frozen=True)
class PairPlan:
    """How this rank reads from one prefill engine. Made once, used for every request."""

    local: RankMemory
    sources: tuple[Source, ...]
    shares: int
    """Into how many shares a run's pages are cut. 1: every byte arrives where it belongs."""

    @property
    def converts(self) -> bool:
        """Whether single rows are scattered: there are no `copies` then."""
        return any(isinstance(source.mapping, Scattered) for source in self.sources)

    def copies(self, runs: Runs) -> list[tuple[int, Copies]]:
        """For each source, its prefill rank and the ranges to read for `runs` of tokens.

        Raises ReadFailed if a token lies outside either cache.
        """
        self.check(runs)
        return [(source.prefill_rank, self._copies_from(source, runs)) for source in self.sources]

    def check(self, runs: Runs) -> None:
        """Raise ReadFailed if a token of `runs` lies outside either cache."""
        _check_slots(runs.local_start, runs.length, self.local, "this engine")
        for source in self.sources:
            whose = f"prefill rank {source.prefill_rank}"
            _check_slots(runs.remote_start, runs.length, source.remote, whose)

    def _copies_from(self, source: Source, runs: Runs) -> Copies:
        match source.mapping:
            case WholePages(share):
                return self._pages_into_share(share, source, runs.in_pages(self.local.page.block_size))
            case Rows() as rows:
                return self._rows(rows, source, runs)
            case Strips(num_bytes):
                return self._strips(num_bytes, source, runs.in_pages(self.local.page.block_size).one_by_one())
            case Scattered():
                raise AssertionError("rows that are scattered are read through staging memory")
            case _:
                assert_never(source.mapping)

    def _pages_into_share(self, share: int, source: Source, pages: Runs) -> Copies:
        share_bytes = source.remote.page.page_bytes
        in_remote_layer = pages.remote_start * share_bytes
        in_local_layer = pages.local_start * self.local.page.page_bytes + share * pages.length * share_bytes
        return _in_every_layer(source, in_remote_layer, in_local_layer, pages.length * share_bytes)

    def _rows(self, rows: Rows, source: Source, runs: Runs) -> Copies:
        remote, local = source.remote.page, self.local.page
        # Parts of rows never touch; whole rows do, as far as the run goes and sometimes farther.
        whole = rows.num_bytes == remote.row_bytes == local.row_bytes
        pieces = runs if whole else runs.one_by_one()
        in_remote_layer = (remote.row_offsets(pieces.remote_start) + rows.remote_offset).reshape(-1)
        in_local_layer = (local.row_offsets(pieces.local_start) + rows.local_offset).reshape(-1)
        num_bytes = np.tile(pieces.length * rows.num_bytes, local.planes)
        if whole:
            in_remote_layer, in_local_layer, num_bytes = joined(in_remote_layer, in_local_layer, num_bytes)
        return _in_every_layer(source, in_remote_layer, in_local_layer, num_bytes)

    def _strips(self, num_bytes: Ints, source: Source, blocks: Runs) -> Copies:
        remote, local = (
            np.add.outer(start * memory.page.block_stride_bytes, bases).reshape(-1)
            for start, memory, bases in (
                (blocks.remote_start, source.remote, source.remote_bases),
                (blocks.local_start, self.local, source.local_bases),
            )
        )
        # Neighbouring blocks touch where a strip is all of them, on both sides.
        return Copies(*joined(remote, local, np.tile(num_bytes, len(blocks))))


def plan_pair(
    local: RankMemory, prefill: Sequence[RankMemory], turn: int, staged_parts: bool = False
) -> PairPlan:
    """Plan how the rank that is `local` reads from the ranks of one prefill engine.

    `turn` picks among ranks that store the same heads. `staged_parts`: parts of token-major rows go through
    staging memory. Raises TopologyError if a wanted head or layer is stored nowhere.
    """
    reads = [
        (stage, read)
        for stage in _stages(local, prefill)
        for read in plan_head_reads(local.heads, [prefill[rank].heads for rank in stage], turn)
    ]
    given = [(prefill[stage[read.prefill_rank]], read.heads) for stage, read in reads]
    if (source_of := _source_by_heads(local, given, staged_parts)) is not None:
        sources = [source_of(local, prefill, stage[read.prefill_rank], read.heads) for stage, read in reads]
        return PairPlan(local, tuple(sources), shares=1)
    shares = _equal_shares(local, prefill, reads)
    sources = [_source(local, prefill, stage[read.prefill_rank], read.heads, shares) for stage, read in reads]
    return PairPlan(local, tuple(sources), shares=shares or 1)


def share_positions(pages: Runs, shares: int) -> Ints:
    """Where the shares of each local page landed, as [num_pages, shares], page after page of `pages`.

    Counted in shares of a page: position p of a layer begins p * page_bytes / shares bytes after page 0.
    """
    run_start = np.repeat(pages.local_start, pages.length)
    run_length = np.repeat(pages.length, pages.length)
    first = run_start * shares + pages.local() - run_start
    return first[:, None] + run_length[:, None] * np.arange(shares, dtype=np.int64)


def _stages(local: RankMemory, prefill: Sequence[RankMemory]) -> list[list[int]]:
    """Prefill ranks grouped by the layers that they store; only groups that store a wanted layer."""
    by_layers: dict[tuple[str, ...], list[int]] = {}
    for rank, memory in enumerate(prefill):
        by_layers.setdefault(memory.layers, []).append(rank)
    stages = {layers: ranks for layers, ranks in by_layers.items() if set(layers) & set(local.layers)}
    for layer in local.layers:
        holders = sum(layer in layers for layers in stages)
        if holders != 1:
            raise TopologyError(
                f"layer {layer} is stored by {holders} pipeline stages of the prefill engine instead of one; "
                f"both engines must serve the same model"
            )
    return list(stages.values())


def _source_by_heads(
    local: RankMemory, given: Sequence[tuple[RankMemory, Span]], staged_parts: bool
) -> Callable[[RankMemory, Sequence[RankMemory], int, Span], Source] | None:
    """What makes the sources, if heads are moved one by one; None: heads of a token move side by side.

    `given` are the memories that are read, each with the heads that are wanted of it.
    """
    pages = [local.page, *(memory.page for memory, _ in given)]
    if any(page.apart is not None for page in pages):
        return _source_apart if all(page.row_heads == 1 for page in pages) else _source_scattered
    in_parts = any(memory.heads != heads for memory, heads in given)
    movable = local.page.head_bytes % OPERATOR_ROW_BYTES == 0
    return _source_scattered if staged_parts and in_parts and movable else None


def _equal_shares(
    local: RankMemory, prefill: Sequence[RankMemory], reads: Sequence[tuple[list[int], HeadRead]]
) -> int | None:
    """How many shares a page is cut into; None if pages cannot move whole, or could not be regrouped."""
    remote_pages = [prefill[rank].page for stage, _ in reads for rank in stage]
    if any(page.block_size != local.page.block_size for page in remote_pages):
        return None
    if any(page.padding_bytes for page in (local.page, *remote_pages)):
        return None
    if any(read.heads != prefill[stage[read.prefill_rank]].heads for stage, read in reads):
        return None
    sizes = {len(read.heads) for _, read in reads}
    if len(sizes) > 1:
        return None
    size = sizes.pop()
    movable = size * local.page.head_bytes % OPERATOR_ROW_BYTES == 0
    return len(local.heads) // size if size == len(local.heads) or movable else None


def _source(
    local: RankMemory, prefill: Sequence[RankMemory], rank: int, heads: Span, shares: int | None
) -> Source:
    remote = prefill[rank]
    common = [layer for layer in local.layers if layer in set(remote.layers)]
    mapping: WholePages | Rows = (
        _rows(local, remote, heads)
        if shares is None
        else WholePages((heads.start - local.heads.start) // len(heads))
    )
    return Source(
        rank,
        mapping,
        remote,
        remote_bases=page_starts(remote, common, heads),
        local_bases=page_starts(local, common, heads),
    )


def _source_apart(local: RankMemory, prefill: Sequence[RankMemory], rank: int, heads: Span) -> Source:
    remote = prefill[rank]
    common = [layer for layer in local.layers if layer in set(remote.layers)]
    remote_bases, local_bases = (page_starts(memory, common, heads) for memory in (remote, local))
    if remote.page.block_size != local.page.block_size:
        every_row = Rows(remote_offset=0, local_offset=0, num_bytes=local.page.row_bytes)
        return Source(rank, every_row, remote, remote_bases, local_bases)
    page_bytes = np.full(len(local_bases), local.page.page_bytes)
    remote_bases, local_bases, num_bytes = joined(remote_bases, local_bases, page_bytes)
    return Source(rank, Strips(num_bytes), remote, remote_bases, local_bases)


def _source_scattered(local: RankMemory, prefill: Sequence[RankMemory], rank: int, heads: Span) -> Source:
    if (row_bytes := local.page.head_bytes) % OPERATOR_ROW_BYTES:
        raise TopologyError(
            f"K and V of one token and one head have {row_bytes} bytes, and between different layouts only "
            f"multiples of {OPERATOR_ROW_BYTES} are moved; start both engines with the same kv_cache_layout"
        )
    remote = prefill[rank]
    common = [layer for layer in local.layers if layer in set(remote.layers)]
    remote_bases, local_bases = (_layer_starts(memory, common) for memory in (remote, local))
    return Source(rank, Scattered(heads), remote, remote_bases, local_bases)


def _layer_starts(memory: RankMemory, layers: Sequence[str]) -> Ints:
    """Where block 0 of each layer begins; head-major, the page of its first head."""
    address_of = dict(zip(memory.layers, memory.addresses, strict=True))
    return np.array([address_of[layer] for layer in layers], dtype=np.int64)


def page_starts(memory: RankMemory, layers: Sequence[str], heads: Span) -> Ints:
    """Where block 0 of each layer begins; head-major, each of `heads` of each layer."""
    starts = _layer_starts(memory, layers)
    if memory.page.apart is None:
        return starts
    wanted = heads.relative_to(memory.heads.start)
    by_head = np.arange(wanted.start, wanted.stop, dtype=np.int64) * memory.page.head_stride_bytes
    by_page: Ints = np.add.outer(starts, by_head).reshape(-1)
    return by_page


def _rows(local: RankMemory, remote: RankMemory, heads: Span) -> Rows:
    head_bytes = local.page.head_bytes
    return Rows(
        remote_offset=(heads.start - remote.heads.start) * head_bytes,
        local_offset=(heads.start - local.heads.start) * head_bytes,
        num_bytes=len(heads) * head_bytes,
    )


def joined(remote: Ints, local: Ints, num_bytes: Ints) -> tuple[Ints, Ints, Ints]:
    """The same ranges, ascending in `local`; those that go on where another ends, on both sides, are one."""
    order = np.argsort(local, kind="stable")
    remote, local, num_bytes = remote[order], local[order], num_bytes[order]
    apart = (np.diff(remote) != num_bytes[:-1]) | (np.diff(local) != num_bytes[:-1])
    first = np.flatnonzero(np.concatenate(([True], apart)))
    return remote[first], local[first], np.add.reduceat(num_bytes, first)


def _in_every_layer(source: Source, in_remote_layer: Ints, in_local_layer: Ints, num_bytes: Ints) -> Copies:
    return Copies(
        remote=np.add.outer(source.remote_bases, in_remote_layer).reshape(-1),
        local=np.add.outer(source.local_bases, in_local_layer).reshape(-1),
        num_bytes=np.tile(num_bytes, len(source.local_bases)),
    )


def _check_slots(start: Ints, length: Ints, memory: RankMemory, whose: str) -> None:
    num_slots = memory.num_blocks * memory.page.block_size
    if len(start) and (start.min() < 0 or (start + length).max() > num_slots):
        raise ReadFailed(
            f"slots {start.min()} to {(start + length).max() - 1} were asked of {whose}, "
            f"which has slots 0 to {num_slots - 1}"
        )
