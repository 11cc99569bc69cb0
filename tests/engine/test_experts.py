# SPDX-License-Identifier: Apache-2.0
"""Experts as the plugin composes them from torch_npu's operators, against a loop over tokens and choices."""

from __future__ import annotations

import math

import pytest
import torch
from vllm.model_executor.layers.fused_moe.activation import MoEActivation

from vllm_ascend.ops.activation import Activation, activation_of
from vllm_ascend.ops.experts import Experts
from vllm_ascend.ops.routing import Choice, Rule

HIDDEN, WIDTH, EXPERTS = 32, 16, 6
DTYPE = torch.bfloat16


@pytest.fixture(scope="module")
def weights() -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(3)
    first = torch.randn(EXPERTS, HIDDEN, 2 * WIDTH, generator=draw) / 8
    second = torch.randn(EXPERTS, WIDTH, HIDDEN, generator=draw) / 8
    return first.to(DTYPE), second.to(DTYPE)


def experts_here(weights: tuple[torch.Tensor, torch.Tensor], here: list[int]) -> Experts:
    """Those of `here`, in this order; the others are on other ranks."""
    slots = torch.tensor([here.index(e) if e in here else len(here) for e in range(EXPERTS)])
    return Experts(
        first=weights[0][here].to("npu"),
        second=weights[1][here].to("npu"),
        first_bias=None,
        second_bias=None,
        activation=activation_of(MoEActivation.SILU),
        slots=None if here == list(range(EXPERTS)) else slots.int().to("npu"),
    )


def summed(
    x: torch.Tensor,
    choice: list[list[tuple[int, float]]],
    weights: tuple[torch.Tensor, torch.Tensor],
    here: list[int],
) -> torch.Tensor:
    """float32; per token a list of (expert, weight)."""
    result = torch.zeros(x.shape)
    for token, experts in enumerate(choice):
        for expert, weight in experts:
            if expert not in here:
                continue
            gate, up = (x[token].float() @ weights[0][expert].float()).chunk(2)
            result[token] += weight * (gate / (1 + (-gate).exp()) * up) @ weights[1][expert].float()
    return result


@pytest.mark.parametrize(
    "here",
    [
        pytest.param(list(range(EXPERTS)), id="all experts here"),
        pytest.param([3, 4, 5], id="the second half here"),
        pytest.param([4, 0], id="some here, in another order"),
        pytest.param([1], id="none of the chosen here"),
    ],
)
def test_experts(here: list[int], weights: tuple[torch.Tensor, torch.Tensor]) -> None:
    choice = [[(5, 0.5), (0, 0.25)], [(4, 1.5), (5, 0.125)], [(0, 0.75), (3, 0.25)]]
    x = torch.randn(3, HIDDEN, generator=torch.Generator().manual_seed(4)).to(DTYPE)
    result = experts_here(weights, here).compute(
        x.to("npu"),
        Choice(
            torch.tensor([[w for _, w in row] for row in choice], device="npu"),
            torch.tensor([[e for e, _ in row] for row in choice], dtype=torch.int32, device="npu"),
        ),
    )
    assert result.dtype == DTYPE
    # Rounded after each of the two products and the activation.
    torch.testing.assert_close(result.cpu().float(), summed(x, choice, weights, here), rtol=2**-6, atol=2**-7)


LOGITS = [2.0, 1.0, 0.0, 3.0]


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


@pytest.mark.parametrize(
    ("rule", "experts", "weights"),
    [
        pytest.param(
            Rule(2, "softmax", renormalize=True),
            [3, 0],
            [sigmoid(1), sigmoid(-1)],
            id="softmax of the chosen",
        ),
        pytest.param(
            Rule(2, "softmax", renormalize=False),
            [3, 0],
            [math.exp(x) / sum(math.exp(y) for y in LOGITS) for x in (3, 2)],
            id="softmax of all",
        ),
        pytest.param(
            Rule(2, "sigmoid", renormalize=False, scale=2.0),
            [3, 0],
            [2 * sigmoid(3), 2 * sigmoid(2)],
            id="sigmoid, scaled",
        ),
        pytest.param(
            Rule(2, "sigmoid", renormalize=True, scale=2.0),
            [3, 0],
            [2 * sigmoid(x) / (sigmoid(3) + sigmoid(2)) for x in (3, 2)],
            id="sigmoid, made to sum to the scale",
        ),
        pytest.param(
            Rule(1, "softmax", renormalize=False, num_groups=2, bias=torch.tensor([0.0, 0.6, 0.0, 0.0])),
            [1],
            [math.exp(1) / sum(math.exp(y) for y in LOGITS)],
            id="a bias moves the choice of the group and of the expert, not the weight",
        ),
    ],
)
def test_rules(rule: Rule, experts: list[int], weights: list[float]) -> None:
    on_npu = Rule(**vars(rule) | {"bias": None if rule.bias is None else rule.bias.to("npu")})
    choice = on_npu.choose(torch.tensor([LOGITS], dtype=DTYPE, device="npu"))
    assert choice.experts.cpu().tolist() == [experts]
    torch.testing.assert_close(choice.weights.cpu(), torch.tensor([weights]), rtol=1e-5, atol=1e-6)


X = torch.tensor([[-3.0, 1.0, 9.0, -2.0]])


@pytest.mark.parametrize(
    ("activation", "expected"),
    [
        pytest.param(activation_of(MoEActivation.SILU), [-3 * sigmoid(-3) * 9, sigmoid(1) * -2], id="SwiGLU"),
        pytest.param(
            activation_of(MoEActivation.SILU, limit=4.0),
            [-3 * sigmoid(-3) * 4, sigmoid(1) * -2],
            id="SwiGLU with a limit",
        ),
        pytest.param(
            activation_of(MoEActivation.SWIGLUOAI),
            [-3 * sigmoid(-3 * 1.702) * 2, 7 * sigmoid(7 * 1.702) * -1],
            id="OpenAI's SwiGLU of neighbours",
        ),
        pytest.param(
            activation_of(MoEActivation.SWIGLUOAI_UNINTERLEAVE, limit=7.0, alpha=1.702, beta=1.0),
            [-3 * sigmoid(-3 * 1.702) * 8, sigmoid(1.702) * -1],
            id="OpenAI's SwiGLU of halves",
        ),
        pytest.param(
            activation_of(MoEActivation.GELU),
            [-3 * 0.5 * (1 + math.erf(-3 / math.sqrt(2))) * 9, 0.5 * (1 + math.erf(1 / math.sqrt(2))) * -2],
            id="gated GELU",
        ),
        pytest.param(activation_of(MoEActivation.RELU2_NO_MUL), [0.0, 1.0, 81.0, 0.0], id="squared ReLU"),
        pytest.param(
            activation_of(MoEActivation.SILU_NO_MUL), [x * sigmoid(x) for x in (-3, 1, 9, -2)], id="SiLU"
        ),
    ],
)
def test_activations(activation: Activation, expected: list[float]) -> None:
    result = activation(X.to("npu"))
    torch.testing.assert_close(result.cpu(), torch.tensor([expected]), rtol=1e-5, atol=1e-5)


def test_an_unknown_activation_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"experts with the activation situ are not there yet on NPUs"):
        activation_of(MoEActivation.SITU)
