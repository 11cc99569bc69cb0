# SPDX-License-Identifier: Apache-2.0
"""The scheduler's batch as latent attention wants it, built once per step.

Requests with one new token come first (vLLM reorders the batch) and are decoded over the cache. The others
are prefilled: what they have in the cache already is read back in chunks. vLLM plans the chunks, by the
memory it reserved when it measured; this file says where their tokens lie.
"""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from vllm.config import VllmConfig
from vllm.model_executor.layers.attention.mla_attention import (
    MLACommonMetadataBuilder,
    plan_mla_context_chunks,
)
from vllm.utils.math_utils import cdiv
from vllm.v1.attention.backend import (
    AttentionMetadata,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
)
from vllm.v1.attention.backends.utils import split_decodes_and_prefills
from vllm.v1.kv_cache_interface import AttentionSpec

from vllm_ascend.attention.metadata import causal_mask, kv_lengths_of
from vllm_ascend.attention.paging import Paging, latent_paging

if TYPE_CHECKING:
    from vllm_ascend.attention.latent import LatentPrefill


@dataclass(frozen=True)
class LatentDecodeMetadata:
    """R requests with one new token each."""

    block_table: torch.Tensor
    """int32 [R, blocks of the longest request], on the device, counted in pages (paging.py)."""
    kv_lengths: torch.Tensor
    """int32 [R], on the host: tokens in the cache, the new one included."""


@dataclass(frozen=True)
class ContextChunk:
    """Cached tokens of neighbouring prefill requests, as many as may be decompressed at once."""

    query_rows: slice
    """New tokens of these requests, counted from the first prefill token."""
    query_ends: list[int]
    """Where each request's new tokens end, counted from the first of `query_rows`."""
    kv_ends: list[int]
    """Where each request's cached tokens end in `slots`."""
    slots: torch.Tensor
    """int64 [cached tokens], on the device: where they lie, page * block_size + offset."""


@dataclass(frozen=True)
class LatentPrefillMetadata:
    """Requests with more than one new token."""

    query_ends: list[int]
    """Where each request's new tokens end, counted from the first prefill token."""
    chunks: list[ContextChunk]
    """All cached tokens of all these requests."""
    mask: torch.Tensor
    """int8 [2048, 2048], on the device, 1 above the diagonal."""
    backend: LatentPrefill


@dataclass(frozen=True)
class LatentMetadata(AttentionMetadata):
    """One step of one KV cache group. vLLM's layer reads the first five by these names."""

    num_actual_tokens: int
    num_decodes: int
    num_decode_tokens: int
    num_prefills: int
    decode: LatentDecodeMetadata | None
    prefill: LatentPrefillMetadata | None


class LatentMetadataBuilder(AttentionMetadataBuilder[LatentMetadata]):
    """Builds the metadata of one KV cache group."""

    reorder_batch_threshold = 1

    def __init__(
        self,
        kv_cache_spec: AttentionSpec,
        layer_names: list[str],
        vllm_config: VllmConfig,
        device: torch.device,
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self._block_size = kv_cache_spec.block_size
        self._mask = causal_mask(device)
        self._drafts = vllm_config.speculative_config is not None
        self._max_decompressed = MLACommonMetadataBuilder.determine_chunked_prefill_workspace_size(
            vllm_config
        )
        layer = vllm_config.compilation_config.static_forward_context[layer_names[0]]
        self._prefill: LatentPrefill = layer.prefill_backend.clone()
        self._layer = layer

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> LatentMetadata:
        common = common_attn_metadata
        num_decodes, num_prefills, num_decode_tokens, _ = split_decodes_and_prefills(common)
        kv_lengths = kv_lengths_of(common, self._drafts)
        prefill = None
        if num_prefills:
            prefill = self._prefill_metadata(common, kv_lengths, num_decodes)
            self._prefill.prepare_metadata(prefill)  # type: ignore[arg-type]  # vLLM's type is its own
        return LatentMetadata(
            num_actual_tokens=common.num_actual_tokens,
            num_decodes=num_decodes,
            num_decode_tokens=num_decode_tokens,
            num_prefills=num_prefills,
            decode=self._decode_metadata(common, kv_lengths[:num_decodes]) if num_decodes else None,
            prefill=prefill,
        )

    def _decode_metadata(
        self, common: CommonAttentionMetadata, kv_lengths: torch.Tensor
    ) -> LatentDecodeMetadata:
        num_columns = cdiv(int(kv_lengths.max()), self._block_size)
        # A copy: the runner changes its lengths for the next step while this one may still be waiting.
        return LatentDecodeMetadata(
            block_table=self._paging.block_table(common.block_table_tensor[: len(kv_lengths), :num_columns]),
            kv_lengths=kv_lengths.to(torch.int32, copy=True),
        )

    def _prefill_metadata(
        self, common: CommonAttentionMetadata, kv_lengths: torch.Tensor, first: int
    ) -> LatentPrefillMetadata:
        starts = common.query_start_loc_cpu[first : common.num_reqs + 1]
        query_ends = (starts[1:] - starts[0]).tolist()
        context_lengths = (kv_lengths[first:] - starts.diff()).tolist()
        return LatentPrefillMetadata(
            query_ends=query_ends,
            chunks=context_chunks(
                context_lengths,
                query_ends,
                self._paging.block_table(common.block_table_tensor[first : common.num_reqs]),
                self._block_size,
                self._max_decompressed,
            ),
            mask=self._mask,
            backend=self._prefill,
        )

    @functools.cached_property
    def _paging(self) -> Paging:
        # Builders are made before the cache, whose strides tell how many layers lie between two blocks.
        return latent_paging(self._layer.kv_cache)


def context_chunks(
    context_lengths: list[int],
    query_ends: list[int],
    block_table: torch.Tensor,
    block_size: int,
    max_tokens: int,
) -> list[ContextChunk]:
    """All cached tokens of prefill requests, in chunks of up to `max_tokens`; a request may span several.

    context_lengths: cached tokens of each request; query_ends: where their new tokens end; block_table: int32
    [requests, columns], counted in pages, on the device where the chunks are wanted.
    """
    plans = plan_mla_context_chunks(context_lengths, max_tokens, max_tokens, 1, lambda rows: rows)
    bounds = [0, *query_ends]
    chunks = []
    for plan in plans:
        first_row = bounds[plan.request_start]
        chunks.append(
            ContextChunk(
                query_rows=slice(first_row, bounds[plan.request_end]),
                query_ends=[end - first_row for end in bounds[plan.request_start + 1 : plan.request_end + 1]],
                kv_ends=list(itertools.accumulate(plan.seq_lens)),
                slots=_slots(
                    block_table[plan.request_start : plan.request_end], plan.starts, plan.seq_lens, block_size
                ),
            )
        )
    return chunks


def _slots(block_table: torch.Tensor, starts: list[int], lengths: list[int], block_size: int) -> torch.Tensor:
    """Slots of `lengths` tokens from `starts` of each request, int64, on the block table's device."""
    requests = np.repeat(np.arange(len(lengths)), lengths)
    tokens = np.concatenate([np.arange(start, start + n) for start, n in zip(starts, lengths, strict=True)])
    columns, offsets = np.divmod(tokens, block_size)
    at = torch.from_numpy(np.stack((requests, columns, offsets))).to(block_table.device)
    slots: torch.Tensor = block_table[at[0], at[1]].to(torch.int64) * block_size + at[2]
    return slots
