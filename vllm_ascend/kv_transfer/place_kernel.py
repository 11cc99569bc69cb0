# SPDX-License-Identifier: Apache-2.0
"""Staged pieces of all layers into their pages, in one launch of one Triton kernel.

A page is a row of rows, K of each token and then V, and a row of it is the row of share 0, of share 1, and so
on. A piece is one share's part of a page: the same rows, each shorter. So all that is to be done is to write
row r of the piece of share s to place r * shares + s of the page:

    staged   [layer, page, share]  ->  [rows, piece row]
    layer    [page]                ->  [rows, shares, piece row]

A program moves a tile of rows of one piece: what it reads is one range, what it writes lies at equal
distances. Only bits move, so the type of the elements does not matter.

Imports triton, so this file is imported where the kernel is used and nowhere else. Wants nothing of
torch_npu: it is developed and measured on GPUs (docs/benchmarks.md).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
import triton
import triton.language as tl

Ints = npt.NDArray[np.int64]

ALIGNMENT_BYTES = 16
"""Layers, pieces and their rows begin at multiples of this."""

_WORD = torch.int32
_WORD_BYTES = 4

_TILE_BYTES = 8192
"""What a program moves at a time. On an H100, 4 to 32 KiB differ by 1 %."""

_MOST_PROGRAMS = 65_535
"""triton-ascend starts no more in one launch; with more tiles than that, programs take several."""


class OneLaunch:
    """Moves staged pieces into the pages of layers that are alike."""

    def __init__(self, layers: Sequence[torch.Tensor]) -> None:
        """`layers`: vLLM's views [num_blocks, heads, block_size, 2 * head_size], contiguous, all alike.

        Raises ValueError if one does not begin at a multiple of ALIGNMENT_BYTES.
        """
        self._first = layers[0].view(-1).view(_WORD)
        self._page_bytes = layers[0][0].numel() * layers[0].element_size()
        _, _, block_size, _ = layers[0].shape
        self._rows = 2 * block_size
        start = layers[0].data_ptr()
        distances = [layer.data_ptr() - start for layer in layers]
        if any(distance % ALIGNMENT_BYTES for distance in (start, *distances)):
            raise ValueError(
                f"layers that are regrouped at once must begin at multiples of {ALIGNMENT_BYTES} bytes; "
                f"got {[hex(start + distance) for distance in distances]}; set regroup to 'staged'"
            )
        self._distances = torch.tensor(distances, dtype=torch.int64).to(layers[0].device) // ALIGNMENT_BYTES

    def target(self, pages: Ints, shares: int) -> torch.Tensor:
        """The pages as the kernel wants them."""
        return torch.from_numpy(pages.astype(np.int32)).to(self._first.device)

    def place(self, staged: torch.Tensor, first_layer: int, target: torch.Tensor) -> None:
        """Put `staged` into its layers, which begin with `first_layer`. Returns once it is queued.

        `staged` is [layers, shares, pages, bytes of a piece], int8 and contiguous, on the layers' device;
        `target` was made for its pages and shares.
        """
        num_layers, shares, num_pages, piece_bytes = staged.shape
        assert shares * piece_bytes == self._page_bytes
        row_bytes = piece_bytes // self._rows
        assert row_bytes % ALIGNMENT_BYTES == 0
        row = row_bytes // _WORD_BYTES
        padded_row = triton.next_power_of_2(row)
        tile = max(1, min(triton.next_power_of_2(self._rows), _TILE_BYTES // _WORD_BYTES // padded_row))
        num_tiles = num_layers * num_pages * shares * triton.cdiv(self._rows, tile)
        _place[(min(num_tiles, _MOST_PROGRAMS),)](
            self._first,
            self._distances[first_layer : first_layer + num_layers],
            staged.view(-1).view(_WORD),
            target,
            num_pages,
            num_tiles,
            SHARES=shares,
            ROWS=self._rows,
            ROW=row,
            PADDED_ROW=padded_row,
            TILE=tile,
            UNIT=ALIGNMENT_BYTES // _WORD_BYTES,
            num_warps=8,
        )


@triton.jit  # type: ignore[untyped-decorator]  # triton's decorators have no types for mypy
def _place(
    first_layer: tl.tensor,
    distances: tl.tensor,
    staged: tl.tensor,
    pages: tl.tensor,
    num_pages: tl.tensor,
    num_tiles: tl.tensor,
    SHARES: tl.constexpr,  # noqa: N803  Triton's constants are written so
    ROWS: tl.constexpr,  # noqa: N803
    ROW: tl.constexpr,  # noqa: N803
    PADDED_ROW: tl.constexpr,  # noqa: N803
    TILE: tl.constexpr,  # noqa: N803
    UNIT: tl.constexpr,  # noqa: N803
) -> None:
    tiles_of_piece: tl.constexpr = (ROWS + TILE - 1) // TILE
    for number in range(tl.program_id(0), num_tiles, tl.num_programs(0)):
        # The shares of a tile are neighbours, so that what they write to meets in the cache.
        share = number % SHARES
        tile = number // SHARES % tiles_of_piece
        page_and_layer = number // SHARES // tiles_of_piece
        page = page_and_layer % num_pages
        layer = page_and_layer // num_pages
        piece = (layer * SHARES + share) * num_pages + page

        rows = (tile * TILE + tl.arange(0, TILE))[:, None]
        words = tl.arange(0, PADDED_ROW)[None, :]
        inside = (rows < ROWS) & (words < ROW)
        source = staged + piece.to(tl.int64) * (ROWS * ROW)
        target = first_layer + tl.load(distances + layer) * UNIT
        target += tl.load(pages + page).to(tl.int64) * (SHARES * ROWS * ROW)
        moved = tl.load(source + rows * ROW + words, mask=inside)
        tl.store(target + (rows * SHARES + share) * ROW + words, moved, mask=inside)
