# SPDX-License-Identifier: Apache-2.0
"""Checksums of KV that do not depend on how an engine stores it.

One sum for each layer, KV head and unit of 16 tokens, counted from the request's first. These are what two
engines have in common, whatever their ranks, block sizes and layouts; every block is whole units, so a
prefix hit ends where a unit does. A larger unit would have to know the other side's blocks, a sum over
layers its pipeline stages, a sum over heads its tensor-parallel size.

The sum is Fletcher's, of the unit's 16-bit words in the order [token, K and V, element]: the plain sum of the
words, and the sum of each times its place. Neither is reduced below 32 bits. A flipped bit changes the first
by a power of two, so it never goes unseen; words that changed places change the second. It needs only
operations that every device has.

Recurrent state has no heads or tokens. Its sums are of units of 1 MiB, and of bytes, as they lie.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
import torch_npu

from vllm_ascend.attention.cache_layout import PageLayout
from vllm_ascend.kv_transfer.topology import Span

Ints = npt.NDArray[np.int64]
UnitSums = npt.NDArray[np.uint64]
"""[heads, units], of a state [1, units]; each has the sum by place in its upper half, the plain one below."""

UNIT_TOKENS = 16
"""Tokens that one sum covers: every block size is a multiple."""

STATE_UNIT_BYTES = 1 << 20
"""Bytes of a state that one sum covers: bounds the memory that summing needs beside the cache."""

_TOKENS_AT_A_TIME = 128 * UNIT_TOKENS
"""Bounds the memory that summing needs beside the cache: some times 8 bytes for each word of these."""


class Summer:
    """Sums on a stream of its own, so that they wait for no model. For any thread whose device is current."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch_npu.npu.Stream(device=device)

    def sums(self, layer: torch.Tensor, page: PageLayout, slots: Ints) -> UnitSums:
        """`layer_sums` of a layer that nobody writes now."""
        with torch_npu.npu.stream(self._stream):
            return layer_sums(layer, page, slots)

    def state_sums(self, layer: torch.Tensor, block: int) -> UnitSums:
        """`state_sums` of a layer that nobody writes now."""
        with torch_npu.npu.stream(self._stream):
            return state_sums(layer, block)


def units_of(tokens: Span) -> Span:
    """The units that hold `tokens`. Both ends may lie inside one; the first is summed from its start on."""
    return Span(tokens.start // UNIT_TOKENS, -(-tokens.stop // UNIT_TOKENS))


def layer_sums(layer: torch.Tensor, page: PageLayout, slots: Ints) -> UnitSums:
    """The sums of tokens at `slots`, the first of which begins a unit; the last unit may lack tokens.

    `layer` is a layer's pages, contiguous, as vLLM's view [pages, heads, tokens per page, content]. Computed
    on the layer's device, on the current stream; returns when done.
    """
    with torch.inference_mode():
        rows = _rows(layer, page)
        parts = [
            _sums(rows, page, slots[start : start + _TOKENS_AT_A_TIME])
            for start in range(0, len(slots), _TOKENS_AT_A_TIME)
        ]
    return np.concatenate(parts, axis=1) if parts else np.empty((page.num_heads, 0), dtype=np.uint64)


def units_of_state(num_bytes: int) -> Span:
    """The units of a state of so many bytes; the last may lack some."""
    return Span(0, -(-num_bytes // STATE_UNIT_BYTES))


def state_sums(layer: torch.Tensor, block: int) -> UnitSums:
    """The sums of the state in `block`, [1, units].

    `layer` is vLLM's view [num_blocks, 1, 1, bytes], int8. Computed on its device, on the current stream;
    returns when done.
    """
    with torch.inference_mode():
        units = layer[block].view(torch.uint8).flatten().split(STATE_UNIT_BYTES)
        return np.stack([_packed(unit.to(torch.int64)) for unit in units], axis=-1)[None]


def _rows(layer: torch.Tensor, page: PageLayout) -> torch.Tensor:
    """The layer's words as [page, plane and token, head, word], the first two joined."""
    words = layer.view(torch.uint8 if page.itemsize_bytes == 1 else torch.int16)
    return words.view(layer.shape[0] * page.planes * page.block_size, page.num_heads, -1)


def _sums(rows: torch.Tensor, page: PageLayout, slots: Ints) -> UnitSums:
    place, token = np.divmod(slots, page.block_size)
    planes = np.arange(page.planes, dtype=np.int64)
    row = (place[:, None] * page.planes + planes) * page.block_size + token[:, None]
    found = rows.index_select(0, torch.from_numpy(row.reshape(-1)).to(rows.device))
    words = found.view(len(slots), page.planes, page.num_heads, -1).to(torch.int64) & 0xFFFF
    by_head = words.permute(2, 0, 1, 3).reshape(page.num_heads, len(slots), -1)
    # Tokens that the last unit lacks count as zeros, on both sides.
    missing = -len(slots) % UNIT_TOKENS
    whole = torch.nn.functional.pad(by_head, (0, 0, 0, missing))
    units = whole.reshape(page.num_heads, (len(slots) + missing) // UNIT_TOKENS, -1)
    return _packed(units)


def _packed(words: torch.Tensor) -> UnitSums:
    """Both sums over the last axis, int64."""
    places = torch.arange(1, words.shape[-1] + 1, dtype=torch.int64, device=words.device)
    plain = words.sum(-1).cpu().numpy().astype(np.uint64)
    weighted = (words * places).sum(-1).cpu().numpy().astype(np.uint64)
    sums: UnitSums = (weighted << np.uint64(32)) | (plain & np.uint64(0xFFFFFFFF))
    return sums
