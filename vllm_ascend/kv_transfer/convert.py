# SPDX-License-Identifier: Apache-2.0
"""Tokens out of pages that are cut otherwise: what is read in one piece, and where each row of it goes.

A token-major page has the heads of a token side by side, a head-major one the tokens of a head. What both
have in one piece is a row, K or V of one token and head, of a few hundred bytes; a request would be a million
ranges. Token-major pages with heads that this rank does not want are no better: a range for each token. So
whole pages are read into staging memory, as the prefill rank has them, and the rows are put where they belong
from there. In the part of the pool that a window is read into lie,

    token-major there   [layer, source, page]          pages: [K and V, token, head]
    head-major there    [source, page, head, layer]    pages: [K and V, token]

so that pages which are neighbours are one range, and head-major the heads of a block over all layers.

What is read beside the wanted tokens goes nowhere: tokens of the first and the last page and, token-major,
heads of other ranks, since leaving them out would cut each token's row off from the next. A decode rank that
wants half of a prefill rank's heads reads twice what it keeps. Head-major, only wanted heads are read.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from vllm_ascend.errors import ReadFailed
from vllm_ascend.kv_transfer.blocks import Runs, neighbours
from vllm_ascend.kv_transfer.plan import PairPlan, RankMemory, Scattered, Source
from vllm_ascend.kv_transfer.topology import Span
from vllm_ascend.kv_transfer.transport import Address, Copies
from vllm_ascend.kv_transfer.windows import Window, windows, windows_of_pages

Ints = npt.NDArray[np.int64]

NOWHERE = -1
"""Where a row goes that is not wanted."""


@dataclass(frozen=True)
class PagedTokens:
    """The wanted tokens, by the pages that hold them at the prefill rank."""

    pages: Ints
    """These pages, ascending: the order makes the longest ranges."""
    slots: Ints
    """[page, token of it]: the slot that the token has here, or NOWHERE."""


@dataclass(frozen=True)
class Piece:
    """What one prefill rank gives of each page and layer."""

    prefill_rank: int
    remote: RankMemory
    bases: Ints
    """For each layer, where block 0 begins there; head-major, the page of the first head that is read."""
    wanted: Span
    """The heads that are kept, counted from this rank's first."""
    at_head: int
    """The place of the first of them among the heads that are read."""
    num_heads: int
    """How many heads are read."""

    @property
    def num_bytes(self) -> int:
        page = self.remote.page
        return page.planes * page.block_size * self.num_heads * page.head_bytes


