# SPDX-License-Identifier: Apache-2.0
"""Attention of encoders: every token of a request sees all its tokens, and nothing is kept of them.

A request comes whole, in one step, since vLLM does not cut what is not causal into chunks; so its keys and
values are this step's, and there is no KV cache to store or to page. The operator takes the step's packed
tokens (layout TND) and heads of every size, which small embedding models have.

A layer with a sliding window of W tokens sees W - 1 to either side of its own.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch_npu
from vllm.config import VllmConfig
from vllm.v1.attention.backend import (
    AttentionImpl,
    AttentionLayer,
    AttentionMetadata,
    AttentionMetadataBuilder,
    AttentionType,
    CommonAttentionMetadata,
)
from vllm.v1.kv_cache_interface import AttentionSpec

from vllm_ascend.attention.metadata import causal_mask
from vllm_ascend.errors import ConfigError

MAX_SEQUENCES = 1024
"""Requests that one call of npu_fusion_attention takes."""

BAND = 4
"""`sparse_mode` of npu_fusion_attention; the band ends where `pre_tockens` and `next_tockens` say."""


@dataclass(frozen=True)
class BidirectionalMetadata(AttentionMetadata):
    """One step, R requests with T tokens in all."""

    request_ends: list[int]
    """Where each request's rows end: cumulative, R entries, the last is T."""
    mask: torch.Tensor
    """uint8 [2048, 2048], on the device, 1 above the diagonal; for layers with a window."""


class BidirectionalMetadataBuilder(AttentionMetadataBuilder[BidirectionalMetadata]):
    """Builds it. Raises ConfigError where a step could have more requests than the operator takes."""

    def __init__(
        self,
        kv_cache_spec: AttentionSpec,
        layer_names: list[str],
        vllm_config: VllmConfig,
        device: torch.device,
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        asked = vllm_config.scheduler_config.max_num_seqs
        if asked > MAX_SEQUENCES:
            raise ConfigError(
                f"max_num_seqs={asked} was asked, and attention without causality takes up to "
                f"{MAX_SEQUENCES} requests a step on NPUs; set --max-num-seqs to {MAX_SEQUENCES} or less"
            )
        self._mask = causal_mask(device).view(torch.uint8)

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> BidirectionalMetadata:
        common = common_attn_metadata
        ends = common.query_start_loc_cpu[1 : common.num_reqs + 1].tolist()
        return BidirectionalMetadata(request_ends=ends, mask=self._mask)


class BidirectionalAttention(AttentionImpl[BidirectionalMetadata]):
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
        attn_type: str = AttentionType.ENCODER_ONLY,
        kv_sharing_target_layer_name: str | None = None,
        sinks: torch.Tensor | None = None,
    ) -> None:
        # The selector does not ask for these.
        needed = {
            "ALiBi slopes": bool(alibi_slopes),
            "logits_soft_cap": bool(logits_soft_cap),
            "attention sinks": sinks is not None,
        }
        for name, is_needed in needed.items():
            if is_needed:
                raise ConfigError(
                    f"this model needs {name} in attention without causality, and an NPU engine does not do "
                    f"that yet"
                )
        assert kv_sharing_target_layer_name is None
        self.num_heads = num_heads
        self.head_size = head_size
        self.scale = scale
        self.num_kv_heads = num_kv_heads or num_heads
        self.kv_cache_dtype = kv_cache_dtype
        self._window = sliding_window

    def forward(
        self,
        layer: AttentionLayer,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: BidirectionalMetadata | None,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attend; the result goes to `output`, rows of padding tokens get zeros.

        query, output: [tokens, num_heads, head_size]; key, value: [tokens, num_kv_heads, head_size]; kv_cache
        is empty. Without metadata vLLM is measuring memory.
        """
        assert output_scale is None
        assert output_block_scale is None
        if attn_metadata is None:
            return output.zero_()
        ends = attn_metadata.request_ends
        num_tokens = ends[-1]
        output[:num_tokens] = torch_npu.npu_fusion_attention(
            query[:num_tokens],
            key[:num_tokens],
            value[:num_tokens],
            head_num=self.num_heads,
            input_layout="TND",
            scale=self.scale,
            actual_seq_qlen=ends,
            actual_seq_kvlen=ends,
            **self._visible(attn_metadata.mask),
        )[0]
        output[num_tokens:].zero_()
        return output

    def _visible(self, mask: torch.Tensor) -> dict[str, torch.Tensor | int]:
        """The operator's arguments that say which keys a row sees; without them it sees all."""
        if self._window is None:
            return {}
        # vLLM counts the row's own token to the window and the operator does not.
        reach = self._window - 1
        return {"atten_mask": mask, "sparse_mode": BAND, "pre_tockens": reach, "next_tockens": reach}
