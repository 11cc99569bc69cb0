# SPDX-License-Identifier: Apache-2.0
"""Attention in both directions as a layer calls it, against a formula, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from device.attention_formula import attend, band, everything
from vllm.config import SchedulerConfig, VllmConfig
from vllm.v1.kv_cache_interface import EncoderOnlyAttentionSpec, FullAttentionSpec

from vllm_ascend.attention.bidirectional import (
    BidirectionalAttention,
    BidirectionalMetadata,
    BidirectionalMetadataBuilder,
)
from vllm_ascend.attention.metadata import GroupedAttentionMetadataBuilder, causal_mask

HEADS, KV_HEADS, SIZE, SCALE = 4, 2, 24, 0.3
LENGTHS, NUM_PADDING_ROWS = [5, 1, 40], 3


@pytest.mark.parametrize(
    ("window", "reach"), [pytest.param(None, None, id="all"), pytest.param(8, 7, id="seven to either side")]
)
def test_every_request_is_attended_on_its_own(window: int | None, reach: int | None) -> None:
    draw = torch.Generator().manual_seed(8)
    rows = sum(LENGTHS) + NUM_PADDING_ROWS
    query = torch.randn(rows, HEADS, SIZE, generator=draw)
    key, value = torch.randn(2, rows, KV_HEADS, SIZE, generator=draw)
    layer = BidirectionalAttention(HEADS, SIZE, SCALE, KV_HEADS, sliding_window=window)
    metadata = BidirectionalMetadata([5, 6, 46], causal_mask(torch.device("npu:0")).view(torch.uint8))
    output = torch.full((rows, HEADS, SIZE), torch.nan, device="npu")
    on_npu = (each.to("npu") for each in (query, key, value))
    layer.forward(None, *on_npu, torch.empty(0), metadata, output)
    first = 0
    for length in LENGTHS:
        mine = slice(first, first + length)
        visible = everything(length, length) if reach is None else band(length, length, reach, reach, 0)
        expected, _ = attend(query[mine], key[mine], value[mine], visible, SCALE)
        torch.testing.assert_close(output[mine].cpu(), expected, rtol=1e-4, atol=1e-5)
        first += length
    assert output[first:].eq(0).all()


@pytest.mark.parametrize(
    ("feature", "name"),
    [
        pytest.param({"alibi_slopes": [0.5] * HEADS}, "ALiBi slopes", id="ALiBi"),
        pytest.param({"logits_soft_cap": 30.0}, "logits_soft_cap", id="capped scores"),
        pytest.param({"sinks": torch.zeros(HEADS)}, "attention sinks", id="sinks"),
    ],
)
def test_features_are_refused_by_name(feature: dict[str, Any], name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} in attention without causality"):
        BidirectionalAttention(HEADS, SIZE, SCALE, **feature)


def test_more_requests_than_the_operator_takes_are_refused() -> None:
    spec = EncoderOnlyAttentionSpec(block_size=16, num_kv_heads=2, head_size=24, dtype=torch.bfloat16)
    config = VllmConfig(scheduler_config=SchedulerConfig.default_factory(max_num_seqs=1025))
    with pytest.raises(ValueError, match="set --max-num-seqs to 1024 or less"):
        BidirectionalMetadataBuilder(spec, ["layer"], config, torch.device("npu:0"))


def test_a_cached_prompt_seen_in_both_directions_is_refused() -> None:
    spec = FullAttentionSpec(
        block_size=16, num_kv_heads=2, head_size=32, dtype=torch.bfloat16, non_causal=True
    )
    with pytest.raises(ValueError, match="sees its prompt in both directions"):
        GroupedAttentionMetadataBuilder(spec, ["layer"], None, torch.device("cpu"))
