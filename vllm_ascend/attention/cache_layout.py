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

There is nothing to shift, so vLLM's own block table and slots serve; head-major, block b is page
b * layers.

That is the default, token-major. *Head-major*, by the option `kv_cache_layout`, a page holds one head, and
a block the pages of all heads and layers of a KV cache group (vLLM's layout BHLNC):

    block b  =  [ head, layer, page ],   page  =  [ K: block_size, head_size ][ V: block_size, head_size ]

so that heads [i, j) of a block are one range of bytes over all layers. To the operators each KV head of each
request is then a sequence with one head and a block table of its own. The row of half-pages is that of the
whole cache, and each layer's two windows on it begin at the layer's first page: entry

    b * half-pages of a block  +  head * 2 * layers

of both is K and V of that head, in whichever layer, so one block table and one slot mapping serve all layers.

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

MAX_SLOTS = 2**31
"""Slots are int32: so many rows can be told apart."""

CONVERTIBLE = frozenset({"float16", "bfloat16"})
"""Element types of one size, so that one can be made another where it lies."""

HEAD_MAJOR_OF = {"token-major": "head-major", "latent": "head-major latent"}
"""For each layout in which a page holds all heads, that of the same rows with a page for each head."""


@dataclass(frozen=True)
class HeadMajor:
    """Each head has a page of its own, among pages of other heads and layers."""

    head_stride_bytes: int
    """From a head's page to that of the next head: the pages of all layers lie between."""
    block_stride_bytes: int
    """From block to block."""


@dataclass(frozen=True)
class PageLayout:
    """Where the KV of `num_heads` heads lies in one block of one layer. All sizes in bytes are exact."""

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
    apart: HeadMajor | None = None
    """None: token-major, one page holds all heads, and the next page is that of the next block."""

    @property
    def name(self) -> str:
        """How a peer is told the order of bytes in a block; equal names mean equal order."""
        name = "latent" if self.planes == 1 else "token-major"
        return name if self.apart is None else HEAD_MAJOR_OF[name]

    @property
    def num_pages(self) -> int:
        """Pages of a block and layer."""
        return 1 if self.apart is None else self.num_heads

    @property
    def row_heads(self) -> int:
        """Heads whose K, or V, of one token lie side by side."""
        return self.num_heads // self.num_pages

    @property
    def head_bytes(self) -> int:
        """Bytes of one token and head in one plane."""
        return self.head_size * self.itemsize_bytes

    @property
    def row_bytes(self) -> int:
        """Bytes of one token in one plane of a page: the distance from token to token."""
        return self.row_heads * self.head_bytes

    @property
    def plane_bytes(self) -> int:
        """Bytes of one plane of a page: the distance from K to V."""
        return self.block_size * self.row_bytes

    @property
    def page_bytes(self) -> int:
        """Bytes of a page, with what pads it."""
        return self.planes * self.plane_bytes + self.padding_bytes

    @property
    def block_stride_bytes(self) -> int:
        """The distance from block to block."""
        return self.page_bytes if self.apart is None else self.apart.block_stride_bytes

    @property
    def head_stride_bytes(self) -> int:
        """The distance from page to page of one block and layer; 0 where there is one."""
        return 0 if self.apart is None else self.apart.head_stride_bytes

    def extent_bytes(self, num_blocks: int) -> int:
        """From where a layer of `num_blocks` blocks begins to where it ends."""
        last_page = (num_blocks - 1) * self.block_stride_bytes + (self.num_pages - 1) * self.head_stride_bytes
        return last_page + self.page_bytes

    def of_size(self, block_size: int, num_heads: int, apart: HeadMajor | None = None) -> PageLayout:
        """The same elements, for other numbers of tokens and heads."""
        return replace(self, block_size=block_size, num_heads=num_heads, apart=apart)

    def padded_to(self, page_bytes: int) -> PageLayout:
        """A page of the same content, `page_bytes` long. Raises ValueError if it does not fit."""
        padding_bytes = page_bytes - self.planes * self.plane_bytes
        if padding_bytes < 0:
            raise ValueError(f"{self.planes * self.plane_bytes} bytes do not fit a page of {page_bytes}")
        return replace(self, padding_bytes=padding_bytes)

    def rows(self, slots: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """The tokens in `slots` as rows of `layer_rows`, as [page of a block, plane, slot]."""
        pages = np.arange(self.num_pages, dtype=np.int64) * self.head_stride_bytes
        rows: npt.NDArray[np.int64] = np.add.outer(pages, self.row_offsets(slots)) // self.row_bytes
        return rows

    def head_rows(self, slots: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """The tokens in `slots` as rows of one head each, as [head, plane, slot].

        Such a row has `head_bytes`; they are counted from where the layer begins, over all its memory.
        """
        by_head = self.head_bytes if self.apart is None else self.head_stride_bytes
        heads = np.arange(self.num_heads, dtype=np.int64) * by_head
        rows: npt.NDArray[np.int64] = np.add.outer(heads, self.row_offsets(slots)) // self.head_bytes
        return rows

    def row_offsets(self, slots: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Where the tokens in `slots` begin, in bytes from where the layer begins, as [plane, slot].

        A token's slot is its block times `block_size` plus its place in the block. Head-major, these are the
        rows of the first head.
        """
        block, token = np.divmod(slots, self.block_size)
        planes = np.arange(self.planes, dtype=np.int64) * self.plane_bytes
        in_plane = block * self.block_stride_bytes + token * self.row_bytes
        offsets: npt.NDArray[np.int64] = np.add.outer(planes, in_plane)
        return offsets


def can_convert(there: str, here: str) -> bool:
    """Whether a page with elements `there` can be made one with elements `here`, where it lies."""
    return there == here or {there, here} <= CONVERTIBLE


def can_rearrange(there: str, here: str) -> bool:
    """Whether pages of the layouts of these names hold the same rows, in whatever order."""
    return there == here or (there, here) in HEAD_MAJOR_OF.items() or (here, there) in HEAD_MAJOR_OF.items()


def page_layout(kv_cache: torch.Tensor, planes: int = HALVES, head_major: bool = False) -> PageLayout:
    """The layout of one layer, given as vLLM's view [num_blocks, heads, block_size, planes * head_size].

    Raises ValueError if the view is not one of pages in that layout.
    """
    (_check_head_pages if head_major else _check_pages)(kv_cache, planes)
    _, num_heads, block_size, content = kv_cache.shape
    itemsize_bytes = kv_cache.element_size()
    by_block, by_head = (stride * itemsize_bytes for stride in kv_cache.stride()[:2])
    apart = HeadMajor(by_head, by_block) if head_major else None
    return PageLayout(block_size, num_heads, content // planes, itemsize_bytes, planes, apart=apart)


def layer_rows(kv_cache: torch.Tensor, page: PageLayout) -> torch.Tensor:
    """A layer as rows: K, or V, of one token and of the heads that lie side by side.

    `kv_cache` is vLLM's view of the layer, `page` its layout. The result, [rows, row_heads * head_size], is
    contiguous and shares memory with it. `PageLayout.rows` says which rows are a token's; head-major, other
    layers' lie between them.
    """
    row = page.row_heads * page.head_size
    num_rows = page.extent_bytes(len(kv_cache)) // page.row_bytes
    return kv_cache.as_strided((num_rows, row), (row, 1))


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


def head_windows(kv_cache: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`(key_cache, value_cache)` of a head-major layer, for operators that take one KV head per sequence.

    `kv_cache` is vLLM's view [num_blocks, heads, block_size, 2 * head_size]. Both results are contiguous,
    [half-pages, block_size, 1, head_size], reach from the layer's first page to its last, over the pages of
    other layers, and share memory with it and each other. Raises ValueError if it is not head-major.
    """
    page = page_layout(kv_cache, head_major=True)
    shape = (-1, page.block_size, 1, page.head_size)
    halves = layer_rows(kv_cache, page).view(shape)
    return halves[:-1], halves[1:]


def latent_pages(kv_cache: torch.Tensor) -> torch.Tensor:
    """A layer of latents as operators take it: [pages, block_size, 1, size], contiguous, the same memory.

    `kv_cache` is what vLLM's latent layer holds, [num_blocks, block_size, size]. Block b is page
    b * `latent_step(kv_cache)`; head-major, pages of other layers lie between. Raises ValueError if it is not
    a row of whole pages.
    """
    num_blocks, block_size, size = kv_cache.shape
    page = block_size * size
    num_pages = (num_blocks - 1) * latent_step(kv_cache) + 1
    return kv_cache.as_strided((num_pages, block_size, 1, size), (page, size, size, 1))


def latent_step(kv_cache: torch.Tensor) -> int:
    """Pages from block to block of a layer of latents: 1, or head-major one for each layer.

    `kv_cache` and what is raised are those of `latent_pages`.
    """
    if kv_cache.dim() != 3 or not kv_cache[0].is_contiguous() or kv_cache.stride(0) % kv_cache[0].numel():
        raise ValueError(
            f"a layer's latents must be a view [num_blocks, block_size, size] of whole pages, which they are "
            f"in vLLM's layouts LBHNC and BHLNC; got strides {list(kv_cache.stride())} for shape "
            f"{list(kv_cache.shape)}: unset VLLM_KV_CACHE_LAYOUT"
        )
    return kv_cache.stride(0) // kv_cache[0].numel()


def operator_block(block: Block) -> Block:
    """The entry in an operator's block table that stands for `block` in the caches of `split_pages`."""
    return HALVES * block


def _check_shape(kv_cache: torch.Tensor, planes: int) -> None:
    if kv_cache.dim() != 4 or kv_cache.shape[3] % planes != 0:
        raise ValueError(
            f"a layer's KV cache must be a view [num_blocks, heads, block_size, {planes} * head_size], "
            f"got shape {list(kv_cache.shape)}"
        )


def _check_pages(kv_cache: torch.Tensor, planes: int) -> None:
    _check_shape(kv_cache, planes)
    if not kv_cache.is_contiguous():
        raise ValueError(
            f"a layer's KV cache must be contiguous, which it is in vLLM's layout LBHNC; got strides "
            f"{list(kv_cache.stride())} for shape {list(kv_cache.shape)}: unset VLLM_KV_CACHE_LAYOUT"
        )


def _check_head_pages(kv_cache: torch.Tensor, planes: int) -> None:
    _check_shape(kv_cache, planes)
    page = kv_cache.shape[2] * kv_cache.shape[3]
    if not kv_cache[0, 0].is_contiguous() or kv_cache.stride(0) % page or kv_cache.stride(1) % page:
        raise ValueError(
            f"a head-major layer's KV cache must have each head of a block in one piece, whole pages of "
            f"{page} elements apart, which it has in vLLM's layout BHLNC; got strides "
            f"{list(kv_cache.stride())} for shape {list(kv_cache.shape)}"
        )
