# SPDX-License-Identifier: Apache-2.0
"""Which drafts are kept: four requests with three, one, no and two drafts, by hand."""

from __future__ import annotations

import pytest
import torch

from vllm_ascend.worker.acceptance import accept_greedy, accept_random, expand, recover

ENDS = [3, 4, 4, 6]
MAX_DRAFTS = 3
DRAFTS = [11, 12, 13, 21, 41, -1]
"""The last one is padding, which no model would have chosen."""
BONUS = [19, 29, 39, 49]
EMPTY = -1


def ints(values: list[int]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def empty_output() -> torch.Tensor:
    return torch.full((len(ENDS), MAX_DRAFTS + 1), EMPTY, dtype=torch.int32)


def greedy(best: list[int], is_greedy: list[bool] | None) -> list[list[int]]:
    output = empty_output()
    accept_greedy(
        output,
        ints(ENDS),
        ints(DRAFTS),
        torch.tensor(best),
        torch.tensor(BONUS)[:, None],
        None if is_greedy is None else torch.tensor(is_greedy),
        MAX_DRAFTS,
        None,
        None,
        False,
    )
    return output.tolist()


@pytest.mark.parametrize(
    ("best", "expected"),
    [
        pytest.param(
            [11, 12, 13, 21, 41, 42],
            [[11, 12, 13, 19], [21, 29, -1, -1], [39, -1, -1, -1], [41, 42, -1, -1]],
            id="all but the padding kept: a bonus for each, none behind padding",
        ),
        pytest.param(
            [11, 99, 13, 98, 97, 42],
            [[11, 99, -1, -1], [98, -1, -1, -1], [39, -1, -1, -1], [97, -1, -1, -1]],
            id="nothing is kept behind a rejected one, even if it agrees",
        ),
    ],
)
def test_greedy_requests_keep_what_the_model_would_have_chosen(
    best: list[int], expected: list[list[int]]
) -> None:
    assert greedy(best, None) == expected


def test_other_requests_are_left_as_they_are() -> None:
    assert greedy([11, 12, 13, 21, 41, 42], [False, True, False, False]) == [
        [EMPTY] * 4,
        [21, 29, EMPTY, EMPTY],
        [EMPTY] * 4,
        [EMPTY] * 4,
    ]


def random(draft_probs: torch.Tensor | None, uniform: list[float]) -> list[list[int]]:
    output = empty_output()
    target = torch.full((6, 50), 0.01)
    target[range(5), DRAFTS[:5]] = torch.tensor([0.5, 0.25, 1.0, 0.125, 0.5])
    accept_random(
        output,
        ints(ENDS),
        ints(DRAFTS),
        draft_probs,
        target,
        torch.tensor(BONUS)[:, None],
        ints([1, 2, 3, 4, 5, 6]),
        torch.tensor(uniform, dtype=torch.float64),
        torch.tensor([False, False, False, False]),
        MAX_DRAFTS,
        50,
        None,
        draft_probs is None,
        False,
    )
    return output.tolist()


def test_a_draft_is_kept_with_the_probability_that_the_model_gives_it() -> None:
    assert random(None, [0.49, 0.24, 0.99, 0.124, 0.51, 0.0]) == [
        [11, 12, 13, 19],
        [21, 29, -1, -1],
        [39, -1, -1, -1],
        [5, -1, -1, -1],
    ]
    assert random(None, [0.49, 0.26, 0.0, 0.126, 0.49, 0.0]) == [
        [11, 2, -1, -1],
        [4, -1, -1, -1],
        [39, -1, -1, -1],
        [41, 6, -1, -1],
    ]


def test_a_draft_that_was_unlikely_is_kept_more_often() -> None:
    draft_probs = torch.full((6, 50), 0.5)
    draft_probs[3, 21] = 0.25
    draft_probs[0, 11] = 0.0
    # 0.125 / 0.25 for the second request; the first's draft cannot have been drawn, and is rejected.
    assert random(draft_probs, [0.0, 0.0, 0.0, 0.49, 0.99, 0.0])[:2] == [[1, -1, -1, -1], [21, 29, -1, -1]]
    assert random(draft_probs, [0.0, 0.0, 0.0, 0.51, 0.99, 0.0])[1] == [4, -1, -1, -1]


def test_each_request_s_value_goes_to_all_its_tokens() -> None:
    output = torch.zeros(6)
    expand(output, torch.tensor([0.5, -1.0, 7.0, 2.0]), ints(ENDS), -1, 1, 32)
    assert output.tolist() == [0.5, 0.5, 0.5, 1.0, 2.0, 2.0]


def recovered(draft_probs: torch.Tensor | None) -> list[int]:
    output = ints([EMPTY] * 3)
    target = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.6, 0.3], [0.4, 0.4, 0.2]])
    noise = torch.tensor([[1.0, 1.0, 1.0], [1.0, 1.0, 10.0]])
    recover(output, ints([2, 3]), ints([0, 1, 0]), draft_probs, target, noise, 3, 8192, False, False)
    return output.tolist()


def test_a_rejected_draft_s_place_is_drawn_from_what_is_left() -> None:
    # Without the drafts: 0.3 of [-, 0.3, 0.2]; 0.3 of [0.1, -, 0.3]; 10 * 0.2 of [-, 0.4, 0.2].
    assert recovered(None) == [1, 2, 2]
    # Above the drafter: [0, 0, 0.2]; [0.1, 0, 0]; [0, 0.2, 0].
    draft_probs = torch.tensor([[0.7, 0.3, 0.0], [0.0, 0.7, 0.3], [0.5, 0.2, 0.3]])
    assert recovered(draft_probs) == [2, 0, 1]
