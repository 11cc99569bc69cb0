# SPDX-License-Identifier: Apache-2.0
"""Attention with grouped heads: store this step's K and V in their pages, then attend over the pages.

One operator serves prefill, chunked prefill and decode alike, over packed tokens (layout TND), with a mask
that is causal from the bottom right: a request's last query row sees all its KV, the row above one less.

With head-major pages the operators are shown each KV head of each request as a sequence with one head: their
rows are the query's, head by head.

A layer with a sliding window of W tokens sees of those the last W. vLLM gives the blocks left of every row's
window to other requests, so the block table's entries for them mean nothing there; the operator skips them.
"""

from __future__ import annotations

from typing import ClassVar

import torch
import torch_npu
from vllm.v1.attention.backend import AttentionImpl, AttentionLayer, AttentionType

from vllm_ascend.attention.capped import CappedAttention
from vllm_ascend.attention.metadata import GroupedAttentionMetadata
from vllm_ascend.errors import ConfigError

EVERYTHING = 0
CAUSAL_FROM_BOTTOM_RIGHT = 3
BAND_FROM_BOTTOM_RIGHT = 4
"""`sparse_mode` of npu_fused_infer_attention_score; a band ends where `pre_tokens` and `next_tokens` say."""


class GroupedAttention(AttentionImpl[GroupedAttentionMetadata]):
    """Attention of one layer; `num_heads` query heads share `num_kv_heads` KV heads evenly."""

    max_sequences: ClassVar[int] = 4096
    """What the operator takes in one call."""

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
        sinks: torch.Tensor | None = None,
    ) -> None:
        # The selector does not ask for these.
        if alibi_slopes:
            raise ConfigError("this model needs ALiBi slopes, and an NPU engine does not do that yet")
        if sinks is not None and logits_soft_cap:
            raise ConfigError(
                "this model needs attention sinks and logits_soft_cap in one layer, and an NPU engine does "
                "not do both at once yet"
            )
        self.num_heads = num_heads
        self.head_size = head_size
        self.scale = scale
        self.num_kv_heads = num_kv_heads or num_heads
        self.kv_cache_dtype = kv_cache_dtype
        self._visible = self._keys_seen(sliding_window)
        self._sinks = sinks
        self._capped = CappedAttention(scale, logits_soft_cap, sliding_window) if logits_soft_cap else None
        self._owns_cache = kv_sharing_target_layer_name is None

    def forward(
        self,
        layer: AttentionLayer,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: GroupedAttentionMetadata | None,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attend; the result goes to `output`, rows of padding tokens get zeros.

        query, output: [tokens, num_heads, head_size]; key, value: [tokens, num_kv_heads, head_size];
        kv_cache: vLLM's view [num_blocks, num_kv_heads, block_size, 2 * head_size]. Without metadata vLLM is
        measuring memory, and there is no cache yet.
        """
        assert output_scale is None
        assert output_block_scale is None
        if attn_metadata is None:
            return output.zero_()
        num_tokens, num_sequences = attn_metadata.num_tokens, attn_metadata.paging.num_sequences
        key_cache, value_cache = attn_metadata.paging.caches(kv_cache)
        if self._owns_cache:
            self._store(key, value, key_cache, value_cache, attn_metadata)
        attend = self._attend if self._capped is None else self._capped.attend
        by_token = (num_tokens, num_sequences, -1, self.head_size)
        by_sequence = query[:num_tokens].view(by_token).transpose(0, 1).flatten(0, 1)
        attended = attend(by_sequence, key_cache, value_cache, attn_metadata)
        by_head = attended.view(num_sequences, num_tokens, -1, self.head_size)
        output[:num_tokens].view(by_token).copy_(by_head.transpose(0, 1))
        output[num_tokens:].zero_()
        return output

    def _store(
        self,
        key: torch.Tensor,
        value: torch.Tensor,
        key_cache: torch.Tensor,
        value_cache: torch.Tensor,
        metadata: GroupedAttentionMetadata,
    ) -> None:
        """Keep the step's K and V. The caches are as `Paging` gives them."""
        tokens = slice(metadata.num_tokens)
        put(key[tokens], value[tokens], key_cache, value_cache, metadata.slots)

    def _attend(
        self,
        query: torch.Tensor,
        key_cache: torch.Tensor,
        value_cache: torch.Tensor,
        metadata: GroupedAttentionMetadata,
    ) -> torch.Tensor:
        """query and result: [rows, heads of a sequence, head_size], sequence by sequence.

        The caches are as `Paging` gives them.
        """
        num_sequences = metadata.paging.num_sequences
        num_requests = len(metadata.query_ends) // num_sequences
        # A call takes one vector of sinks, for the heads of one sequence.
        at_once = 1 if self._sinks is not None else max(1, self.max_sequences // num_requests)
        sinks = None if self._sinks is None else self._sinks.view(num_sequences, -1)
        parts = []
        for first in range(0, num_sequences, at_once):
            stop = min(first + at_once, num_sequences)
            in_call = (stop - first) * num_requests
            attended, _ = torch_npu.npu_fused_infer_attention_score_v2(
                query[first * metadata.num_tokens : stop * metadata.num_tokens],
                # Blocks as [tokens, heads * size]: with four axes the operator takes heads before tokens.
                key_cache.flatten(2),
                value_cache.flatten(2),
                atten_mask=metadata.mask,
                actual_seq_qlen=metadata.query_ends[:in_call],
                actual_seq_kvlen=metadata.kv_lengths[:in_call],
                block_table=metadata.block_table[first * num_requests : stop * num_requests],
                block_size=metadata.paging.block_size,
                num_query_heads=query.shape[1],
                num_key_value_heads=key_cache.shape[2],
                softmax_scale=self.scale,
                input_layout="TND",
                learnable_sink=None if sinks is None else sinks[first],
                **self._visible,
            )
            parts.append(attended)
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    @staticmethod
    def _keys_seen(sliding_window: int | None) -> dict[str, int]:
        """The operator's arguments that say which keys a row sees: all up to its own, or the last of them."""
        if sliding_window is None:
            return {"sparse_mode": CAUSAL_FROM_BOTTOM_RIGHT}
        # vLLM counts the row's own token to the window and the operator does not.
        return {"sparse_mode": BAND_FROM_BOTTOM_RIGHT, "pre_tokens": sliding_window - 1, "next_tokens": 0}


def put(
    key: torch.Tensor,
    value: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    slots: torch.Tensor,
) -> None:
    """Store rows at their slots. The caches and slots are as `Paging` gives them.

    key, value: [rows, num_kv_heads, head_size].
    """
    by_sequence = (len(slots), *key_cache.shape[2:])
    torch_npu._npu_reshape_and_cache(
        key.reshape(by_sequence), value.reshape(by_sequence), key_cache, value_cache, slots
    )
