# SPDX-License-Identifier: Apache-2.0
"""A drafter's batch, by hand."""

from __future__ import annotations

import pytest
import torch

from vllm_ascend.worker.drafting import copy_and_expand, last_kept, next_tokens, step

PAD = -1


def ints(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def test_a_step_moves_each_request_by_a_token() -> None:
    """Within a block, into the next block, and at the end of what the model can hold (12 tokens)."""
    lengths, positions, slots = ints(2, 4, 12), torch.tensor([1, 3, 11]), torch.full((5,), 777)
    table = torch.tensor([[5, 6, 7], [1, 9, 3], [4, 8, 2]], dtype=torch.int32)
    step(positions, table, 3, lengths, positions, slots, 4, 12, 3, PAD, 3)
    assert positions.tolist() == [2, 4, 0]
    assert slots.tolist() == [22, 36, PAD, PAD, PAD]
    assert lengths.tolist() == [3, 5, 1]


def test_rows_of_the_last_kept_tokens() -> None:
    """Three drafts of which one was kept; none; two, both kept."""
    rows, rejected = ints(0, 0, 0), ints(0, 0, 0)
    last_kept(ints(3, 3, 5), ints(2, 1, 3), ints(0, 4, 9, 12), rows, rejected, 3)
    assert rows.tolist() == [1, 8, 11]
    assert rejected.tolist() == [2, 0, 0]


def test_next_tokens() -> None:
    """Two kept; all three; a prompt that is not finished; nothing kept."""
    sampled = torch.tensor([[11, 12, -1], [21, 22, 23], [31, 32, 33], [-1, -1, -1]], dtype=torch.int32)
    tokens, counts = ints(0, 0, 0, 0), ints(0, 0, 0, 0)
    discarded = torch.tensor([False, False, True, False])
    next_tokens(sampled, discarded, ints(91, 92, 93, 94), tokens, counts, 50, 3, 4, 3, 4)
    assert tokens.tolist() == [12, 23, 93, 94]
    assert counts.tolist() == [2, 3, 0, 0]


@pytest.mark.parametrize(
    ("shifted", "slots", "tokens", "positions", "rejected", "masked", "new_rows", "hidden_rows"),
    [
        pytest.param(
            False,
            1,
            [10, 11, 12, 91, 20, 92, 7],
            [5, 6, 7, 8, 2, 3, 0],
            [6],
            [],
            [3, 5],
            [777] * 5,
            id="a draft model: one new token each, behind the kept ones",
        ),
        pytest.param(
            True,
            2,
            [11, 12, 91, 8, 92, 8, 7],
            [5, 6, 7, 8, 2, 3, 0],
            [6],
            [3, 5],
            [2, 3, 4, 5],
            [0, 1, 2, 4, 5],
            id="parallel drafting: a masked slot behind the new token, the first token left out",
        ),
    ],
)
def test_copy_and_expand(
    shifted: bool,
    slots: int,
    tokens: list[int],
    positions: list[int],
    rejected: list[int],
    masked: list[int],
    new_rows: list[int],
    hidden_rows: list[int],
) -> None:
    """Two requests: rows 0 to 2, all kept; rows 3 and 4, of which the second was rejected."""
    out_tokens, out_positions = torch.full((7,), 777, dtype=torch.int32), torch.full((7,), 777)
    is_rejected, is_masked = torch.zeros(7, dtype=torch.bool), torch.zeros(7, dtype=torch.bool)
    out_rows, out_hidden = ints(*[777] * (2 * slots)), ints(*[777] * 5)
    copy_and_expand(
        ints(10, 11, 12, 20, 21),
        torch.tensor([5, 6, 7, 2, 3]),
        ints(91, 92),
        out_tokens,
        out_positions,
        is_rejected,
        is_masked,
        out_rows,
        out_hidden,
        ints(0, 3, 5),
        ints(2, 3),
        7,
        8,
        5,
        slots,
        shifted,
        16,
    )
    assert out_tokens.tolist() == tokens
    assert out_positions.tolist() == positions
    assert is_rejected.nonzero().flatten().tolist() == rejected
    assert is_masked.nonzero().flatten().tolist() == masked
    assert out_rows.tolist() == new_rows
    assert out_hidden.tolist() == hidden_rows
