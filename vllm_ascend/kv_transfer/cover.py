# SPDX-License-Identifier: Apache-2.0
"""The proof, before anything moves, that ranges write every wanted byte exactly once and nothing else.

It is given the ranges themselves, whatever plan made them: they lie inside what is wanted, none overlaps
another, and they sum to as many bytes. For that they are sorted.

Layers that lie apart are mostly read alike. Where every layer's ranges are those of the first layer, moved
by as much as the layer lies behind it, the proof for the first is one for all, and a comparison takes the
place of sorting them all.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from vllm_ascend.attention.cache_layout import PageLayout
from vllm_ascend.errors import ReadFailed
from vllm_ascend.kv_transfer.blocks import Runs
from vllm_ascend.kv_transfer.plan import RankMemory, joined, page_starts
from vllm_ascend.kv_transfer.transport import Copies

Ints = npt.NDArray[np.int64]


def prove_cover(local: RankMemory, runs: Runs, copies: Sequence[Copies]) -> None:
    """Raise ReadFailed unless `copies` write each byte of the runs' tokens once, in each layer of `local`."""
    bases = page_starts(local, local.layers, local.heads)
    wanted = _wanted_of_pages(local.page, runs) if local.page.apart is None else None
    if wanted is None:
        wanted_start, num_bytes = _wanted_apart(local.page, bases, runs)
    elif _lie_apart(bases, *wanted) and all(_repeats(part, bases) for part in copies):
        wanted_start, num_bytes = wanted[0] + bases[0], wanted[1]
        copies = [_of_first_layer(part, len(bases)) for part in copies]
    else:
        wanted_start = np.add.outer(np.sort(bases), wanted[0]).reshape(-1)
        num_bytes = np.tile(wanted[1], len(bases))
    wanted_stop = wanted_start + num_bytes

    start = np.concatenate([part.local for part in copies])
    order = np.argsort(start, kind="stable")
    start = start[order]
    stop = start + np.concatenate([part.num_bytes for part in copies])[order]
    holder = np.searchsorted(wanted_start, start, side="right") - 1
    inside = (holder >= 0) & (stop > start) & (stop <= wanted_stop[holder])
    disjoint = start[1:] >= stop[:-1]
    complete = int((stop - start).sum()) == int((wanted_stop - wanted_start).sum())
    distinct = wanted_start[1:] >= wanted_stop[:-1]
    if not (inside.all() and disjoint.all() and complete and distinct.all()):
        raise ReadFailed(
            f"the plan for {runs.total} tokens of {len(local.layers)} layers does not write every byte "
            f"exactly once (inside: {inside.all()}, disjoint: {disjoint.all()}, complete: {complete}, "
            f"blocks distinct: {distinct.all()}); nothing was read"
        )


def _lie_apart(bases: Ints, start: Ints, num_bytes: Ints) -> bool:
    """Whether what is wanted of a layer, `start` bytes behind its page 0, ends before any of the next is."""
    reach = int((start + num_bytes).max() - start.min()) if len(start) else 0
    return bool((np.diff(np.sort(bases)) >= reach).all())


def _repeats(part: Copies, bases: Ints) -> bool:
    """Whether the ranges are the first layer's and, layer after layer, the same, moved as `bases` are."""
    if len(part) % len(bases):
        return False
    start, num_bytes = (array.reshape(len(bases), -1) for array in (part.local, part.num_bytes))
    moved = np.add.outer(bases - bases[0], start[0])
    return bool(np.array_equal(start, moved) and (num_bytes == num_bytes[0]).all())


def _of_first_layer(part: Copies, num_layers: int) -> Copies:
    first = slice(len(part) // num_layers)
    return Copies(part.remote[first], part.local[first], part.num_bytes[first])


def _wanted_of_pages(page: PageLayout, runs: Runs) -> tuple[Ints, Ints]:
    """Start and length, in bytes from page 0, of what `runs` fill in a layer; ascending, neighbours joined.

    Runs are whole pages, or lie within one: then its planes are apart.
    """
    first, *others = page.row_offsets(runs.local_start)
    num_bytes = runs.length * page.row_bytes
    parts = runs.length % page.block_size != 0
    start = np.concatenate((first, *(plane[parts] for plane in others)))
    of_first = np.where(parts, 1, page.planes) * num_bytes
    of_others = np.tile(num_bytes[parts], len(others))
    _, start, num_bytes = joined(start, start, np.concatenate((of_first, of_others)))
    return start, num_bytes


def _wanted_apart(page: PageLayout, bases: Ints, runs: Runs) -> tuple[Ints, Ints]:
    """Start and length of what `runs` fill in head-major pages, of all layers and heads; ascending."""
    if (runs.length % page.block_size).any():
        offset, num_bytes = _wanted_of_pages(page, runs)
        start = np.add.outer(bases, offset).reshape(-1)
        return joined(start, start, np.tile(num_bytes, len(bases)))[1:]
    # One strip, unless other layers lie among these.
    _, bases, strip_bytes = joined(bases, bases, np.full(len(bases), page.page_bytes))
    offset = runs.in_pages(page.block_size).local() * page.block_stride_bytes
    start = np.add.outer(offset, bases).reshape(-1)
    return joined(start, start, np.tile(strip_bytes, len(offset)))[1:]
