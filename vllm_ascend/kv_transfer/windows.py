# SPDX-License-Identifier: Apache-2.0
"""A read through staging memory, cut into windows: what fits into one part of the pool at a time.

A window is some layers of some of the wanted pages. In the part of the pool that takes it, pieces lie in the
order [layer, share, page]: pages of a share side by side, in the order in which they are wanted. So pages
that are neighbours at the prefill rank are one range, wherever they will go here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from vllm_ascend.errors import ReadFailed
from vllm_ascend.kv_transfer.plan import PairPlan, WholePages
from vllm_ascend.kv_transfer.transport import Address, Copies

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Window:
    """Layers and pages that are read together, each as positions in what is wanted."""

    layers: range
    pages: range


@dataclass(frozen=True)
class SharedPages:
    """The pages of one prefill rank, each of them a share of a page here."""

    prefill_rank: int
    share: int
    piece_bytes: int
    """Bytes of its page."""
    bases: Ints
    """Where page 0 begins there, for each layer that is read from it."""
    layers: Ints
    """The positions of these layers here."""


def sources_of(plan: PairPlan) -> list[SharedPages]:
    """The sources of a plan whose pages move whole."""
    layer_at = {address: layer for layer, address in enumerate(plan.local.addresses)}
    sources = []
    for source in plan.sources:
        assert isinstance(source.mapping, WholePages)
        layers = np.array([layer_at[Address(base)] for base in source.local_bases.tolist()], dtype=np.int64)
        piece_bytes = source.remote.page.page_bytes
        share, bases = source.mapping.share, source.remote_bases
        sources.append(SharedPages(source.prefill_rank, share, piece_bytes, bases, layers))
    return sources


def windows(num_layers: int, num_pages: int, page_bytes: int, part_bytes: int) -> Iterator[Window]:
    """Cut `num_layers` x `num_pages` into windows of at most `part_bytes`: whole layers where they fit.

    `page_bytes` is a page here, all shares; `part_bytes` holds one at least.
    """
    for layers, pages in _cut(num_layers, num_pages, page_bytes, part_bytes):
        yield Window(layers, pages)


def windows_of_pages(num_layers: int, num_pages: int, page_bytes: int, part_bytes: int) -> Iterator[Window]:
    """The same, but all layers of a page where they fit. Layers are cut only where one page's do not."""
    for pages, layers in _cut(num_pages, num_layers, page_bytes, part_bytes):
        yield Window(layers, pages)


def _cut(num_rows: int, row_length: int, item_bytes: int, part_bytes: int) -> Iterator[tuple[range, range]]:
    """Rows, and places in them, of `num_rows` rows of `row_length` items: whole rows where they fit."""
    at_once = min(row_length, part_bytes // item_bytes)
    assert at_once > 0 or row_length == 0
    rows_at_once = max(1, part_bytes // (max(1, row_length) * item_bytes))
    for first_row in range(0, num_rows, rows_at_once):
        rows = range(first_row, min(first_row + rows_at_once, num_rows))
        for first in range(0, row_length, max(1, at_once)):
            yield rows, range(first, min(first + at_once, row_length))


def copies_into(window: Window, shares: int, source: SharedPages, remote_pages: Ints, at: Address) -> Copies:
    """What is read from `source` for `window`, into the part of the pool that begins at `at`.

    `remote_pages` are all pages wanted of it, in the order in which they are wanted here.
    """
    pages = remote_pages[window.pages.start : window.pages.stop]
    first = np.flatnonzero(np.diff(pages, prepend=pages[:1] - 2) != 1)
    length = np.diff(first, append=len(pages))
    here = (source.layers >= window.layers.start) & (source.layers < window.layers.stop)
    row_of_pieces = (source.layers[here] - window.layers.start) * shares + source.share
    local = np.add.outer(row_of_pieces * len(pages), first) * source.piece_bytes + at
    remote = np.add.outer(source.bases[here], pages[first] * source.piece_bytes)
    return Copies(remote.reshape(-1), local.reshape(-1), np.tile(length * source.piece_bytes, here.sum()))


def prove_filled(at: Address, num_bytes: int, copies: Sequence[Copies]) -> None:
    """Raise ReadFailed unless `copies` write each of the `num_bytes` from `at` on exactly once, and no other.

    What they leave out would be placed as it was left by a request before.
    """
    start = np.concatenate([part.local for part in copies])
    order = np.argsort(start, kind="stable")
    stop = (start + np.concatenate([part.num_bytes for part in copies]))[order]
    if not np.array_equal(np.append(start[order], at + num_bytes), np.append(at, stop)):
        raise ReadFailed(
            f"the plan for {num_bytes} bytes of staging memory does not write every byte of it exactly once; "
            f"nothing was read"
        )
