# SPDX-License-Identifier: Apache-2.0
"""Slots of a batch's tokens: block * block size + offset, by hand."""

import pytest
import torch

from vllm_ascend.worker.kernels import compute_slot_mapping

PAD = -1
UNTOUCHED = 777


@pytest.mark.parametrize(
    ("query_starts", "positions", "table", "expected"),
    [
        pytest.param([0, 3], [0, 1, 2], [[5, 0]], [20, 21, 22], id="a prompt within one block"),
        pytest.param([0, 3], [3, 4, 5], [[5, 9]], [23, 36, 37], id="a chunk across two blocks"),
        pytest.param(
            [0, 1, 3, 4], [7, 0, 1, 4], [[1, 2], [3, 0], [6, 8]], [11, 12, 13, 32], id="several requests"
        ),
        pytest.param(
            [0, 2, 2, 3], [0, 1, 4], [[1, 2], [3, 3], [6, 8]], [4, 5, 32], id="a request without tokens"
        ),
        pytest.param([0, 0], [], [[5, 0]], [], id="nothing to do"),
    ],
)
def test_slots(
    query_starts: list[int], positions: list[int], table: list[list[int]], expected: list[int]
) -> None:
    num_tokens, max_num_tokens = len(positions), 6
    slots = torch.full((max_num_tokens + 1,), UNTOUCHED)
    compute_slot_mapping(
        num_tokens,
        max_num_tokens,
        torch.tensor(query_starts, dtype=torch.int32),
        torch.tensor(positions, dtype=torch.int64),
        torch.tensor(table, dtype=torch.int32),
        2,
        slots,
        4,
        1,
        0,
        1,
        PAD,
        1024,
    )
    assert slots.tolist() == [*expected, *[PAD] * (max_num_tokens - num_tokens), UNTOUCHED]
