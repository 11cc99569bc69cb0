# SPDX-License-Identifier: Apache-2.0
"""npu_swiglu against silu(first half) * second half."""

import pytest
import torch
import torch_npu
from device.operator_support import HALVES, assert_near, random


def swiglu(x: torch.Tensor, dim: int) -> torch.Tensor:
    first, second = x.float().chunk(2, dim)
    return first / (1 + torch.exp(-first)) * second


@pytest.mark.parametrize("dtype", [*HALVES, torch.float32], ids=str)
@pytest.mark.parametrize(
    ("shape", "dim"),
    [
        pytest.param((5, 32), -1, id="tokens and a fused gate and up projection"),
        pytest.param((2, 3, 64), -1, id="three dimensions"),
        pytest.param((6, 16), 0, id="split along the first dimension"),
        pytest.param((0, 32), -1, id="no tokens"),
    ],
)
def test_swiglu(shape: tuple[int, ...], dim: int, dtype: torch.dtype) -> None:
    x = random(*shape, dtype=dtype)
    result = torch_npu.npu_swiglu(x.to("npu"), dim)
    assert result.dtype == dtype
    assert_near(result, swiglu(x, dim))


def test_swiglu_of_known_numbers() -> None:
    x = torch.tensor([[0.0, 1.0, 3.0, 2.0]])
    result = torch_npu.npu_swiglu(x.to("npu"))
    # silu(0) * 3 and silu(1) * 2, where silu(1) = 1 / (1 + e^-1) = 0.7310586
    torch.testing.assert_close(result.cpu(), torch.tensor([[0.0, 1.4621172]]))


def test_swiglu_reads_through_strides() -> None:
    x = random(8, 64, dtype=torch.bfloat16)
    assert_near(torch_npu.npu_swiglu(x.to("npu")[::2, 16:48]), swiglu(x[::2, 16:48], -1))


def test_swiglu_refuses_an_odd_size() -> None:
    with pytest.raises(RuntimeError, match=r"npu_swiglu: input is float16\[2, 7\].*has to be even"):
        torch_npu.npu_swiglu(torch.zeros(2, 7, dtype=torch.float16, device="npu"))


def test_swiglu_refuses_integers() -> None:
    with pytest.raises(RuntimeError, match=r"npu_swiglu: input is int32.*float16 or bfloat16 or float32"):
        torch_npu.npu_swiglu(torch.zeros(2, 8, dtype=torch.int32, device="npu"))


def clipped_swiglu(a: torch.Tensor, b: torch.Tensor, alpha: float, limit: float, bias: float) -> torch.Tensor:
    a, b = a.float().clamp(max=limit), b.float().clamp(-limit, limit)
    return a / (1 + torch.exp(-alpha * a)) * (b + bias)


@pytest.mark.parametrize("dtype", [*HALVES, torch.float32], ids=str)
def test_clipped_swiglu_of_neighbours(dtype: torch.dtype) -> None:
    x = random(5, 32, dtype=dtype) * 4
    result = torch_npu.npu_clipped_swiglu(x.to("npu"), alpha=1.702, limit=3.0, bias=1.0)
    assert result.dtype == dtype
    assert_near(result, clipped_swiglu(x[:, ::2], x[:, 1::2], 1.702, 3.0, 1.0))


def test_clipped_swiglu_of_halves() -> None:
    x = random(5, 32, dtype=torch.bfloat16) * 4
    result = torch_npu.npu_clipped_swiglu(x.to("npu"), alpha=1.0, limit=2.0, bias=0.0, interleaved=False)
    assert_near(result, clipped_swiglu(x[:, :16], x[:, 16:], 1.0, 2.0, 0.0))


def test_clipped_swiglu_refuses_an_odd_size() -> None:
    with pytest.raises(RuntimeError, match=r"npu_clipped_swiglu: x is float16\[2, 7\].*has to be even"):
        torch_npu.npu_clipped_swiglu(torch.zeros(2, 7, dtype=torch.float16, device="npu"))
