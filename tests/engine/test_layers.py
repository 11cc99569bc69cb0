# SPDX-License-Identifier: Apache-2.0
"""vLLM's layers, built as a model builds them, run torch_npu's operators and agree with plain formulas."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from vllm import ir
from vllm.config import CompilationConfig, CompilationMode, VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.activation import SiluAndMul
from vllm.model_executor.layers.layernorm import GemmaRMSNorm, RMSNorm
from vllm.model_executor.layers.rotary_embedding import get_rope

from vllm_ascend.ops import activation, norm, rotary

DTYPE = torch.bfloat16
TOLERANCE = {"rtol": 2**-7, "atol": 2**-6}
"""One step of bfloat16, or two near zero where two products are added."""


@pytest.fixture(autouse=True)
def _as_in_a_worker() -> Iterator[None]:
    for family in (activation, norm, rotary):
        family.register()
    config = VllmConfig(compilation_config=CompilationConfig(mode=CompilationMode.NONE, custom_ops=["all"]))
    with (
        set_current_vllm_config(config),
        ir.ops.rms_norm.set_priority([norm.PROVIDER, "native"]),
        ir.ops.fused_add_rms_norm.set_priority([norm.PROVIDER, "native"]),
    ):
        yield


def run(layer: Any, *inputs: torch.Tensor) -> Any:
    """The layer on the device, results on the CPU."""
    results = layer.to("npu")(*(value.to("npu") for value in inputs))
    return tuple(r.cpu() for r in results) if isinstance(results, tuple) else results.cpu()


def rotated(
    x: torch.Tensor, positions: torch.Tensor, head_size: int, rotary_dim: int, neox: bool
) -> torch.Tensor:
    """The paper's definition: pairs of elements as complex numbers, turned by position * frequency."""
    heads = x.double().unflatten(-1, (-1, head_size))
    turning, rest = heads[..., :rotary_dim], heads[..., rotary_dim:]
    frequencies = 10000.0 ** (-torch.arange(0, rotary_dim, 2).double() / rotary_dim)
    turn = torch.polar(torch.ones(()).double(), positions.double()[:, None] * frequencies)[:, None, :]
    first, second = turning.chunk(2, -1) if neox else (turning[..., ::2], turning[..., 1::2])
    pairs = torch.complex(first, second) * turn
    parts = (pairs.real, pairs.imag)
    turned = torch.cat(parts, -1) if neox else torch.stack(parts, -1).flatten(-2)
    return torch.cat((turned, rest), -1).flatten(-2).to(x.dtype)


@pytest.mark.parametrize("neox", [pytest.param(True, id="halves"), pytest.param(False, id="neighbours")])
@pytest.mark.parametrize(
    "share", [pytest.param(1.0, id="whole head"), pytest.param(0.5, id="half of the head")]
)
def test_rotary(neox: bool, share: float) -> None:
    head_size, rotary_dim = 64, int(64 * share)
    layer = get_rope(
        head_size,
        256,
        neox,
        {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": share},
        DTYPE,
    )
    assert isinstance(layer, rotary.FusedRotary)
    positions = torch.tensor([0, 1, 7, 100, 255])
    query, key = torch.randn(5, 4 * head_size).to(DTYPE), torch.randn(5, 2 * head_size).to(DTYPE)
    for result, x in zip(run(layer, positions, query, key), (query, key), strict=True):
        torch.testing.assert_close(result, rotated(x, positions, head_size, rotary_dim, neox), **TOLERANCE)


def test_rotary_without_a_key() -> None:
    layer = get_rope(64, 256, True, {"rope_type": "default", "rope_theta": 10000.0}, DTYPE).to("npu")
    query = torch.randn(1, 64).to(DTYPE)
    result, key = layer(torch.tensor([9], device="npu"), query.to("npu"))
    assert key is None
    torch.testing.assert_close(result.cpu(), rotated(query, torch.tensor([9]), 64, 64, True), **TOLERANCE)


def normed(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    wide = x.double()
    return (wide / (wide.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight.double()).to(x.dtype)


def test_rms_norm() -> None:
    layer = RMSNorm(96, dtype=DTYPE)
    torch.nn.init.normal_(layer.weight)
    x = torch.randn(5, 96).to(DTYPE)
    assert ir.ops.rms_norm.dispatch(x, layer.weight, 1e-6).provider == norm.PROVIDER
    expected = normed(x, layer.weight)
    torch.testing.assert_close(run(layer, x), expected, **TOLERANCE)


def test_rms_norm_of_heads_that_are_a_slice_of_a_wider_row() -> None:
    layer = RMSNorm(32, dtype=DTYPE)
    torch.nn.init.normal_(layer.weight)
    heads = torch.randn(5, 256).to(DTYPE)[:, 64:192].unflatten(-1, (4, 32))
    expected = normed(heads, layer.weight)
    torch.testing.assert_close(run(layer, heads), expected, **TOLERANCE)


def test_rms_norm_with_residual() -> None:
    layer = RMSNorm(96, dtype=DTYPE)
    torch.nn.init.normal_(layer.weight)
    x, residual = torch.randn(5, 96).to(DTYPE), torch.randn(5, 96).to(DTYPE)
    assert ir.ops.fused_add_rms_norm.dispatch(x, residual, layer.weight, 1e-6).provider == norm.PROVIDER
    expected = normed(x + residual, layer.weight)
    result, total = run(layer, x, residual)
    torch.testing.assert_close(total, x + residual, **TOLERANCE)
    # The card rounds three times where the formula rounds once.
    torch.testing.assert_close(result, expected, rtol=3 * 2**-8, atol=2**-6)


def test_rms_norm_with_a_float32_weight() -> None:
    layer = GemmaRMSNorm(96)
    torch.nn.init.normal_(layer.weight)
    x = torch.randn(5, 96).to(DTYPE)
    expected = normed(x, 1 + layer.weight)
    torch.testing.assert_close(run(layer, x), expected, **TOLERANCE)


def test_swiglu() -> None:
    layer = SiluAndMul()
    assert isinstance(layer, activation.NPUSiluAndMul)
    x = torch.randn(5, 128).to(DTYPE)
    gate, up = x.double().chunk(2, -1)
    torch.testing.assert_close(run(layer, x), (gate / (1 + (-gate).exp()) * up).to(DTYPE), **TOLERANCE)
