# SPDX-License-Identifier: Apache-2.0
"""RMS norm on npu_rms_norm and npu_add_rms_norm, as implementations of vLLM's IR operators.

vLLM's layers call an IR operator, which takes the first implementation, in the platform's order, that accepts
the arguments. Both operators here compute in float32. npu_rms_norm rounds once; npu_add_rms_norm, on A2 and
A3 cards, rounds the sum, the normalised sum and the result, so the two may differ in the last bit.
"""

from __future__ import annotations

import functools

import torch
import torch_npu
from torch import Tensor

PROVIDER = "npu"


@functools.cache
def register() -> None:
    """Offer both to vLLM under the name `npu`; once per process."""
    from vllm import ir

    ir.ops.rms_norm.register_impl(PROVIDER, supports_args=_takes_rms_norm)(rms_norm)
    ir.ops.fused_add_rms_norm.register_impl(PROVIDER, supports_args=_takes_add_rms_norm)(fused_add_rms_norm)


def rms_norm(x: Tensor, weight: Tensor | None, epsilon: float, variance_size: int | None = None) -> Tensor:
    """x / sqrt(mean(x^2) + epsilon) * weight over the last axis; weight of x's type or float32."""
    assert weight is not None
    assert variance_size is None
    normed: Tensor = torch_npu.npu_rms_norm(x, weight, epsilon)[0]
    return normed


def fused_add_rms_norm(
    x: Tensor, x_residual: Tensor, weight: Tensor | None, epsilon: float, variance_size: int | None = None
) -> tuple[Tensor, Tensor]:
    """The norm of x + x_residual, and that sum; all of one type."""
    assert weight is not None
    assert variance_size is None
    normed, _, total = torch_npu.npu_add_rms_norm(x, x_residual, weight, epsilon)
    return normed, total


def _takes_rms_norm(
    x: Tensor, weight: Tensor | None, epsilon: float, variance_size: int | None = None
) -> bool:
    return weight is not None and weight.dtype in (x.dtype, torch.float32) and variance_size is None


def _takes_add_rms_norm(
    x: Tensor, x_residual: Tensor, weight: Tensor | None, epsilon: float, variance_size: int | None = None
) -> bool:
    return weight is not None and weight.dtype == x.dtype == x_residual.dtype and variance_size is None
