# SPDX-License-Identifier: Apache-2.0
"""Shape and strides of the paged KV cache: the only place that knows where a byte of KV lies.

A layer is `num_blocks` pages, one after the other. A page keeps vLLM's size but orders its bytes
token-major, K before V:

    page b  =  [ K: block_size, heads, head_size ][ V: block_size, heads, head_size ]

so that both halves are the `[block_size, heads, head_size]` blocks that torch_npu's paged operators
take. Those operators want K and V as two contiguous tensors of one shape. Seen as half-pages the layer
is one contiguous row K0 V0 K1 V1 ..., and two windows on it, one half-page apart, are just that:

    half-pages     K0 V0 K1 V1 ... Kn Vn
    key_cache     [K0 V0 K1 V1 ... Kn]
    value_cache      [V0 K1 V1 ... Kn Vn]

Entry 2 * b of both windows is block b, so one block table (entries 2 * b) and one slot mapping
(slots 2 * b * block_size + offset) serve K and V alike, no byte is copied, and everything vLLM does with
whole pages (zeroing, copying, lending them to another cache group) stays true.

Latent attention (MLA) caches one row per token, from which K and V of every head are made: the latent and
the rotated part of the key, side by side. To this file that is one head whose pages have one plane, not two:

    page b  =  [ block_size, latent + rotated part ]

There is nothing to shift, so vLLM's own block table and slots serve.

A layer with recurrent state (Mamba, linear attention) keeps no tokens but, in one page, all its states after
the last one: say those of the convolution and of the recurrence, side by side. To this file that is one row.
Beside attention its pages are padded to attention's size:

    page b  =  [ states ][ padding ]

vLLM describes a layer as a view [num_blocks, heads, block_size, content], where content is K and V of
one token and head. Of that view this plugin keeps the pages and ignores the order inside a page.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    import torch

Block = TypeVar("Block", int, "torch.Tensor", npt.NDArray[np.int64])
"""One block id, or many."""

OPERATOR_ROW_BYTES = 32
"""The paged operators move rows (K of one token, all heads) whose size is a multiple of this."""

HALVES = 2
"""A page has two halves: K, then V."""

CONVERTIBLE = frozenset({"float16", "bfloat16"})
"""Element types of one size, so that one can be made another where it lies."""


@dataclass(frozen=True)
class PageLayout:
    """Where the KV of `num_heads` heads lies in one page of one layer. All sizes in bytes are exact."""

    block_size: int
    """Tokens per page."""
    num_heads: int
    """KV heads that the page holds."""
    head_size: int
    """Elements of one token and head in one plane: of K, and as many of V, or of the latent row."""
    itemsize_bytes: int
    """Bytes of one element."""
    planes: int = HALVES
    """2: K, then V. 1: latent rows, or states."""
    padding_bytes: int = 0
    """Bytes at the end of a page that hold nothing."""

    @property
    def name(self) -> str:
        """How a peer is told the order of bytes in a page; equal names mean equal order."""
        return "latent" if self.planes == 1 else "token-major"

    @property
    def head_bytes(self) -> int:
        """Bytes of one token and head in one plane."""
        return self.head_size * self.itemsize_bytes

    @property
    def row_bytes(self) -> int:
        """Bytes of one token in one plane, all heads: the distance from token to token."""
        return self.num_heads * self.head_bytes

    @property
    def plane_bytes(self) -> int:
        """Bytes of one plane of a page: the distance from K to V."""
        return self.block_size * self.row_bytes

    @property
    def page_bytes(self) -> int:
        """Bytes of a page: the distance from block to block."""
        return self.planes * self.plane_bytes + self.padding_bytes

    def of_size(self, block_size: int, num_heads: int) -> PageLayout:
        """A page of the same elements, for other numbers of tokens and heads."""
        return replace(self, block_size=block_size, num_heads=num_heads)

    def padded_to(self, page_bytes: int) -> PageLayout:
        """A page of the same content, `page_bytes` long. Raises ValueError if it does not fit."""
        padding_bytes = page_bytes - self.planes * self.plane_bytes
        if padding_bytes < 0:
            raise ValueError(f"{self.planes * self.plane_bytes} bytes do not fit a page of {page_bytes}")
        return replace(self, padding_bytes=padding_bytes)

    def rows(self, slots: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """The tokens in `slots` as rows of the layer, counted from page 0, as [plane, slot]."""
        return self.row_offsets(slots) // self.row_bytes

    def row_offsets(self, slots: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Where the tokens in `slots` begin, in bytes from page 0, as [plane, slot].

        A token's slot is its page times `block_size` plus its place in the page.
        """
        page, token = np.divmod(slots, self.block_size)
        planes = np.arange(self.planes, dtype=np.int64) * self.plane_bytes
        offsets: npt.NDArray[np.int64] = np.add.outer(planes, page * self.page_bytes + token * self.row_bytes)
        return offsets


