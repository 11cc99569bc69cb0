# SPDX-License-Identifier: Apache-2.0
"""A batch as the operators count it: blocks of half-pages, cumulative query lengths, plain KV lengths."""

from __future__ import annotations

import pytest
import torch
from vllm.config import VllmConfig
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.kv_cache_interface import FullAttentionSpec

from vllm_ascend.attention.metadata import GroupedAttentionMetadataBuilder, kv_lengths_of
from vllm_ascend.attention.paging import Paging, head_paging

BLOCK_SIZE = 16
NUM_PADDING_TOKENS = 3


@pytest.mark.parametrize(
    ("slot", "expected"),
    [
        pytest.param(0, 0, id="first token of block 0"),
        pytest.param(15, 15, id="last token of block 0"),
        pytest.param(16, 32, id="first token of block 1, whose key half is half-page 2"),
        pytest.param(5 * 16 + 7, 10 * 16 + 7, id="token 7 of block 5"),
    ],
)
def test_slots_count_half_pages(slot: int, expected: int) -> None:
    slots = Paging(BLOCK_SIZE).slots(torch.tensor([slot]))
    assert slots.dtype is torch.int32
    assert slots.tolist() == [expected]


def head_major() -> Paging:
    """Of a layer with two heads, in blocks that have three layers: 12 half-pages of a block, 6 of a head."""
    blocks = torch.zeros(4, 2, 3, BLOCK_SIZE, 64)
    return head_paging(blocks[:, :, 1])


def test_head_major_each_head_has_slots_of_its_own() -> None:
    # Token 7 of block 5: half-pages 60 and 66.
    assert head_major().slots(torch.tensor([0, 5 * 16 + 7])).tolist() == [0, 96, 60 * 16 + 7, 66 * 16 + 7]


def test_head_major_each_head_has_a_block_table_of_its_own() -> None:
    blocks = torch.tensor([[3, 4], [1, 0]], dtype=torch.int32)
    table = head_major().block_table(blocks)
    assert table.dtype is torch.int32
    assert table.tolist() == [[36, 48], [12, 0], [42, 54], [18, 6]]


@pytest.mark.parametrize("paging", [Paging(BLOCK_SIZE), head_major()])
def test_slots_of_padding_stay_negative(paging: Paging) -> None:
    assert (paging.slots(torch.tensor([-1])) < 0).all()


def test_a_step_with_a_chunk_and_a_decode() -> None:
    """Request 0 computes tokens 16 to 19 of its prompt (blocks 3, 4); request 1 decodes token 8 (block 9)."""
    spec = FullAttentionSpec(block_size=BLOCK_SIZE, num_kv_heads=2, head_size=32, dtype=torch.bfloat16)
    config = VllmConfig()
    config.cache_config.kv_cache_layout = "LBHNC"
    builder = GroupedAttentionMetadataBuilder(spec, ["layer"], config, torch.device("cpu"))
    starts = torch.tensor([0, 4, 5], dtype=torch.int32)
    lengths = torch.tensor([20, 9], dtype=torch.int32)
    built = builder.build(
        0,
        CommonAttentionMetadata(
            query_start_loc=starts,
            query_start_loc_cpu=starts,
            seq_lens=lengths,
            seq_lens_cpu_upper_bound=lengths,
            num_reqs=2,
            num_actual_tokens=5 + NUM_PADDING_TOKENS,
            max_query_len=4,
            max_seq_len=20,
            block_table_tensor=torch.tensor([[3, 4, 0, 0], [9, 0, 0, 0]], dtype=torch.int32),
            slot_mapping=torch.tensor([64, 65, 66, 67, 152, *[-1] * NUM_PADDING_TOKENS]),
        ),
    )
    assert built.num_tokens == 5
    assert built.query_ends == [4, 5]
    assert built.kv_lengths == [20, 9]
    assert built.block_table.tolist() == [[6, 8], [18, 0]]
    assert built.slots.tolist() == [128, 129, 130, 131, 296]
    assert built.paging.block_size == BLOCK_SIZE
    assert built.mask.dtype is torch.int8
    assert built.mask[:3, :3].tolist() == [[0, 1, 1], [0, 0, 1], [0, 0, 0]]


@pytest.mark.parametrize(
    ("drafts", "expected"),
    [
        pytest.param(True, [18, 9], id="drafts: what the device knows, after two were rejected"),
        pytest.param(False, [20, 9], id="no drafts: what the host knows, without waiting"),
    ],
)
def test_lengths_after_rejected_drafts(drafts: bool, expected: list[int]) -> None:
    starts = torch.tensor([0, 4, 5], dtype=torch.int32)
    common = CommonAttentionMetadata(
        query_start_loc=starts,
        query_start_loc_cpu=starts,
        seq_lens=torch.tensor([18, 9, 777], dtype=torch.int32, device="npu"),
        seq_lens_cpu_upper_bound=torch.tensor([20, 9, 777], dtype=torch.int32),
        num_reqs=2,
        num_actual_tokens=5,
        max_query_len=4,
        max_seq_len=20,
        block_table_tensor=torch.zeros(2, 4, dtype=torch.int32),
        slot_mapping=torch.zeros(5, dtype=torch.int64),
    )
    lengths = kv_lengths_of(common, drafts)
    assert lengths.device.type == "cpu"
    assert lengths.tolist() == expected
