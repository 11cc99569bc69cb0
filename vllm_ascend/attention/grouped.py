# SPDX-License-Identifier: Apache-2.0
"""Attention with grouped heads: store this step's K and V in their pages, then attend over the pages.

One operator serves prefill, chunked prefill and decode alike, over packed tokens (layout TND), with a mask
that is causal from the bottom right: a request's last query row sees all its KV, the row above one less.

A layer with a sliding window of W tokens sees of those the last W. vLLM gives the blocks left of every row's
window to other requests, so the block table's entries for them mean nothing there; the operator skips them.
"""

from __future__ import annotations

import torch
import torch_npu
from vllm.v1.attention.backend import AttentionImpl, AttentionLayer, AttentionType

from vllm_ascend.attention.cache_layout import split_pages
from vllm_ascend.attention.metadata import GroupedAttentionMetadata
from vllm_ascend.errors import ConfigError

CAUSAL_FROM_BOTTOM_RIGHT = 3
BAND_FROM_BOTTOM_RIGHT = 4
"""`sparse_mode` of npu_fused_infer_attention_score; a band ends where `pre_tokens` and `next_tokens` say."""


class GroupedAttention(AttentionImpl[GroupedAttentionMetadata]):
    """Attention of one layer; `num_heads` query heads share `num_kv_heads` KV heads evenly."""

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
    ) -> None:
        # The selector does not ask for these two.
        for name, value in {"ALiBi slopes": alibi_slopes, "logits_soft_cap": logits_soft_cap}.items():
            if value:
                raise ConfigError(f"this model needs {name}, and an NPU engine does not do that yet")
        self.num_heads = num_heads
        self.head_size = head_size
        self.scale = scale
        self.num_kv_heads = num_kv_heads or num_heads
        self.kv_cache_dtype = kv_cache_dtype
        self._visible = _visible(sliding_window)
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
        num_tokens = attn_metadata.num_tokens
        key_cache, value_cache = split_pages(kv_cache)
        if self._owns_cache:
            torch_npu._npu_reshape_and_cache(
                key[:num_tokens], value[:num_tokens], key_cache, value_cache, attn_metadata.slots
            )
        attended, _ = torch_npu.npu_fused_infer_attention_score(
            query[:num_tokens],
            # Blocks as [tokens, heads * size]: with four axes the operator would take heads before tokens.
            key_cache.flatten(2),
            value_cache.flatten(2),
            atten_mask=attn_metadata.mask,
            actual_seq_lengths=attn_metadata.query_ends,
            actual_seq_lengths_kv=attn_metadata.kv_lengths,
            block_table=attn_metadata.block_table,
            block_size=attn_metadata.block_size,
            num_heads=self.num_heads,
            num_key_value_heads=self.num_kv_heads,
            scale=self.scale,
            input_layout="TND",
            **self._visible,
        )
        output[:num_tokens] = attended
        output[num_tokens:].zero_()
        return output


def _visible(sliding_window: int | None) -> dict[str, int]:
    """The operator's arguments that say which keys a row sees: all up to its own, or the last of them."""
    if sliding_window is None:
        return {"sparse_mode": CAUSAL_FROM_BOTTOM_RIGHT}
    # vLLM counts the row's own token to the window and the operator does not.
    return {"sparse_mode": BAND_FROM_BOTTOM_RIGHT, "pre_tokens": sliding_window - 1, "next_tokens": 0}
