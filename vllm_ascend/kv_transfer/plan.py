# SPDX-License-Identifier: Apache-2.0
"""Which bytes to read from which rank: the product of three intersections, heads x layers x tokens.

A pair of engines is planned once (`plan_pair`): for this rank's heads and layers, which prefill ranks to read
and how a page of theirs maps into a page of ours. A request then costs what its blocks cost
(`PairPlan.copies`): NumPy spreads the page's mapping over its layers and its runs of neighbouring blocks.

How a page maps depends on the heads that are wanted of a rank.

  All that it stores, and every source gives equally many: its pages move whole, a run of n blocks as one
  range per layer. With one source that is all. With S sources the run's n local pages are cut into S shares,
  and share s receives the n (smaller) pages of source s, in source order:

      local pages of a run   [ source 0: page, page, page ][ source 1: page, page, page ]

  so that no other memory is needed; afterwards `regroup` puts the heads of each token side by side.

  Otherwise, and where the rows of a share are too small for the operators that regroup: each token's K and
  V row is a range of its own, read to where it belongs. Nothing is regrouped.

`prove_cover` checks before anything moves that every wanted byte is written exactly once, and nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import assert_never

import numpy as np
import numpy.typing as npt

from vllm_ascend.attention.cache_layout import OPERATOR_ROW_BYTES, PageLayout
from vllm_ascend.errors import ReadFailed, TopologyError
from vllm_ascend.kv_transfer.blocks import BlockRuns
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
    """Kernel blocks in every layer."""
    layers: tuple[str, ...]
    """Names of the layers that it stores."""
    addresses: tuple[Address, ...]
    """Where block 0 of each of these layers begins."""


@dataclass(frozen=True)
class WholePages:
    """A rank's pages as they are, into share `share` of every run."""

    share: int


@dataclass(frozen=True)
class Rows:
    """Ranges of `num_bytes` each, from offsets in the remote page to offsets in the local one."""

    remote_offsets: Ints
    local_offsets: Ints
    num_bytes: int


@dataclass(frozen=True)
class Source:
    """What one prefill rank contributes, for every block of a request."""

    prefill_rank: int
    mapping: WholePages | Rows
    remote: RankMemory
    remote_bases: Ints
    """Where block 0 begins at the prefill rank, for each layer that is read from it."""
    local_bases: Ints
    """Where block 0 of the same layers begins here."""


@dataclass(frozen=True)
class PairPlan:
    """How this rank reads from one prefill engine. Made once, used for every request."""

    local: RankMemory
    sources: tuple[Source, ...]
    shares: int
    """Into how many shares a run's pages are cut. 1: every byte arrives where it belongs."""

    def copies(self, runs: BlockRuns) -> list[tuple[int, Copies]]:
        """For each source, its prefill rank and the ranges to read.

        Raises ReadFailed if a block lies outside either cache.
        """
        _check_blocks(runs.local_start, runs.length, self.local, "this engine")
        return [(source.prefill_rank, self._copies_from(source, runs)) for source in self.sources]

    def _copies_from(self, source: Source, runs: BlockRuns) -> Copies:
        _check_blocks(runs.remote_start, runs.length, source.remote, f"prefill rank {source.prefill_rank}")
        match source.mapping:
            case WholePages(share):
                return self._runs_into_share(share, source, runs)
            case Rows() as rows:
                return self._rows(rows, source, runs)
            case _:
                assert_never(source.mapping)

    def _runs_into_share(self, share: int, source: Source, runs: BlockRuns) -> Copies:
        share_bytes = source.remote.page.page_bytes
        in_remote_layer = runs.remote_start * share_bytes
        in_local_layer = runs.local_start * self.local.page.page_bytes + share * runs.length * share_bytes
        num_bytes = np.broadcast_to(runs.length * share_bytes, (len(source.remote_bases), len(runs.length)))
        return Copies(
            remote=np.add.outer(source.remote_bases, in_remote_layer).reshape(-1),
            local=np.add.outer(source.local_bases, in_local_layer).reshape(-1),
            num_bytes=num_bytes.reshape(-1),
        )

    def _rows(self, rows: Rows, source: Source, runs: BlockRuns) -> Copies:
        remote_pages = runs.remote_blocks() * source.remote.page.page_bytes
        local_pages = runs.local_blocks() * self.local.page.page_bytes
        in_remote_layer = np.add.outer(remote_pages, rows.remote_offsets)
        in_local_layer = np.add.outer(local_pages, rows.local_offsets)
        remote = np.add.outer(source.remote_bases, in_remote_layer).reshape(-1)
        local = np.add.outer(source.local_bases, in_local_layer).reshape(-1)
        return Copies(remote, local, np.full(len(remote), rows.num_bytes, dtype=np.int64))


