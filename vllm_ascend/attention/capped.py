# SPDX-License-Identifier: Apache-2.0
"""Attention whose scores are bounded smoothly: cap * tanh(score / cap) takes part in the softmax.

No attention operator of torch_npu bounds scores, so this is put together from matrix products, one sequence
after the other. It is slower than the fused operator, and only models that cap their scores pay for it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vllm_ascend.attention.metadata import GroupedAttentionMetadata


@dataclass(frozen=True)
class CappedAttention:
    """What a layer's attention does with scores."""

    scale: float
    cap: float
    window: int | None
    """Keys that a query row sees, its own included; None: all up to its own."""

    def attend(
        self,
        query: torch.Tensor,
        key_cache: torch.Tensor,
        value_cache: torch.Tensor,
        metadata: GroupedAttentionMetadata,
    ) -> torch.Tensor:
        """query and result: [rows, heads, head_size], sequence by sequence; caches as `Paging` gives them."""
        begins = [0, *metadata.query_ends[:-1]]
        sequences = zip(begins, metadata.query_ends, metadata.kv_lengths, metadata.block_table, strict=True)
        results = []
        for begin, end, num_keys, blocks in sequences:
            first_key = self._first_key(end - begin, num_keys)
            keys, values = (
                _gather(cache, blocks, first_key, num_keys, metadata.paging.block_size)
                for cache in (key_cache, value_cache)
            )
            results.append(self._attend_one(query[begin:end], keys, values))
        return torch.cat(results)

    def _first_key(self, num_rows: int, num_keys: int) -> int:
        """The first key that the first row sees. What is left of it may be another request's by now."""
        return 0 if self.window is None else max(0, num_keys - num_rows - self.window + 1)

    def _attend_one(self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """query: [rows, heads, size]; keys, values: [keys, kv heads, size], up to the last row's own key."""
        num_rows, num_heads, size = query.shape
        groups = query.view(num_rows, keys.shape[1], -1, size)
        scores = torch.einsum("rhgd,khd->hgrk", groups, keys).float() * self.scale
        scores = self.cap * torch.tanh(scores / self.cap)
        hidden = self._hidden(num_rows, len(keys), query.device)
        weights = scores.masked_fill(hidden, float("-inf")).softmax(-1).to(query.dtype)
        return torch.einsum("hgrk,khd->rhgd", weights, values).reshape(num_rows, num_heads, -1)

    def _hidden(self, num_rows: int, num_keys: int, device: torch.device) -> torch.Tensor:
        """bool [rows, keys]: true where the row does not see the key."""
        own_key = torch.arange(num_keys - num_rows, num_keys, device=device)[:, None]
        key = torch.arange(num_keys, device=device)
        hidden = key > own_key
        return hidden if self.window is None else hidden | (key <= own_key - self.window)


def _gather(cache: torch.Tensor, blocks: torch.Tensor, first: int, end: int, block_size: int) -> torch.Tensor:
    """Tokens [first, end) of a sequence, [end - first, kv heads, head_size]; `blocks` is its block table."""
    first_block = first // block_size
    used = blocks[first_block : -(-end // block_size)]
    skipped = first_block * block_size
    return cache.index_select(0, used).flatten(0, 1)[first - skipped : end - skipped]
