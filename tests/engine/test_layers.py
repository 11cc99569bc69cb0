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
from vllm.model_executor.layers.attention import MMEncoderAttention
from vllm.model_executor.layers.layernorm import GemmaRMSNorm, RMSNorm
from vllm.model_executor.layers.rotary_embedding import get_rope
from vllm.model_executor.layers.rotary_embedding.common import ApplyRotaryEmb

from vllm_ascend.ops import activation, encoders, norm, rotary

DTYPE = torch.bfloat16
TOLERANCE = {"rtol": 2**-7, "atol": 2**-6}
"""One step of bfloat16, or two near zero where two products are added."""


@pytest.fixture(autouse=True)
def _as_in_a_worker() -> Iterator[None]:
    for family in (activation, encoders, norm, rotary):
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


@pytest.mark.parametrize(
    ("interleaved", "sections", "axes"),
    [
        pytest.param(False, [3, 5, 8], "ttthhhhhwwwwwwww", id="sections one after the other"),
        pytest.param(True, [6, 5, 5], "thwthwthwthwthwt", id="sections interleaved"),
        pytest.param(True, [11, 3, 2], "thwthwthtttttttt", id="sections interleaved, of unlike sizes"),
    ],
)
def test_rotary_by_three_positions(interleaved: bool, sections: list[int], axes: str) -> None:
    """`axes` says by which of a token's positions (time, height, width) each of a head's 16 pairs turns."""
    parameters = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": sections}
    layer = get_rope(32, 256, True, parameters | {"mrope_interleaved": interleaved}, DTYPE)
    assert isinstance(layer, rotary.FusedMRotary)
    positions = torch.tensor([[0, 1, 7, 100, 255], [3, 1, 9, 0, 17], [250, 1, 2, 30, 60]])
    query, key = torch.randn(5, 4 * 32).to(DTYPE), torch.randn(5, 2 * 32).to(DTYPE)
    of_pair = torch.tensor(["thw".index(axis) for axis in axes] * 2)
    for result, x in zip(run(layer, positions, query, key), (query, key), strict=True):
        by_axis = [rotated(x, row, 32, 32, True).unflatten(-1, (-1, 32)) for row in positions]
        expected = torch.stack([by_axis[axis][..., i] for i, axis in enumerate(of_pair)], -1).flatten(-2)
        torch.testing.assert_close(result, expected, **TOLERANCE)


@pytest.mark.parametrize("neox", [pytest.param(True, id="halves"), pytest.param(False, id="neighbours")])
@pytest.mark.parametrize("wide", [pytest.param(False, id="as given"), pytest.param(True, id="in float32")])
def test_rotary_by_angles_of_the_caller(neox: bool, wide: bool) -> None:
    layer = ApplyRotaryEmb(enforce_enable=True, is_neox_style=neox, enable_fp32_compute=wide)
    assert isinstance(layer, rotary.NPUApplyRotaryEmb)
    x, positions = torch.randn(2, 5, 3, 80).to(DTYPE), torch.tensor([0, 1, 7, 100, 255])
    angles = positions[:, None] * 10000.0 ** (-torch.arange(0, 80, 2) / 80)
    expected = torch.stack([rotated(each.flatten(-2), positions, 80, 80, neox) for each in x])
    for given, result in ((x, expected), (x[0], expected[0])):
        turned = run(layer, given, angles.cos().to(DTYPE), angles.sin().to(DTYPE))
        # cos and sin are rounded too, each by up to half a step.
        torch.testing.assert_close(turned.flatten(-2), result, rtol=2**-6, atol=2**-5)


def attended(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float) -> torch.Tensor:
    """One sequence without causality: [rows, heads, size], keys and values [keys, kv heads, size]."""
    group = query.shape[1] // key.shape[1]
    wide = [x.double().repeat_interleave(n, 1) for x, n in ((query, 1), (key, group), (value, group))]
    weights = (torch.einsum("qhd,khd->hqk", wide[0], wide[1]) * scale).softmax(-1)
    return torch.einsum("hqk,khd->qhd", weights, wide[2]).to(query.dtype)


@pytest.mark.parametrize("head_size", [32, 64, 72, 80, 128, 136])
def test_attention_of_a_tower_over_sequences_in_one_row(head_size: int) -> None:
    layer = MMEncoderAttention(4, head_size, scale=0.1, num_kv_heads=2)
    assert isinstance(layer, encoders.NPUEncoderAttention)
    query = torch.randn(1, 12, 4, head_size).to(DTYPE)
    key, value = torch.randn(2, 1, 12, 2, head_size).to(DTYPE)
    result = run(layer, query, key, value, torch.tensor([0, 5, 6, 12], dtype=torch.int32))
    pieces = [slice(0, 5), slice(5, 6), slice(6, 12)]
    expected = [attended(query[0, piece], key[0, piece], value[0, piece], 0.1) for piece in pieces]
    torch.testing.assert_close(result[0], torch.cat(expected), **TOLERANCE)


def test_attention_of_a_tower_over_a_batch_of_flat_rows() -> None:
    layer = MMEncoderAttention(3, 48, scale=0.2)
    # One of query, key and value of one projection: not contiguous.
    query, key, value = torch.randn(2, 7, 3 * 144).to(DTYPE).chunk(3, -1)
    result = run(layer, query, key[:, :5], value[:, :5])
    heads = [x.unflatten(-1, (3, 48)) for x in (query, key[:, :5], value[:, :5])]
    expected = [attended(*(x[index] for x in heads), scale=0.2).flatten(-2) for index in range(2)]
    torch.testing.assert_close(result, torch.stack(expected), **TOLERANCE)


def test_attention_of_a_tower_over_more_sequences_than_one_call_takes() -> None:
    """Each has two rows and queries of zero: both rows see the mean of the two values."""
    layer = MMEncoderAttention(1, 16, scale=1.0)
    count = 2 * encoders.MAX_SEQUENCES + 3
    query = torch.zeros(1, 2 * count, 1, 16).to(DTYPE)
    value = torch.randn(1, 2 * count, 1, 16).to(DTYPE)
    result = run(layer, query, query, value, 2 * torch.arange(count + 1, dtype=torch.int32))
    means = value.double().unflatten(1, (count, 2)).mean(2, keepdim=True).expand(-1, -1, 2, -1, -1)
    torch.testing.assert_close(result, means.flatten(1, 2).to(DTYPE), **TOLERANCE)


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
