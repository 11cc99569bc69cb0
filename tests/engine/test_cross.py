# SPDX-License-Identifier: Apache-2.0
"""Attention to what encoders gave, through vLLM's wrapper of the backend, against a plain formula.

A request's keys and values come with its first step and are seen whole by each of its rows, then and later.
What was never written is NaN.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from device.attention_formula import attend, everything
from vllm.config import VllmConfig
from vllm.model_executor.layers.attention.cross_attention import create_cross_attention_backend
from vllm.v1.attention.backend import AttentionMetadata, AttentionMetadataBuilder, CommonAttentionMetadata
from vllm.v1.kv_cache_interface import (
    CrossAttentionSpec,
    KVCacheConfig,
    KVCacheGroupSpec,
    KVCacheTensor,
    compute_layout_strides,
)
from vllm.v1.kv_cache_layout import KVCacheLayout
from vllm.v1.worker.utils import allocate_kv_cache

from vllm_ascend.attention.backend import CrossAttentionBackend

HEADS, KV_HEADS, SIZE, BLOCK, NUM_BLOCKS, SCALE = 4, 2, 32, 16, 8, 0.2
BLOCK_TABLE = torch.tensor([[6, 2, 0], [5, 1, 7], [3, 0, 0]], dtype=torch.int32)
NUM_KEYS = [20, 35, 9]
"""Of each request."""
PADDING = 3


@dataclass
class Layer:
    """As much of vLLM's layer as is asked for."""

    kv_cache: torch.Tensor
    kv_sharing_target_layer_name: None = None


@dataclass(frozen=True)
class Step:
    requests: list[int]
    before: list[int]
    """Tokens of each request that earlier steps computed."""
    new: list[int]


STEPS = [
    Step([0, 1], [0, 0], [3, 2]),
    Step([0, 1, 2], [3, 2, 0], [1, 1, 4]),
    Step([0, 1, 2], [4, 3, 4], [1, 1, 1]),
]


@pytest.fixture(params=[KVCacheLayout.LBHNC, KVCacheLayout.BHLNC], ids=["token-major", "head-major"])
def layer_and_builder(request: pytest.FixtureRequest) -> tuple[Layer, AttentionMetadataBuilder]:
    layout: KVCacheLayout = request.param
    spec = CrossAttentionSpec(block_size=BLOCK, num_kv_heads=KV_HEADS, head_size=SIZE, dtype=torch.float16)
    layer_stride, block_stride, *_ = compute_layout_strides(spec, NUM_BLOCKS, 1, layout)
    config = KVCacheConfig(
        num_blocks=NUM_BLOCKS,
        kv_cache_tensors=[
            KVCacheTensor(NUM_BLOCKS * spec.page_size_bytes, ["cross"], layer_stride, block_stride)
        ],
        kv_cache_groups=[KVCacheGroupSpec(["cross"], spec)],
    )
    layer = Layer(allocate_kv_cache(config, torch.device("npu"), layout)["cross"].fill_(torch.nan))
    vllm_config = VllmConfig()
    vllm_config.cache_config.kv_cache_layout = layout.name
    vllm_config.compilation_config.static_forward_context["cross"] = layer
    backend = create_cross_attention_backend(CrossAttentionBackend)
    return layer, backend.get_builder_cls()(spec, ["cross"], vllm_config, torch.device("npu"))


def test_every_row_sees_all_that_its_encoder_gave(
    layer_and_builder: tuple[Layer, AttentionMetadataBuilder],
) -> None:
    layer, builder = layer_and_builder
    attention = create_cross_attention_backend(CrossAttentionBackend).get_impl_cls()(
        HEADS, SIZE, SCALE, KV_HEADS
    )
    draw = torch.Generator().manual_seed(3)
    given = [torch.randn(2, count, KV_HEADS, SIZE, generator=draw).half() for count in NUM_KEYS]
    for step in STEPS:
        query = torch.randn(sum(step.new) + PADDING, HEADS, SIZE, generator=draw).half()
        output = torch.full_like(query, 7).to("npu")
        come = [
            given[request] for request, before in zip(step.requests, step.before, strict=True) if not before
        ]
        key, value = torch.cat(come, dim=1).to("npu") if come else (None, None)
        attention.forward(layer, query.to("npu"), key, value, layer.kv_cache, metadata(builder, step), output)
        found = output.cpu()
        assert not found[sum(step.new) :].any()
        first = 0
        for request, count in zip(step.requests, step.new, strict=True):
            own = slice(first, first + count)
            expected, _ = attend(query[own], *given[request], everything(count, NUM_KEYS[request]), SCALE)
            torch.testing.assert_close(found[own].float(), expected, rtol=2**-9, atol=2**-9)
            first += count


def metadata(builder: AttentionMetadataBuilder, step: Step) -> AttentionMetadata:
    """As vLLM's runner has it made; slots of the decoder's own tokens mean nothing to these layers."""
    lengths = torch.tensor([a + b for a, b in zip(step.before, step.new, strict=True)], dtype=torch.int32)
    starts = torch.tensor([0, *np.cumsum(step.new)], dtype=torch.int32)
    encoded = np.array([NUM_KEYS[request] for request in step.requests], dtype=np.int32)
    return builder.build(
        0,
        CommonAttentionMetadata(
            query_start_loc=starts.to("npu"),
            query_start_loc_cpu=starts,
            seq_lens=lengths.to("npu"),
            seq_lens_cpu_upper_bound=lengths,
            num_reqs=len(step.requests),
            num_actual_tokens=sum(step.new) + PADDING,
            max_query_len=max(step.new),
            max_seq_len=int(lengths.max()),
            block_table_tensor=BLOCK_TABLE[step.requests].to("npu"),
            slot_mapping=torch.full((sum(step.new) + PADDING,), -1).to("npu"),
            encoder_seq_lens=torch.from_numpy(encoded).to("npu"),
            encoder_seq_lens_cpu=encoded,
        ),
    )
