# SPDX-License-Identifier: Apache-2.0
"""The scheduler's batch as the arrays that the NPU's attention operators want, built once per step.

The operators count differently from vLLM. Block b is entry 2 * b of the block table, since K and V are halves
of one page (cache_layout.py). Lengths are Python lists, since the operators plan on the host: query lengths
cumulative without a leading zero, KV lengths one by one. All layers of a step share the result.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from vllm.config import VllmConfig
from vllm.utils.math_utils import cdiv
from vllm.v1.attention.backend import (
    AttentionMetadata,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
)
from vllm.v1.kv_cache_interface import AttentionSpec, FullAttentionSpec

from vllm_ascend.attention.cache_layout import operator_block
from vllm_ascend.errors import ConfigError

MASK_SIZE = 2048
"""Side of the one mask that stands for causal masks of every size (sparse modes 2 to 4 of the operator)."""


@dataclass(frozen=True)
class GroupedAttentionMetadata(AttentionMetadata):
    """One step of one KV cache group, R requests with T tokens in all."""

    num_tokens: int
    """T. Rows of the model's batch beyond it are padding."""
    query_ends: list[int]
    """Where each request's query rows end: cumulative, R entries, the last is T."""
    kv_lengths: list[int]
    """Tokens in the KV cache of each request, those of this step included; R entries."""
    block_table: torch.Tensor
    """int32 [R, blocks of the longest request], on the device, counted in half-pages."""
    slots: torch.Tensor
    """int32 [T], on the device, counted in half-pages: where each token's K and V go. Negative: nowhere."""
    block_size: int
    """Tokens per block."""
    mask: torch.Tensor
    """int8 [2048, 2048], on the device, 1 above the diagonal."""


class GroupedAttentionMetadataBuilder(AttentionMetadataBuilder[GroupedAttentionMetadata]):
    """Builds the metadata of one KV cache group. Raises ConfigError for one that is not causal."""

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
        self._mask = causal_mask(device)
        self._drafts = vllm_config.speculative_config is not None

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
        return GroupedAttentionMetadata(
            num_tokens=num_tokens,
            query_ends=query_ends,
            kv_lengths=kv_lengths,
            block_table=operator_block(common.block_table_tensor[: common.num_reqs, :num_columns]),
            slots=operator_slots(common.slot_mapping[:num_tokens], self._block_size),
            block_size=self._block_size,
            mask=self._mask,
        )


def kv_lengths_of(common: CommonAttentionMetadata, drafts: bool) -> torch.Tensor:
    """int [requests], on the host: tokens in the KV cache of each, those of this step included.

    drafts: whether some of an earlier step may have been rejected.
    """
    if drafts:
        # The host knows a bound only; which drafts were rejected, the device knows, and it is waited for.
        return common.seq_lens[: common.num_reqs].cpu()
    assert common.seq_lens_cpu_upper_bound is not None
    return common.seq_lens_cpu_upper_bound[: common.num_reqs]


def operator_slots(slots: torch.Tensor, block_size: int) -> torch.Tensor:
    """vLLM's slots, block * block_size + offset, with the operators' block in place of vLLM's; int32.

    Negative slots stay negative.
    """
    blocks = torch.div(slots, block_size, rounding_mode="floor")
    offsets = slots - blocks * block_size
    return (operator_block(blocks) * block_size + offsets).to(torch.int32)


@functools.cache
def causal_mask(device: torch.device) -> torch.Tensor:
    """int8 [2048, 2048] on `device`, 1 (masked) above the diagonal; one per device and process."""
    return torch.ones(MASK_SIZE, MASK_SIZE, dtype=torch.int8, device=device).triu(1)
