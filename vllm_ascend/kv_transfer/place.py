# SPDX-License-Identifier: Apache-2.0
"""Staged pieces into pages: what puts the heads of several sources side by side, in one pass.

Pieces are read into staging memory, not into the cache (see `staging`). A piece is one source's share of a
page, with fewer heads: [K: block_size, share_heads, head_size][V: as many]. Where it belongs, its rows lie
between those of the other shares. Nothing has to be loaded or transposed on the way, since a share's row is
one range on both sides; it has to be written to the right place, once.

There are two ways. `PerLayer` shows the page to torch_npu's operator that stores rows at slots as one of many
short rows, and lets the slots say which row goes where: one operator per layer. `place_kernel.OneLaunch` is a
Triton kernel for all layers at once, for cards with triton-ascend.

Where the prefill engine's pages are in the other layout, or have heads that are not wanted, a row is that of
one head, and `PerHead` stores it by the same operator at the slot that `convert` says.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import metadata
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
import torch_npu

from vllm_ascend.attention.cache_layout import HALVES, PageLayout, layer_rows
from vllm_ascend.errors import ConfigError

Ints = npt.NDArray[np.int64]

_TRITON_FOR_CARDS = "triton-ascend"


class Placing(Protocol):
    """Puts staged pieces into the pages of layers that are alike."""

    def target(self, pages: Ints, shares: int) -> torch.Tensor:
        """Where the pieces of `shares` sources for `pages` go; the same in every layer."""
        ...

    def place(self, staged: torch.Tensor, first_layer: int, target: torch.Tensor) -> None:
        """Put `staged` into its layers, which begin with `first_layer`. Returns once it is queued.

        `staged` is [layers, shares, pages, bytes of a piece], int8 and contiguous, on the layers' device;
        `target` was made for its pages and shares.
        """
        ...


class PerLayer:
    """One operator per layer."""

    def __init__(self, layers: Sequence[torch.Tensor]) -> None:
        """`layers`: vLLM's views [num_blocks, heads, block_size, 2 * head_size], contiguous, all alike."""
        # The operator takes elements of 1 and 2 bytes; it moves bits and asks no more of them.
        self._layers = [layer.view(torch.int8) for layer in layers]
        self._rows = HALVES * layers[0].shape[2]

    def target(self, pages: Ints, shares: int) -> torch.Tensor:
        """For each row of the pieces, which short row of a layer it is, in the order [share, page, row]."""
        row = np.add.outer(pages * self._rows, np.arange(self._rows)).reshape(-1) * shares
        slots = np.add.outer(np.arange(shares), row).reshape(-1)
        return torch.from_numpy(slots.astype(np.int32)).to(self._layers[0].device)

    def place(self, staged: torch.Tensor, first_layer: int, target: torch.Tensor) -> None:
        num_layers, shares, num_pages, piece_bytes = staged.shape
        row_bytes = piece_bytes // self._rows
        for layer, pieces in zip(self._layers[first_layer : first_layer + num_layers], staged, strict=True):
            torch_npu._npu_reshape_and_cache_siso(
                pieces.view(shares * num_pages * self._rows, 1, row_bytes),
                layer.view(len(layer), self._rows * shares, 1, row_bytes),
                target,
            )


class PerHead:
    """Rows of one head each, from anywhere to anywhere in a layer: one operator per layer."""

    def __init__(self, layers: Sequence[torch.Tensor], page: PageLayout) -> None:
        """`layers`: vLLM's views [num_blocks, heads, block_size, content]; `page`: the layout of all."""
        self._device = layers[0].device
        shape = (-1, page.planes * page.block_size, 1, page.head_bytes)
        self._layers = [layer_rows(layer, page).view(torch.int8).view(shape) for layer in layers]

    def target(self, rows: Ints) -> torch.Tensor:
        """`rows`, as `PageLayout.head_rows` counts them, for the operator; it skips those below 0."""
        return torch.from_numpy(rows.astype(np.int32)).to(self._device)

    def place(self, staged: torch.Tensor, layers: Sequence[int], target: torch.Tensor) -> None:
        """Put `staged` into `layers`, which are positions. Returns once it is queued.

        `staged` is [layers, bytes of their rows], int8 and contiguous; `target` says where each row goes.
        """
        for layer, rows in zip(layers, staged, strict=True):
            cache = self._layers[layer]
            torch_npu._npu_reshape_and_cache_siso(rows.view(len(target), 1, -1), cache, target)


def placing_of(way: str) -> Callable[[Sequence[torch.Tensor]], Placing]:
    """What makes a `Placing` of layers: `way` is 'staged', with operators, or 'triton'.

    Raises ConfigError for 'triton' where triton-ascend is not installed.
    """
    if way == "staged":
        return PerLayer
    assert way == "triton"
    try:
        metadata.version(_TRITON_FOR_CARDS)
    except metadata.PackageNotFoundError:
        raise ConfigError(
            f"regroup 'triton' needs {_TRITON_FOR_CARDS}, which is not installed; pip install "
            f"{_TRITON_FOR_CARDS}, or set regroup to 'staged' in kv_connector_extra_config"
        ) from None
    from vllm_ascend.kv_transfer.place_kernel import OneLaunch

    return OneLaunch
