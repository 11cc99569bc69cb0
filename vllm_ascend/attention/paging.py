# SPDX-License-Identifier: Apache-2.0
"""How attention operators find a request's K and V: what vLLM's block table and slots are to them.

Where the KV lies is cache_layout.py's; this file counts it as operators do. Token-major, a request is one
sequence, and block b is entry 2 * b, since K and V are halves of one page. Head-major, a request is as many
sequences as there are KV heads, each with one head. Latents are one head, whose pages are not halved.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vllm_ascend.attention.cache_layout import (
    HALVES,
    MAX_SLOTS,
    head_windows,
    latent_step,
    page_layout,
    split_pages,
)
from vllm_ascend.errors import ConfigError


@dataclass(frozen=True)
class Paging:
    """The same for all layers of a KV cache group. Entries of an operator's block table count half-pages."""

    block_size: int
    """Tokens per page."""
    block_step: int = HALVES
    """Entries from block to block."""
    num_sequences: int = 1
    """Sequences that a request is to the operators."""
    sequence_step: int = 0
    """Entries from one sequence of a request to the next."""
    head_major: bool = False

    def block_table(self, blocks: torch.Tensor) -> torch.Tensor:
        """The operators' block table for vLLM's, `blocks` [requests, columns].

        [num_sequences * requests, columns], of the same type: first the first head of all requests.
        """
        entries = blocks * self.block_step
        return (self._steps(entries)[:, None, None] + entries).flatten(0, 1)

    def slots(self, slots: torch.Tensor) -> torch.Tensor:
        """The operators' slots for vLLM's, `slots` [tokens]: block * block_size + offset.

        int32 [tokens * num_sequences]: first all heads of the first token. Negative slots stay negative.
        """
        if self.block_step == self.num_sequences == 1:
            return slots.to(torch.int32)  # vLLM's are the operators', and latents ask in every layer
        blocks = torch.div(slots, self.block_size, rounding_mode="floor")
        first = slots + blocks * ((self.block_step - 1) * self.block_size)
        return (first[:, None] + self._steps(first) * self.block_size).flatten().to(torch.int32)

    def caches(self, kv_cache: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`(key_cache, value_cache)` of a layer, for the block table and slots above.

        `kv_cache` is vLLM's view [num_blocks, heads, block_size, 2 * head_size]. Both results are contiguous
        [entries, block_size, heads of a sequence, head_size] and share memory with it and each other.
        """
        return head_windows(kv_cache) if self.head_major else split_pages(kv_cache)

    def _steps(self, like: torch.Tensor) -> torch.Tensor:
        heads = torch.arange(self.num_sequences, dtype=like.dtype, device=like.device)
        return heads * self.sequence_step


def latent_paging(kv_cache: torch.Tensor) -> Paging:
    """The paging of a group of latents, given one of its layers as vLLM has it; entries count pages."""
    return Paging(kv_cache.shape[1], block_step=latent_step(kv_cache))


def head_paging(kv_cache: torch.Tensor) -> Paging:
    """The paging of a head-major group, given one of its layers as vLLM's view.

    Raises ConfigError if the cache has more rows than the operators' slots can tell apart.
    """
    page = page_layout(kv_cache, head_major=True)
    if (num_rows := page.extent_bytes(len(kv_cache)) // page.row_bytes) > MAX_SLOTS:
        raise ConfigError(
            f"a head-major KV cache of {num_rows} rows of one head was asked, and the NPU's operators number "
            f"rows up to {MAX_SLOTS}; lower --kv-cache-memory-bytes or use kv_cache_layout token_major"
        )
    return Paging(
        page.block_size,
        block_step=page.block_stride_bytes // page.plane_bytes,
        num_sequences=page.num_heads,
        sequence_step=page.head_stride_bytes // page.plane_bytes,
        head_major=True,
    )
