# SPDX-License-Identifier: Apache-2.0
"""The scheduler's batch as the arrays that the NPU's attention operators want, built once per step.

The operators count differently from vLLM: in half-pages, and head-major each KV head of a request is a
sequence of its own (paging.py). Lengths are Python lists, since the operators plan on the host: query lengths
cumulative without a leading zero, KV lengths one by one. All layers of a step share the result.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import ClassVar

import torch
from vllm.config import VllmConfig
from vllm.utils.math_utils import cdiv
from vllm.v1.attention.backend import (
    AttentionMetadata,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
)
from vllm.v1.kv_cache_interface import AttentionSpec, FullAttentionSpec

from vllm_ascend.attention.layout_option import is_head_major
from vllm_ascend.attention.paging import Paging, head_paging
from vllm_ascend.errors import ConfigError

MASK_SIZE = 2048
"""Side of the one mask that stands for causal masks of every size (sparse modes 2 to 4 of the operator)."""


@dataclass(frozen=True)
class GroupedAttentionMetadata(AttentionMetadata):
    """One step of one KV cache group, R requests with T tokens in all.

    To the operators these are S sequences: the requests, or head-major the first KV head of every request,
    then the second, and so on.
    """

    num_tokens: int
    """T. Rows of the model's batch beyond it are padding."""
    query_ends: list[int]
    """Where each sequence's query rows end: cumulative, S entries."""
    kv_lengths: list[int]
    """Tokens in the KV cache of each sequence, those of this step included; S entries."""
    block_table: torch.Tensor
    """int32 [S, blocks of the longest request], on the device, counted in half-pages."""
    slots: torch.Tensor
    """int32 [T * S / R], on the device: where each token's K and V go, head-major those of each of its heads.

    Counted in rows of half-pages. Negative: nowhere.
    """
    paging: Paging
    mask: torch.Tensor | None
    """int8 [2048, 2048], on the device, 1 above the diagonal; None: every row sees all KV of its sequence."""


class GroupedAttentionMetadataBuilder(AttentionMetadataBuilder[GroupedAttentionMetadata]):
    """Builds the metadata of one KV cache group. Raises ConfigError for one that is not causal."""

    metadata_cls: ClassVar[type[GroupedAttentionMetadata]] = GroupedAttentionMetadata

    def __init__(
        self,
        kv_cache_spec: AttentionSpec,
        layer_names: list[str],
        vllm_config: VllmConfig,
        device: torch.device,
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        if isinstance(kv_cache_spec, FullAttentionSpec) and kv_cache_spec.non_causal:
            raise ConfigError(
                "this model generates tokens and sees its prompt in both directions, and an NPU engine does "
                "not do that yet"
            )
        self._block_size = kv_cache_spec.block_size
        self._mask: torch.Tensor | None = causal_mask(device)
        self._drafts = vllm_config.speculative_config is not None
        self._head_major = is_head_major(vllm_config)
        self._forward_context = vllm_config.compilation_config.static_forward_context

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> GroupedAttentionMetadata:
        common = common_attn_metadata
        query_ends = common.query_start_loc_cpu[1 : common.num_reqs + 1].tolist()
        kv_lengths = kv_lengths_of(common, self._drafts).tolist()
        num_tokens = query_ends[-1]
        num_columns = cdiv(max(kv_lengths), self._block_size)
        paging = self._paging
        sequences = range(paging.num_sequences)
        return self.metadata_cls(
            num_tokens=num_tokens,
            query_ends=[sequence * num_tokens + end for sequence in sequences for end in query_ends],
            kv_lengths=kv_lengths * paging.num_sequences,
            block_table=paging.block_table(common.block_table_tensor[: common.num_reqs, :num_columns]),
            slots=paging.slots(common.slot_mapping[:num_tokens]),
            paging=paging,
            mask=self._mask,
        )

    @functools.cached_property
    def _paging(self) -> Paging:
        # Builders are made before the cache, whose strides tell how many layers lie between two heads.
        if not self._head_major:
            return Paging(self._block_size)
        return head_paging(self._forward_context[self.layer_names[0]].kv_cache)


def kv_lengths_of(common: CommonAttentionMetadata, drafts: bool) -> torch.Tensor:
    """int [requests], on the host: tokens in the KV cache of each, those of this step included.

    drafts: whether some of an earlier step may have been rejected.
    """
    if drafts:
        # The host knows a bound only; which drafts were rejected, the device knows, and it is waited for.
        return common.seq_lens[: common.num_reqs].cpu()
    assert common.seq_lens_cpu_upper_bound is not None
    return common.seq_lens_cpu_upper_bound[: common.num_reqs]


@functools.cache
def causal_mask(device: torch.device) -> torch.Tensor:
    """int8 [2048, 2048] on `device`, 1 (masked) above the diagonal; one per device and process."""
    return torch.ones(MASK_SIZE, MASK_SIZE, dtype=torch.int8, device=device).triu(1)
