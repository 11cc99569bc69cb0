# SPDX-License-Identifier: Apache-2.0
"""npu_rotary_mul and atb's in-place _npu_rotary_embedding: every pair of elements is turned by its angle."""

import math

import pytest
import torch
import torch_npu
from device.operator_support import HALVES, assert_near, random


def turn_pairs(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleave: bool) -> torch.Tensor:
    """Element by element: the pair (a, b) becomes (a cos_a - b sin_a, b cos_b + a sin_b)."""
    size = x.shape[-1]
    x, cos, sin = x.float(), cos.float().broadcast_to(x.shape), sin.float().broadcast_to(x.shape)
    result = torch.empty_like(x)
    for k in range(size // 2):
        a, b = (2 * k, 2 * k + 1) if interleave else (k, k + size // 2)
        result[..., a] = x[..., a] * cos[..., a] - x[..., b] * sin[..., a]
        result[..., b] = x[..., b] * cos[..., b] + x[..., a] * sin[..., b]
    return result


@pytest.mark.parametrize("dtype", [*HALVES, torch.float32], ids=str)
@pytest.mark.parametrize("mode", ["half", "interleave"])
@pytest.mark.parametrize(
    ("shape", "angle_shape"),
    [
        pytest.param((2, 5, 4, 32), (2, 5, 1, 32), id="one angle for all heads"),
        pytest.param((1, 5, 4, 64), (1, 5, 4, 64), id="an angle for each head"),
        pytest.param((5, 4, 16), (5, 1, 16), id="packed tokens"),
    ],
)
def test_rotary_mul(
    shape: tuple[int, ...], angle_shape: tuple[int, ...], mode: str, dtype: torch.dtype
) -> None:
    x = random(*shape, dtype=dtype)
    cos, sin = random(*angle_shape, dtype=dtype, seed=1), random(*angle_shape, dtype=dtype, seed=2)
    result = torch_npu.npu_rotary_mul(x.to("npu"), cos.to("npu"), sin.to("npu"), mode)
    assert result.dtype == dtype
    assert_near(result, turn_pairs(x, cos, sin, mode == "interleave"))


def test_a_quarter_turn() -> None:
    x = torch.tensor([[[1.0, 2.0, 3.0, 4.0]]], device="npu")
    zero, one = torch.zeros_like(x), torch.ones_like(x)
    assert torch_npu.npu_rotary_mul(x, zero, one).cpu().tolist() == [[[-3.0, -4.0, 1.0, 2.0]]]
    assert torch_npu.npu_rotary_mul(x, zero, one, "interleave").cpu().tolist() == [[[-2.0, 1.0, -4.0, 3.0]]]


@pytest.mark.parametrize(
    ("shape", "angle_shape", "mode", "message"),
    [
        pytest.param((4, 16), (4, 16), "half", "input is float16.*3 or 4 dimensions", id="two dimensions"),
        pytest.param((2, 4, 15), (2, 4, 15), "half", "of even size", id="odd head size"),
        pytest.param((2, 4, 16), (2, 4, 8), "half", r"r1 is float16\[2, 4, 8\]", id="cos of half the width"),
        pytest.param((2, 4, 16), (3, 1, 16), "half", r"r1 is float16\[3, 1, 16\]", id="cos of other tokens"),
        pytest.param((2, 4, 16), (2, 1, 16), "quarter", 'rotary_mode is "quarter"', id="unknown mode"),
    ],
)
def test_rotary_mul_refuses(
    shape: tuple[int, ...], angle_shape: tuple[int, ...], mode: str, message: str
) -> None:
    x = torch.zeros(shape, dtype=torch.float16, device="npu")
    angle = torch.zeros(angle_shape, dtype=torch.float16, device="npu")
    with pytest.raises(RuntimeError, match=f"npu_rotary_mul: .*{message}"):
        torch_npu.npu_rotary_mul(x, angle, angle, mode)


# One table for the whole file: a card keeps the one it sees first (torch_npu caches it for the process).
ANGLES = torch.arange(12.0)[:, None] * torch.tensor([1.0, 0.3, 0.1, 0.03, 0.01, 0.003, 0.001, 0.0003])
COS_SIN = torch.cat([ANGLES.cos(), ANGLES.sin()], -1).to(torch.bfloat16)


@pytest.mark.parametrize("neox", [True, False])
def test_rotary_embedding_turns_query_and_key_in_place(neox: bool) -> None:
    positions = torch.tensor([0, 3, 11])
    query = random(3, 4 * 16, dtype=torch.bfloat16)
    key = random(3, 2 * 16, dtype=torch.bfloat16, seed=1)
    on_npu = [t.to("npu") for t in (positions, query, key, COS_SIN)]
    assert torch_npu._npu_rotary_embedding(*on_npu[:3], 16, on_npu[3], neox) is None
    angles = COS_SIN.float()[positions]
    halves = [angles[:, :8], angles[:, 8:]]
    cos, sin = (torch.cat([h, h], -1) if neox else h.repeat_interleave(2, -1) for h in halves)
    for rows, before in ((on_npu[1], query), (on_npu[2], key)):
        expected = turn_pairs(before.view(3, -1, 16), cos[:, None], sin[:, None], interleave=not neox)
        assert_near(rows, expected.flatten(1))
    assert math.isclose(on_npu[1].cpu()[0, 0].item(), query[0, 0].item())  # position 0: no turn


def test_rotary_embedding_refuses_what_it_could_not_write_back() -> None:
    query = torch.zeros(3, 64, dtype=torch.bfloat16, device="npu")[:, :32]
    key = torch.zeros(3, 32, dtype=torch.bfloat16, device="npu")
    positions = torch.zeros(3, dtype=torch.int64, device="npu")
    with pytest.raises(RuntimeError, match=r"_npu_rotary_embedding: query is .* it has to be contiguous"):
        torch_npu._npu_rotary_embedding(positions, query, key, 16, COS_SIN.to("npu"), True)


def test_rotary_embedding_refuses_int32_positions() -> None:
    rows = torch.zeros(3, 32, dtype=torch.bfloat16, device="npu")
    positions = torch.zeros(3, dtype=torch.int32, device="npu")
    with pytest.raises(RuntimeError, match=r"positions is int32.*it has to be int64"):
        torch_npu._npu_rotary_embedding(positions, rows, rows.clone(), 16, COS_SIN.to("npu"), True)
