# SPDX-License-Identifier: Apache-2.0
"""torch versions of the kernels that vLLM writes in Triton, registered in their place.

One kernel lies on the path of every engine: the slot of each token of a batch. Its parameters are the Triton
kernel's, in the same order. Those of speculative decoding are in `acceptance` and `drafting`.
"""

from __future__ import annotations

import functools

import torch

from vllm_ascend.worker import acceptance, drafting


@functools.cache
def register() -> None:
    """Put the kernels below in the place of vLLM's; once per process."""
    from vllm.triton_utils.dispatcher import register_kernels

    register_kernels(
        {
            "vllm.v1.worker.block_table.ComputeSlotMappingKernel.kernel": compute_slot_mapping,
            **acceptance.KERNELS,
            **drafting.KERNELS,
        }
    )


def compute_slot_mapping(
    num_tokens: int,
    max_num_tokens: int,
    query_start_loc: torch.Tensor,
    positions: torch.Tensor,
    block_table: torch.Tensor,
    block_table_stride: int,
    slot_mapping: torch.Tensor,
    kv_cache_block_size: int,
    total_cp_world_size: int,
    total_cp_rank: int,
    cp_kv_cache_interleave_size: int,
    pad_id: int,
    block_size: int,
) -> None:
    """Write the cache slot of every token of a batch: block * block size + offset in the block.

    query_start_loc: int32 [num_reqs + 1 or more], where each request's tokens start; positions: int64
    [num_tokens]; block_table: int32 [max_num_reqs, block_table_stride]; slot_mapping: int64 [max_num_tokens],
    written: the first `num_tokens` entries with slots, the rest with `pad_id`. `block_size` is the Triton
    kernel's tile and not used. Context parallelism (a world size above 1) is refused by the platform.
    """
    assert total_cp_world_size == 1
    tokens = torch.arange(num_tokens, dtype=query_start_loc.dtype, device=query_start_loc.device)
    requests = torch.searchsorted(query_start_loc, tokens, right=True) - 1
    positions = positions[:num_tokens]
    blocks = block_table[requests, positions // kv_cache_block_size]
    slot_mapping[:num_tokens] = blocks * kv_cache_block_size + positions % kv_cache_block_size
    slot_mapping[num_tokens:max_num_tokens] = pad_id