@dataclass(frozen=True)
class Stage:
    """Layers of this rank that the same prefill ranks store: those of one pipeline stage."""

    local: RankMemory
    layers: tuple[int, ...]
    """Their positions among this rank's."""
    pieces: tuple[Piece, ...]
    """Together they have each wanted head once. All of one page size and layout."""

    @property
    def page_size(self) -> int:
        """Tokens of a page there."""
        return self.pieces[0].remote.page.block_size

    @property
    def head_major(self) -> bool:
        """Whether the prefill ranks' pages are."""
        return self.pieces[0].remote.page.apart is not None

    @property
    def page_bytes(self) -> int:
        """Bytes that are read of a page and layer, from all ranks."""
        return sum(piece.num_bytes for piece in self.pieces)

    def windows(self, num_pages: int, part_bytes: int) -> Iterator[Window]:
        """What is read at a time, at most `part_bytes`; `layers` are places in this stage's.

        Pages of one layer are neighbours token-major, layers of one page are head-major: these stay together.
        """
        cut = windows_of_pages if self.head_major else windows
        return cut(len(self.layers), num_pages, self.page_bytes, part_bytes)

    def copies(self, window: Window, tokens: PagedTokens, at: Address) -> list[tuple[int, Copies]]:
        """For each piece, its prefill rank and what to read of `window` into the part that begins `at`."""
        read = self._blocks if self.head_major else self._pages
        pages = tokens.pages[window.pages.start : window.pages.stop]
        return [
            (piece.prefill_rank, read(piece, before_bytes, window, pages, at))
            for piece, before_bytes in zip(self.pieces, self.bytes_before(), strict=True)
        ]

    def targets(self, tokens: PagedTokens, pages: range) -> Ints:
        """Where each row of `pages` goes in a layer, in the order in which the layer's rows were read.

        Counted as by `PageLayout.head_rows`, or NOWHERE; the same in every layer. The order is [piece, page,
        K and V, token, head], or head-major, once the layers are apart, [piece, page, head, K and V, token].
        """
        slots = tokens.slots[pages.start : pages.stop]
        rows = self.local.page.head_rows(slots.reshape(-1))
        rows = np.where(slots == NOWHERE, NOWHERE, rows.reshape(*rows.shape[:2], *slots.shape))
        return np.concatenate([self._in_order(piece, rows).reshape(-1) for piece in self.pieces])

    def bytes_before(self) -> list[int]:
        """For each piece, the bytes of a page and layer that come from those before it."""
        ends = np.cumsum([piece.num_bytes for piece in self.pieces])
        return [0, *ends[:-1].tolist()]

    def _in_order(self, piece: Piece, rows: Ints) -> Ints:
        """`rows` [head, plane, page, token] of the piece's heads in the order in which it has them."""
        of_piece = np.full((piece.num_heads, *rows.shape[1:]), NOWHERE, dtype=np.int64)
        kept = slice(piece.at_head, piece.at_head + len(piece.wanted))
        of_piece[kept] = rows[piece.wanted.start : piece.wanted.stop]
        return of_piece.transpose((2, 0, 1, 3) if self.head_major else (2, 1, 3, 0))

    def _pages(self, piece: Piece, before_bytes: int, window: Window, pages: Ints, at: Address) -> Copies:
        runs = neighbours(pages, np.arange(len(pages)), size=1, longest=len(pages))
        layers = np.arange(len(window.layers), dtype=np.int64) * self.page_bytes * len(pages)
        into = at + layers + before_bytes * len(pages)
        bases = piece.bases[window.layers.start : window.layers.stop]
        return Copies(
            remote=np.add.outer(bases, runs.remote_start * piece.num_bytes).reshape(-1),
            local=np.add.outer(into, runs.local_start * piece.num_bytes).reshape(-1),
            num_bytes=np.tile(runs.length * piece.num_bytes, len(bases)),
        )

    def _blocks(self, piece: Piece, before_bytes: int, window: Window, pages: Ints, at: Address) -> Copies:
        page = piece.remote.page
        bases = piece.bases[window.layers.start : window.layers.stop]
        heads = np.arange(piece.num_heads, dtype=np.int64) * page.head_stride_bytes
        of_block = np.add.outer(heads, bases).reshape(-1)
        into = np.arange(len(of_block), dtype=np.int64) * page.page_bytes
        strips = neighbours(of_block, into, size=page.page_bytes, longest=len(of_block))
        blocks = np.arange(len(pages), dtype=np.int64) * len(of_block) * page.page_bytes
        first = at + before_bytes * len(pages) * len(bases)
        return Copies(
            remote=np.add.outer(pages * page.block_stride_bytes, strips.remote_start).reshape(-1),
            local=np.add.outer(first + blocks, strips.local_start).reshape(-1),
            num_bytes=np.tile(strips.length, len(pages)),
        )


def stages_of(plan: PairPlan) -> list[Stage]:
    """The pipeline stages that are read by a plan that converts."""
    layer_at = {address: layer for layer, address in enumerate(plan.local.addresses)}
    pieces: dict[tuple[int, ...], list[Piece]] = {}
    for source in plan.sources:
        assert isinstance(source.mapping, Scattered)
        layers = tuple(layer_at[Address(base)] for base in source.local_bases.tolist())
        pieces.setdefault(layers, []).append(_piece(plan.local, source, source.mapping.heads))
    return [Stage(plan.local, layers, tuple(found)) for layers, found in pieces.items()]


def paged_tokens(runs: Runs, page_size: int) -> PagedTokens:
    """Group `runs` by pages of `page_size` tokens at the prefill rank.

    Raises ReadFailed if a token there, or a slot here, is wanted twice.
    """
    remote, local = runs.remote(), runs.local()
    pages = np.unique(remote // page_size)
    slots = np.full((len(pages), page_size), NOWHERE, dtype=np.int64)
    slots[np.searchsorted(pages, remote // page_size), remote % page_size] = local
    if np.count_nonzero(slots != NOWHERE) < runs.total or len(np.unique(local)) < runs.total:
        raise ReadFailed(
            f"of {runs.total} tokens two were to be read from, or into, the same slot; nothing was read"
        )
    return PagedTokens(pages, slots)


def _piece(local: RankMemory, source: Source, heads: Span) -> Piece:
    remote, wanted = source.remote, heads.relative_to(local.heads.start)
    first = heads.start - remote.heads.start
    if remote.page.apart is None:
        return Piece(source.prefill_rank, remote, source.remote_bases, wanted, first, remote.page.num_heads)
    bases = source.remote_bases + first * remote.page.head_stride_bytes
    return Piece(source.prefill_rank, remote, bases, wanted, at_head=0, num_heads=len(heads))
