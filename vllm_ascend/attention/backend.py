# SPDX-License-Identifier: Apache-2.0
"""What vLLM's attention selector asks before it takes one of the backends: types, sizes, layouts.

There are four: grouped heads and latents (MLA), both over paged KV; grouped heads over KV that came from an
encoder; and attention in both directions, which keeps none. Which one a layer gets is NPUPlatform's answer.

A feature that is not listed here (ALiBi, FP8 caches) is refused by name: by the selector, or by the
implementation where the selector does not ask.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import torch
from vllm.v1.attention.backend import AttentionBackend, AttentionType, MultipleOf
from vllm.v1.kv_cache_layout import KVCacheLayout

from vllm_ascend.attention.layout_option import HEAD_MAJOR, TOKEN_MAJOR

if TYPE_CHECKING:
    from vllm.config.cache import CacheDType
    from vllm.v1.kv_cache_interface import KVCacheSpec

    from vllm_ascend.attention.bidirectional import BidirectionalAttention, BidirectionalMetadataBuilder
    from vllm_ascend.attention.cross import CrossAttention, CrossAttentionMetadataBuilder
    from vllm_ascend.attention.grouped import GroupedAttention
    from vllm_ascend.attention.latent import LatentAttention
    from vllm_ascend.attention.latent_metadata import LatentMetadataBuilder
    from vllm_ascend.attention.metadata import GroupedAttentionMetadataBuilder

PREFERRED_BLOCK_SIZE = 128
"""Tokens per block for which the paged operators are made."""
MAX_BLOCK_SIZE = 1024
MAX_HEAD_SIZE = 512
BLOCK_SIZE_STEP = HEAD_SIZE_STEP = 16

MAX_LATENT_BLOCK_SIZE = 128
MAX_LATENT_ROW_SIZE = 576
"""Elements of a latent and its rotated part, as DeepSeek-V2 and V3 have them (512 + 64)."""

MAX_UNPAGED_HEAD_SIZE = 768


class _NPUBackend(AttentionBackend):
    """What holds for all; CUSTOM in vLLM's registry of backends."""

    # The device has the last word on float32: NPUPlatform.check_if_supports_dtype.
    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.bfloat16, torch.float16, torch.float32]
    supported_kv_cache_dtypes: ClassVar[list[CacheDType]] = ["auto", "float16", "bfloat16"]

    @staticmethod
    def get_name() -> str:
        return "CUSTOM"

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        """A layer's blocks lie one after the other, each in one piece; see attention/cache_layout.py."""
        return (TOKEN_MAJOR,)


class _PagedBackend(_NPUBackend):
    """What holds for those with a KV cache."""

    max_block_size: ClassVar[int]
    max_head_size: ClassVar[int]

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: KVCacheSpec | None = None) -> list[int | MultipleOf]:
        return [MultipleOf(BLOCK_SIZE_STEP)]

    @classmethod
    def supports_block_size(cls, block_size: int | None) -> bool:
        return block_size is None or (block_size % BLOCK_SIZE_STEP == 0 and block_size <= cls.max_block_size)

    @classmethod
    def get_preferred_block_size(cls, default_block_size: int) -> int:
        return PREFERRED_BLOCK_SIZE

    @classmethod
    def supports_head_size(cls, head_size: int) -> bool:
        return head_size % HEAD_SIZE_STEP == 0 and head_size <= cls.max_head_size

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        """Token-major unless asked otherwise; see attention/cache_layout.py."""
        return (TOKEN_MAJOR, HEAD_MAJOR)


class GroupedAttentionBackend(_PagedBackend):
    """Multi-head and grouped-query attention over paged KV."""

    max_block_size = MAX_BLOCK_SIZE
    max_head_size = MAX_HEAD_SIZE
    # The store needs slots as its operators count them, which the metadata has.
    forward_includes_kv_cache_update = True

    @staticmethod
    def get_impl_cls() -> type[GroupedAttention]:
        from vllm_ascend.attention.grouped import GroupedAttention

        return GroupedAttention

    @staticmethod
    def get_builder_cls() -> type[GroupedAttentionMetadataBuilder]:
        from vllm_ascend.attention.metadata import GroupedAttentionMetadataBuilder

        return GroupedAttentionMetadataBuilder

    @classmethod
    def supports_sliding_window(cls) -> bool:
        return True

    @classmethod
    def supports_sink(cls) -> bool:
        return True


class CrossAttentionBackend(GroupedAttentionBackend):
    """The same heads over KV that the request's encoder gave, in pages of a group of their own."""

    @classmethod
    def supports_attn_type(cls, attn_type: str) -> bool:
        return attn_type == AttentionType.ENCODER_DECODER

    @classmethod
    def supports_kv_connector(cls) -> bool:
        return False

    @staticmethod
    def get_impl_cls() -> type[CrossAttention]:
        from vllm_ascend.attention.cross import CrossAttention

        return CrossAttention

    @staticmethod
    def get_builder_cls() -> type[CrossAttentionMetadataBuilder]:
        from vllm_ascend.attention.cross import CrossAttentionMetadataBuilder

        return CrossAttentionMetadataBuilder


class LatentAttentionBackend(_PagedBackend):
    """Latent attention (MLA) over paged rows of a latent and its rotated part."""

    max_block_size = MAX_LATENT_BLOCK_SIZE
    max_head_size = MAX_LATENT_ROW_SIZE

    @classmethod
    def is_mla(cls) -> bool:
        return True

    @staticmethod
    def get_impl_cls() -> type[LatentAttention]:
        from vllm_ascend.attention.latent import LatentAttention

        return LatentAttention

    @staticmethod
    def get_builder_cls() -> type[LatentMetadataBuilder]:
        from vllm_ascend.attention.latent_metadata import LatentMetadataBuilder

        return LatentMetadataBuilder


class BidirectionalAttentionBackend(_NPUBackend):
    """Attention in both directions within each request of a step, without a KV cache."""

    @classmethod
    def supports_attn_type(cls, attn_type: str) -> bool:
        return attn_type == AttentionType.ENCODER_ONLY

    @classmethod
    def supports_head_size(cls, head_size: int) -> bool:
        return head_size <= MAX_UNPAGED_HEAD_SIZE

    @classmethod
    def supports_kv_connector(cls) -> bool:
        return False

    @classmethod
    def supports_sliding_window(cls) -> bool:
        return True

    @staticmethod
    def get_impl_cls() -> type[BidirectionalAttention]:
        from vllm_ascend.attention.bidirectional import BidirectionalAttention

        return BidirectionalAttention

    @staticmethod
    def get_builder_cls() -> type[BidirectionalMetadataBuilder]:
        from vllm_ascend.attention.bidirectional import BidirectionalMetadataBuilder

        return BidirectionalMetadataBuilder
