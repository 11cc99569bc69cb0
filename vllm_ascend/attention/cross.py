# SPDX-License-Identifier: Apache-2.0
"""Attention of a decoder's rows to what an encoder made of a request's recording.

K and V are as many as the encoder gave and come once, with a request's first step. From then on each of its
rows sees all of them. They lie in pages of a KV cache group of their own, and the operators are those of
grouped heads.

vLLM wraps the backend of such layers (model_executor/layers/attention/cross_attention.py): encoders' lengths
stand in the place of requests' before metadata is built, and slots are worked out after it.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from vllm.config import VllmConfig
from vllm.v1.kv_cache_interface import AttentionSpec

from vllm_ascend.attention.grouped import EVERYTHING, GroupedAttention, put
from vllm_ascend.attention.metadata import GroupedAttentionMetadata, GroupedAttentionMetadataBuilder


class CrossAttentionMetadata(GroupedAttentionMetadata):
    """As that of grouped heads; `slots` are those of the decoder's tokens, which store nothing here."""

    # No field of a frozen dataclass: vLLM sets it when the rest is made.
    slot_mapping: torch.Tensor
    """int64 [rows that encoders gave in this step]: where their K and V go, as vLLM counts."""


class CrossAttentionMetadataBuilder(GroupedAttentionMetadataBuilder):
    """Builds the metadata of a group whose KV encoders gave."""

    metadata_cls: ClassVar[type[GroupedAttentionMetadata]] = CrossAttentionMetadata

    def __init__(
        self,
        kv_cache_spec: AttentionSpec,
        layer_names: list[str],
        vllm_config: VllmConfig,
        device: torch.device,
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self._mask = None


class CrossAttention(GroupedAttention):
    """Attention of one layer; key and value are None in steps in which no encoder ran."""

    def _store(
        self,
        key: torch.Tensor | None,
        value: torch.Tensor | None,
        key_cache: torch.Tensor,
        value_cache: torch.Tensor,
        metadata: GroupedAttentionMetadata,
    ) -> None:
        if key is None or value is None:
            return
        assert isinstance(metadata, CrossAttentionMetadata)
        put(key, value, key_cache, value_cache, metadata.paging.slots(metadata.slot_mapping))

    @staticmethod
    def _keys_seen(sliding_window: int | None) -> dict[str, int]:
        assert sliding_window is None
        return {"sparse_mode": EVERYTHING}