def plan_pair(local: RankMemory, prefill: Sequence[RankMemory], turn: int) -> PairPlan:
    """Plan how the rank that is `local` reads from the ranks of one prefill engine.

    `turn` picks among ranks that store the same heads. Raises TopologyError if a wanted head or layer is
    stored nowhere.
    """
    reads = [
        (stage, read)
        for stage in _stages(local, prefill)
        for read in plan_head_reads(local.heads, [prefill[rank].heads for rank in stage], turn)
    ]
    shares = _equal_shares(local, prefill, reads)
    sources = [_source(local, prefill, stage[read.prefill_rank], read.heads, shares) for stage, read in reads]
    return PairPlan(local, tuple(sources), shares=shares or 1)


def share_positions(runs: BlockRuns, shares: int) -> Ints:
    """Where the shares of each local block landed, as [num_blocks, shares], block after block of `runs`.

    Counted in shares of a page: position p of a layer begins p * page_bytes / shares bytes after block 0.
    """
    in_run = np.arange(runs.num_blocks) - np.repeat(np.cumsum(runs.length) - runs.length, runs.length)
    run_start = np.repeat(runs.local_start, runs.length) * shares
    run_length = np.repeat(runs.length, runs.length)
    return (run_start + in_run)[:, None] + run_length[:, None] * np.arange(shares, dtype=np.int64)


def prove_cover(local: RankMemory, runs: BlockRuns, copies: Sequence[Copies]) -> None:
    """Raise ReadFailed unless `copies` write each byte of the runs' local blocks exactly once, in each layer.

    The proof: the ranges lie inside wanted blocks, none overlaps another, and they sum to as many bytes.
    """
    page_bytes = local.page.page_bytes
    wanted = np.zeros(local.num_blocks + 1, dtype=np.int64)
    wanted[runs.local_blocks() + 1] = 1
    num_wanted = np.cumsum(wanted)

    order = np.argsort(np.concatenate([part.local for part in copies]), kind="stable")
    start = np.concatenate([part.local for part in copies])[order]
    stop = start + np.concatenate([part.num_bytes for part in copies])[order]
    bases = np.sort(np.asarray(local.addresses, dtype=np.int64))
    base = bases[np.maximum(np.searchsorted(bases, start, side="right") - 1, 0)]
    first, last = (start - base) // page_bytes, (stop - 1 - base) // page_bytes
    inside = (start >= base) & (stop > start) & (last < local.num_blocks)
    first, last = np.where(inside, first, 0), np.where(inside, last, 0)
    inside &= num_wanted[last + 1] - num_wanted[first] == last - first + 1
    disjoint = start[1:] >= stop[:-1]
    complete = int((stop - start).sum()) == int(num_wanted[-1]) * page_bytes * len(local.addresses)
    distinct = int(num_wanted[-1]) == runs.num_blocks
    if not (inside.all() and disjoint.all() and complete and distinct):
        raise ReadFailed(
            f"the plan for {runs.num_blocks} blocks of {len(local.addresses)} layers does not write every "
            f"byte exactly once (inside: {bool(inside.all())}, disjoint: {bool(disjoint.all())}, "
            f"complete: {complete}, blocks distinct: {distinct}); nothing was read"
        )


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


def _equal_shares(
    local: RankMemory, prefill: Sequence[RankMemory], reads: Sequence[tuple[list[int], HeadRead]]
) -> int | None:
    """How many shares a page is cut into; None if ranks give only part of their heads, or unequally many."""
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
    address_of = dict(zip(remote.layers, remote.addresses, strict=True))
    own_address_of = dict(zip(local.layers, local.addresses, strict=True))
    mapping: WholePages | Rows = (
        _rows(local, remote, heads)
        if shares is None
        else WholePages((heads.start - local.heads.start) // len(heads))
    )
    return Source(
        rank,
        mapping,
        remote,
        remote_bases=np.array([address_of[layer] for layer in common], dtype=np.int64),
        local_bases=np.array([own_address_of[layer] for layer in common], dtype=np.int64),
    )


def _rows(local: RankMemory, remote: RankMemory, heads: Span) -> Rows:
    return Rows(
        remote_offsets=remote.page.row_offsets(heads.relative_to(remote.heads.start).start),
        local_offsets=local.page.row_offsets(heads.relative_to(local.heads.start).start),
        num_bytes=len(heads) * local.page.head_bytes,
    )


def _check_blocks(start: Ints, length: Ints, memory: RankMemory, whose: str) -> None:
    if len(start) and (start.min() < 0 or (start + length).max() > memory.num_blocks):
        raise ReadFailed(
            f"blocks {start.min()} to {(start + length).max() - 1} were asked of {whose}, "
            f"which has blocks 0 to {memory.num_blocks - 1}"
        )
