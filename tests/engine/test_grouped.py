# SPDX-License-Identifier: Apache-2.0
"""Attention with grouped heads over vLLM's own cache in either layout, against a plain formula.

Two requests in two steps: a prompt in two chunks beside one that is decoded, the blocks of both in disorder.
What was never written is NaN, and so are the pages of other layers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from device.attention_formula import attend, band
from vllm.config import VllmConfig
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheGroupSpec,
    KVCacheTensor,
    compute_layout_strides,
)
from vllm.v1.kv_cache_layout import KVCacheLayout
from vllm.v1.worker.utils import allocate_kv_cache

from vllm_ascend.attention.grouped import GroupedAttention
from vllm_ascend.attention.metadata import GroupedAttentionMetadata, GroupedAttentionMetadataBuilder

HEADS, KV_HEADS, SIZE, BLOCK, NUM_BLOCKS = 4, 2, 32, 16, 8
SCALE = 0.2
LAYERS = ["first", "second", "third"]
BLOCK_TABLE = torch.tensor([[6, 2, 3], [5, 1, 7]], dtype=torch.int32)
STEPS = ([20, 5], [17, 1])
"""Tokens of each request that a step computes."""
PADDING = 3


@dataclass
class Layer:
    """As much of vLLM's layer as the metadata builder asks for."""

    kv_cache: torch.Tensor


@dataclass
class Cache:
    """vLLM's cache of LAYERS, all of it NaN; the metadata of a step on it."""

    layers: dict[str, torch.Tensor]
    builder: GroupedAttentionMetadataBuilder

    def metadata(self, before: list[int], new: list[int]) -> GroupedAttentionMetadata:
        lengths = torch.tensor([a + b for a, b in zip(before, new, strict=True)], dtype=torch.int32)
        starts = torch.tensor([0, new[0], sum(new)], dtype=torch.int32)
        slots = [
            int(blocks[token // BLOCK]) * BLOCK + token % BLOCK
            for blocks, first, count in zip(BLOCK_TABLE, before, new, strict=True)
            for token in range(first, first + count)
        ]
        return self.builder.build(
            0,
            CommonAttentionMetadata(
                query_start_loc=starts.to("npu"),
                query_start_loc_cpu=starts,
                seq_lens=lengths.to("npu"),
                seq_lens_cpu_upper_bound=lengths,
                num_reqs=2,
                num_actual_tokens=sum(new) + PADDING,
                max_query_len=max(new),
                max_seq_len=int(lengths.max()),
                block_table_tensor=BLOCK_TABLE.to("npu"),
                slot_mapping=torch.tensor([*slots, *[-1] * PADDING]).to("npu"),
            ),
        )


@pytest.fixture(
    params=[
        pytest.param(KVCacheLayout.LBHNC, id="token-major"),
        pytest.param(KVCacheLayout.BHLNC, id="head-major"),
    ]
)
def cache(request: pytest.FixtureRequest) -> Cache:
    layout: KVCacheLayout = request.param
    spec = FullAttentionSpec(block_size=BLOCK, num_kv_heads=KV_HEADS, head_size=SIZE, dtype=torch.float16)
    layer_stride, block_stride, *_ = compute_layout_strides(spec, NUM_BLOCKS, len(LAYERS), layout)
    num_bytes = NUM_BLOCKS * len(LAYERS) * spec.page_size_bytes
    config = KVCacheConfig(
        num_blocks=NUM_BLOCKS,
        kv_cache_tensors=[KVCacheTensor(num_bytes, LAYERS, layer_stride, block_stride)],
        kv_cache_groups=[KVCacheGroupSpec(LAYERS, spec)],
    )
    layers = allocate_kv_cache(config, torch.device("npu"), layout)
    for tensor in layers.values():
        tensor.fill_(torch.nan)
    vllm_config = VllmConfig()
    vllm_config.cache_config.kv_cache_layout = layout.name
    for name, tensor in layers.items():
        vllm_config.compilation_config.static_forward_context[name] = Layer(tensor)
    builder = GroupedAttentionMetadataBuilder(spec, LAYERS, vllm_config, torch.device("npu"))
    return Cache(layers, builder)


@pytest.mark.parametrize(
    "wishes",
    [
        pytest.param({}, id="all keys"),
        pytest.param({"sliding_window": 9}, id="a window of nine"),
        pytest.param({"logits_soft_cap": 1.5}, id="capped scores"),
        pytest.param({"sinks": torch.tensor([0.5, -1.0, 2.0, 0.0])}, id="a sink for each head"),
    ],
)
def test_two_steps_attend_to_what_was_stored(cache: Cache, wishes: dict[str, Any]) -> None:
    check(cache, wishes)


class ThreeAtOnce(GroupedAttention):
    max_sequences = 3


def test_sequences_of_a_step_may_take_several_calls(cache: Cache) -> None:
    check(cache, {}, ThreeAtOnce)


def check(cache: Cache, wishes: dict[str, Any], kind: type[GroupedAttention] = GroupedAttention) -> None:
    sinks = wishes.get("sinks")
    on_device = {**wishes, "sinks": sinks.to("npu", torch.float16)} if sinks is not None else wishes
    attention = kind(HEADS, SIZE, SCALE, KV_HEADS, **on_device)
    draw = torch.Generator().manual_seed(3)
    before, stored = [0, 0], [[], []]
    for new in STEPS:
        rows = sum(new) + PADDING
        query, key, value = (
            torch.randn(rows, heads, SIZE, generator=draw).half() for heads in (HEADS, KV_HEADS, KV_HEADS)
        )
        output = torch.full_like(query, 7).to("npu")
        metadata = cache.metadata(before, new)
        inputs = (tensor.to("npu") for tensor in (query, key, value))
        attention.forward(None, *inputs, cache.layers["second"], metadata, output)
        found = output.cpu()
        assert not found[sum(new) :].any()
        first = 0
        for request, count in enumerate(new):
            own = slice(first, first + count)
            stored[request].append((key[own], value[own]))
            keys, values = (torch.cat(parts) for parts in zip(*stored[request], strict=True))
            expected = formula(query[own], keys, values, wishes)
            torch.testing.assert_close(found[own].float(), expected, rtol=2**-9, atol=2**-9)
            before[request] += count
            first += count
    for other in ("first", "third"):
        assert cache.layers[other].isnan().all()


def formula(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, wishes: dict[str, Any]
) -> torch.Tensor:
    """The last query row sees all keys, or the last of them."""
    seen = wishes.get("sliding_window", len(keys))
    visible = band(len(query), len(keys), before=seen - 1, after=0, shift=len(keys) - len(query))
    if cap := wishes.get("logits_soft_cap"):
        return capped(query, keys, values, visible, cap)
    return attend(query, keys, values, visible, SCALE, wishes.get("sinks"))[0]


def capped(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, visible: torch.Tensor, cap: float
) -> torch.Tensor:
    heads = []
    for head in range(HEADS):
        kv = head // (HEADS // KV_HEADS)
        scores = cap * torch.tanh(SCALE * query[:, head].double() @ keys[:, kv].double().T / cap)
        heads.append(scores.masked_fill(~visible, -torch.inf).softmax(-1) @ values[:, kv].double())
    return torch.stack(heads, 1).float()
