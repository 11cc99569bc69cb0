# SPDX-License-Identifier: Apache-2.0
"""The operators that take tokens to their experts and back, against plain formulas, token by token."""

import math
from typing import Any

import pytest
import torch
import torch_npu
from device.operator_support import HALVES, assert_near, emulator_only, int32, random

DTYPES = [*HALVES, torch.float32]


def chosen(
    logits: list[float], k: int, scoring: str, bias: list[float], groups: int, kept: int
) -> tuple[list[int], list[float]]:
    """One token's experts, best first, and its weights before any scale."""
    exponentials = [math.exp(x) for x in logits]
    scores = (
        [e / sum(exponentials) for e in exponentials]
        if scoring == "softmax"
        else [e / (1 + e) for e in exponentials]
    )
    biased = [score + b for score, b in zip(scores, bias, strict=True)]
    size = len(logits) // groups
    members = [sorted(biased[g * size : (g + 1) * size], reverse=True) for g in range(groups)]
    worth = [sum(best[:2]) if any(bias) else best[0] for best in members]
    allowed = sorted(range(groups), key=lambda g: -worth[g])[:kept]
    experts = sorted((e for e in range(len(logits)) if e // size in allowed), key=lambda e: -biased[e])[:k]
    weights = [scores[e] for e in experts]
    return experts, weights if scoring == "softmax" else [w / sum(weights) for w in weights]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("scoring", "with_bias", "experts", "groups", "kept", "k", "scale"),
    [
        pytest.param("softmax", False, 8, 1, 1, 2, 1.0, id="softmax over eight experts"),
        pytest.param("softmax", True, 16, 1, 1, 4, 1.0, id="softmax with a bias on the choice"),
        pytest.param("softmax", False, 16, 4, 2, 3, 16.0, id="softmax within the best groups, scaled"),
        pytest.param("sigmoid", True, 32, 8, 4, 6, 2.5, id="sigmoid with a bias within groups, scaled"),
        pytest.param("sigmoid", False, 60, 1, 1, 60, 1.0, id="sigmoid, every expert chosen"),
    ],
)
def test_gating(
    scoring: str,
    with_bias: bool,
    experts: int,
    groups: int,
    kept: int,
    k: int,
    scale: float,
    dtype: torch.dtype,
) -> None:
    logits = torch.stack(
        [torch.randperm(experts, generator=torch.Generator().manual_seed(t)) for t in range(5)]
    )
    logits = (logits / experts * 4 - 2).to(dtype)  # apart, in every type
    bias = (random(experts, dtype=dtype) / 64) if with_bias else None
    weights, indices, _ = torch_npu.npu_moe_gating_top_k(
        logits.to("npu"),
        k,
        bias=None if bias is None else bias.to("npu"),
        k_group=kept,
        group_count=groups,
        group_select_mode=int(with_bias),
        norm_type=["softmax", "sigmoid"].index(scoring),
        routed_scaling_factor=scale,
    )
    expected = [
        chosen(row, k, scoring, [0.0] * experts if bias is None else bias.tolist(), groups, kept)
        for row in logits.tolist()
    ]
    assert indices.dtype == torch.int32
    assert indices.cpu().tolist() == [experts for experts, _ in expected]
    assert weights.dtype == dtype
    assert_near(weights / scale, torch.tensor([weights for _, weights in expected]))


def test_gating_takes_the_first_of_equals() -> None:
    logits = torch.tensor([[1.0, 2.0, 2.0, 2.0, 1.0, 0.0]], device="npu")
    _, experts, _ = torch_npu.npu_moe_gating_top_k(logits, 4)
    assert experts.cpu().tolist() == [[1, 2, 3, 0]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        pytest.param({"k": 9}, "k is 9; it has to be 1 to 8", id="more choices than experts"),
        pytest.param({"k": 3, "k_group": 1, "group_count": 4}, "k is 3; it has to be 1 to 2", id="than kept"),
        pytest.param(
            {"k": 1, "k_group": 3, "group_count": 2}, "k_group is 3", id="more groups kept than there are"
        ),
        pytest.param(
            {"k": 1, "group_count": 3}, "group_count is 3; it has to divide the 8", id="uneven groups"
        ),
        pytest.param(
            {"k": 1, "group_count": 8, "group_select_mode": 1}, "have no best two", id="best two of one"
        ),
        pytest.param({"k": 1, "norm_type": 2}, "norm_type is 2", id="another score"),
        pytest.param({"k": 1, "renorm": 1}, "the argument renorm is not emulated", id="renorm"),
    ],
)
def test_gating_refuses(options: dict[str, Any], message: str) -> None:
    with pytest.raises(RuntimeError, match=f"npu_moe_gating_top_k: .*{message}"):
        torch_npu.npu_moe_gating_top_k(torch.zeros(3, 8, device="npu"), **options)


def test_gating_refuses_a_bias_of_another_type() -> None:
    logits = torch.zeros(3, 8, dtype=torch.bfloat16, device="npu")
    with pytest.raises(RuntimeError, match=r"bias is float32\[8\].*it has to be bfloat16 as x is"):
        torch_npu.npu_moe_gating_top_k(logits, 2, bias=torch.zeros(8, device="npu"))


def test_gating_refuses_more_experts_than_a_card_takes() -> None:
    with pytest.raises(RuntimeError, match="takes up to 2048 experts"):
        torch_npu.npu_moe_gating_top_k(torch.zeros(1, 2049, device="npu"), 2)


