# SPDX-License-Identifier: Apache-2.0
"""npu_rms_norm and npu_add_rms_norm against their formulas, rounded where the card rounds."""

import math

import pytest
import torch
import torch_npu
from device.operator_support import HALVES, assert_near, random

DTYPES = [*HALVES, torch.float32]


def inverse_rms(x: torch.Tensor, epsilon: float) -> torch.Tensor:
    return 1 / torch.sqrt((x.float() ** 2).mean(-1, keepdim=True) + epsilon)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(7, 64), (2, 3, 128), (1, 16), (0, 32)])
def test_rms_norm(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, gamma = random(*shape, dtype=dtype), random(shape[-1], dtype=dtype, seed=1)
    y, rstd = torch_npu.npu_rms_norm(x.to("npu"), gamma.to("npu"), 1e-5)
    assert (y.dtype, rstd.dtype, rstd.shape) == (dtype, torch.float32, (*shape[:-1], 1))
    assert_near(rstd, inverse_rms(x, 1e-5))
    assert_near(y, x.float() * inverse_rms(x, 1e-5) * gamma.float())


def test_rms_norm_of_known_numbers() -> None:
    # mean square of 3 and 4 is 12.5
    x, gamma = torch.tensor([[3.0, 4.0]], device="npu"), torch.tensor([1.0, 10.0], device="npu")
    y, rstd = torch_npu.npu_rms_norm(x, gamma, 0.0)
    torch.testing.assert_close(rstd.cpu(), torch.tensor([[1 / math.sqrt(12.5)]]))
    torch.testing.assert_close(y.cpu(), torch.tensor([[0.8485281, 11.3137085]]))


def test_rms_norm_over_two_dimensions() -> None:
    x, gamma = random(3, 4, 16, dtype=torch.float32), random(4, 16, dtype=torch.float32, seed=1)
    y, rstd = torch_npu.npu_rms_norm(x.to("npu"), gamma.to("npu"))
    expected = 1 / torch.sqrt((x**2).mean((1, 2), keepdim=True) + 1e-6)
    assert rstd.shape == (3, 1, 1)
    assert_near(y, x * expected * gamma)


def test_rms_norm_takes_a_float32_gamma() -> None:
    x, gamma = random(4, 32, dtype=torch.bfloat16), random(32, dtype=torch.float32, seed=1)
    y, _ = torch_npu.npu_rms_norm(x.to("npu"), gamma.to("npu"))
    assert y.dtype == torch.bfloat16
    assert_near(y, x.float() * inverse_rms(x, 1e-6) * gamma)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_add_rms_norm(dtype: torch.dtype) -> None:
    x1, x2 = random(5, 64, dtype=dtype), random(5, 64, dtype=dtype, seed=1)
    gamma = random(64, dtype=dtype, seed=2)
    inputs = [t.to("npu") for t in (x1, x2, gamma)]
    y, rstd, total = torch_npu.npu_add_rms_norm(*inputs, 1e-5)
    expected_total = (x1.float() + x2.float()).to(dtype)
    assert total.cpu().equal(expected_total)
    assert_near(rstd, inverse_rms(expected_total, 1e-5))
    normalised = (expected_total.float() * inverse_rms(expected_total, 1e-5)).to(dtype)
    assert_near(y, normalised.float() * gamma.float())
    assert inputs[0].cpu().equal(x1)
    assert inputs[1].cpu().equal(x2)


def test_add_rms_norm_rounds_the_normalised_value_and_rms_norm_does_not() -> None:
    x = torch.tensor([[1.0, 1.5]], dtype=torch.bfloat16, device="npu")
    gamma = torch.tensor([1.25, 1.25], dtype=torch.bfloat16, device="npu")
    once, _ = torch_npu.npu_rms_norm(x, gamma, 0.0)
    twice, _, _ = torch_npu.npu_add_rms_norm(x, torch.zeros_like(x), gamma, 0.0)
    # The inverse rms is 1 / sqrt(1.625) = 0.7844645, and bfloat16 has 1.46875 and 1.4765625 side by side.
    # Rounded at the end: 1.5 * 0.7844645 * 1.25 = 1.4708710.
    # Rounded before gamma too: 1.1796875 * 1.25 = 1.4746094.
    assert once.cpu().tolist() == [[0.98046875, 1.46875]]
    assert twice.cpu().tolist() == [[0.98046875, 1.4765625]]


@pytest.mark.parametrize(
    ("x", "gamma", "message"),
    [
        pytest.param(torch.zeros(2, 8, dtype=torch.int32), torch.ones(8), "input is int32", id="integers"),
        pytest.param(
            torch.zeros(2, 8, dtype=torch.float16),
            torch.ones(8, dtype=torch.bfloat16),
            r"gamma is bfloat16.*float16 as input is",
            id="gamma of the other half precision",
        ),
        pytest.param(torch.zeros(2, 8), torch.ones(4), r"gamma is float32\[4\]", id="gamma too short"),
    ],
)
def test_rms_norm_refuses(x: torch.Tensor, gamma: torch.Tensor, message: str) -> None:
    with pytest.raises(RuntimeError, match=rf"npu_rms_norm: {message}"):
        torch_npu.npu_rms_norm(x.to("npu"), gamma.to("npu"))


def test_add_rms_norm_refuses_to_broadcast() -> None:
    x1, x2 = torch.zeros(2, 8, device="npu"), torch.zeros(1, 8, device="npu")
    with pytest.raises(RuntimeError, match=r"npu_add_rms_norm: .*the same shape"):
        torch_npu.npu_add_rms_norm(x1, x2, torch.ones(8, device="npu"))