def can_convert(there: str, here: str) -> bool:
    """Whether a page with elements `there` can be made one with elements `here`, where it lies."""
    return there == here or {there, here} <= CONVERTIBLE


def page_layout(kv_cache: torch.Tensor, planes: int = HALVES) -> PageLayout:
    """The layout of one layer, given as vLLM's view [num_blocks, heads, block_size, planes * head_size].

    Raises ValueError if the view is not a row of whole pages.
    """
    _check_pages(kv_cache, planes)
    _, num_heads, block_size, content = kv_cache.shape
    return PageLayout(block_size, num_heads, content // planes, kv_cache.element_size(), planes)


def state_layout(kv_cache: torch.Tensor) -> PageLayout:
    """The layout of one layer of states, given as vLLM's view [num_blocks, 1, 1, bytes], int8.

    A page is a slot. Raises ValueError if the view is not a row of pages.
    """
    if kv_cache.shape[1:3] != (1, 1) or kv_cache.element_size() != 1 or kv_cache.stride(3) != 1:
        raise ValueError(
            f"a layer's states must be a view [num_blocks, 1, 1, bytes] of bytes in a row; got strides "
            f"{list(kv_cache.stride())} for shape {list(kv_cache.shape)} of {kv_cache.dtype}"
        )
    return PageLayout(1, 1, kv_cache.shape[3], 1, planes=1).padded_to(kv_cache.stride(0))


def split_pages(kv_cache: torch.Tensor, shares: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """`(key_cache, value_cache)` of a layer, for operators that take block table entries of 2 * block.

    `kv_cache` is vLLM's view [num_blocks, heads, block_size, 2 * head_size], contiguous. Both results are
    contiguous, [2 * num_blocks - 1, block_size, heads, head_size], and share memory with it and each other:
    the value cache starts one half-page after the key cache. With `shares`, a divisor of the heads, each page
    is seen as that many pages of fewer heads, each with its own K and V. Raises ValueError if the view is not
    a row of whole pages.
    """
    _check_pages(kv_cache, HALVES)
    num_blocks, num_heads, block_size, content = kv_cache.shape
    halves = kv_cache.view(HALVES * num_blocks * shares, block_size, num_heads // shares, content // HALVES)
    return halves[:-1], halves[1:]


def latent_pages(kv_cache: torch.Tensor) -> torch.Tensor:
    """A layer of latents as operators take it: [num_blocks, block_size, 1, size], the same memory.

    `kv_cache` is what vLLM's latent layer holds, [num_blocks, block_size, size]. Raises ValueError if it is
    not a row of whole pages.
    """
    if kv_cache.dim() != 3 or not kv_cache.is_contiguous():
        raise ValueError(
            f"a layer's latents must be a contiguous view [num_blocks, block_size, size], which they are in "
            f"vLLM's layout LBHNC; got strides {list(kv_cache.stride())} for shape {list(kv_cache.shape)}: "
            f"unset VLLM_KV_CACHE_LAYOUT"
        )
    return kv_cache.unsqueeze(2)


def operator_block(block: Block) -> Block:
    """The entry in an operator's block table that stands for `block` in the caches of `split_pages`."""
    return HALVES * block


def _check_pages(kv_cache: torch.Tensor, planes: int) -> None:
    if kv_cache.dim() != 4 or kv_cache.shape[3] % planes != 0:
        raise ValueError(
            f"a layer's KV cache must be a view [num_blocks, heads, block_size, {planes} * head_size], "
            f"got shape {list(kv_cache.shape)}"
        )
    if not kv_cache.is_contiguous():
        raise ValueError(
            f"a layer's KV cache must be contiguous, which it is in vLLM's layout LBHNC; got strides "
            f"{list(kv_cache.stride())} for shape {list(kv_cache.shape)}: unset VLLM_KV_CACHE_LAYOUT"
        )