def init_routing(x: torch.Tensor, experts: torch.Tensor, **options: Any) -> Any:
    usual: dict[str, Any] = {
        "active_num": experts.numel(),
        "expert_num": 6,
        "expert_tokens_num_type": 1,
        "expert_tokens_num_flag": True,
        "active_expert_range": [0, 6],
    }
    return torch_npu.npu_moe_init_routing_v2(x, experts, **usual | options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_are_sorted_by_expert(dtype: torch.dtype) -> None:
    x = random(3, 16, dtype=dtype)
    rows, places, counts, _ = init_routing(x.to("npu"), int32([[4, 1], [1, 5], [0, 4]]))
    # Expert 0: token 2. Expert 1: tokens 0 and 1. Expert 4: tokens 0 and 2. Expert 5: token 1.
    assert torch.equal(rows.cpu(), x[[2, 0, 1, 0, 2, 1]])
    assert places.dtype == torch.int32
    assert places.cpu().tolist() == [3, 1, 2, 5, 0, 4]
    assert counts.dtype == torch.int64
    assert counts.cpu().tolist() == [1, 2, 0, 0, 2, 1]


def test_choices_outside_the_active_range_have_no_place() -> None:
    x = random(3, 16, dtype=torch.float32)
    rows, places, counts, _ = init_routing(
        x.to("npu"), int32([[4, 1], [1, 5], [0, 4]]), active_expert_range=[1, 4]
    )
    assert rows.shape == (6, 16)
    assert torch.equal(rows.cpu()[:2], x[[0, 1]])
    assert places.cpu().tolist() == [-1, 0, 1, -1, -1, -1]
    assert counts.cpu().tolist() == [2, 0, 0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        pytest.param({"active_num": 3}, "active_num is 3; it has to be .*, 6", id="some of the rows"),
        pytest.param({"drop_pad_mode": 1}, "drop_pad_mode has to be 0", id="padded to a capacity"),
        pytest.param({"expert_tokens_num_flag": False}, "flag has to be True", id="no counts"),
        pytest.param({"expert_tokens_num_type": 0}, "num_type is 0", id="sums"),
        pytest.param(
            {"active_expert_range": [0, 7]}, r"active_expert_range is \[0, 7\]", id="experts beyond"
        ),
        pytest.param({"quant_mode": 1}, "the argument quant_mode is not emulated", id="quantised"),
    ],
)
def test_init_routing_refuses(options: dict[str, Any], message: str) -> None:
    x = torch.zeros(3, 16, device="npu")
    with pytest.raises(RuntimeError, match=f"npu_moe_init_routing_v2: .*{message}"):
        init_routing(x, int32([[4, 1], [1, 5], [0, 4]]), **options)


def test_init_routing_refuses_int64_experts() -> None:
    with pytest.raises(RuntimeError, match=r"expert_idx is int64.*it has to be int32"):
        init_routing(torch.zeros(1, 16, device="npu"), torch.zeros(1, 2, dtype=torch.int64, device="npu"))


@emulator_only
def test_init_routing_refuses_experts_that_are_not_there() -> None:
    with pytest.raises(
        RuntimeError, match="expert_idx runs from -1 to 6; it has to be 0 to expert_num - 1, 5"
    ):
        init_routing(torch.zeros(1, 16, device="npu"), int32([[-1, 6]]))


@pytest.mark.parametrize("weight_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_of_a_token_are_added_by_weight(dtype: torch.dtype, weight_dtype: torch.dtype) -> None:
    rows = random(6, 16, dtype=dtype)
    weights = random(3, 2, dtype=weight_dtype, seed=1)
    result = torch_npu.npu_moe_token_unpermute(rows.to("npu"), int32([3, 1, 2, 5, 0, 4]), weights.to("npu"))
    r, w = rows.float(), weights.float()
    expected = [
        w[0, 0] * r[3] + w[0, 1] * r[1],
        w[1, 0] * r[2] + w[1, 1] * r[5],
        w[2, 0] * r[0] + w[2, 1] * r[4],
    ]
    assert result.dtype == dtype
    assert_near(result, torch.stack(expected))


def test_without_weights_rows_go_where_they_came_from() -> None:
    rows = random(4, 16, dtype=torch.bfloat16)
    result = torch_npu.npu_moe_token_unpermute(rows.to("npu"), int32([2, 0, 3, 1]))
    assert torch.equal(result.cpu(), rows[[2, 0, 3, 1]])


def test_undefined_rows_show_even_with_weight_zero() -> None:
    rows = torch.full((2, 16), math.nan, device="npu")
    result = torch_npu.npu_moe_token_unpermute(rows, int32([0, 1]), torch.zeros(1, 2, device="npu"))
    assert result.isnan().all().item()


@pytest.mark.parametrize(
    ("indices", "weights_shape", "message"),
    [
        pytest.param(
            [0, 1, 2], (2, 2), "probs is float32.*one for each of 3 sorted_indices", id="a missing index"
        ),
        pytest.param([0, 1, 2, 3], (4,), "probs is float32.*2-dimensional", id="flat weights"),
    ],
)
def test_unpermute_refuses(indices: list[int], weights_shape: tuple[int, ...], message: str) -> None:
    rows = torch.zeros(4, 16, device="npu")
    with pytest.raises(RuntimeError, match=f"npu_moe_token_unpermute: .*{message}"):
        torch_npu.npu_moe_token_unpermute(rows, int32(indices), torch.zeros(weights_shape, device="npu"))


@emulator_only
def test_unpermute_refuses_rows_that_are_not_there() -> None:
    with pytest.raises(
        RuntimeError, match="sorted_indices runs from -1 to 4; permuted_tokens has rows 0 to 3"
    ):
        torch_npu.npu_moe_token_unpermute(torch.zeros(4, 16, device="npu"), int32([-1, 4]))
