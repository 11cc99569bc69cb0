# SPDX-License-Identifier: Apache-2.0
"""Activations: SwiGLU on npu_swiglu in the place of vLLM's SiluAndMul layer, and those of experts.

Experts name theirs by vLLM's enumeration, without a layer for it: gated ones take [..., 2 * d] and return
[..., d], the others keep the shape.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch_npu
from torch.nn import functional
from vllm.model_executor.custom_op import CustomOp
from vllm.model_executor.layers.activation import SiluAndMul
from vllm.model_executor.layers.fused_moe.activation import MoEActivation

from vllm_ascend.errors import ConfigError

Activation = Callable[[torch.Tensor], torch.Tensor]


@functools.cache
def register() -> None:
    """Have vLLM build this layer wherever a model asks for SiluAndMul; once per process."""
    CustomOp.register_oot(NPUSiluAndMul, name=SiluAndMul.__name__)


class NPUSiluAndMul(SiluAndMul):
    """silu(first half) * second half, over the last axis."""

    def forward_oot(self, x: torch.Tensor) -> torch.Tensor:
        """[..., 2 * d] -> [..., d], computed in float32 and rounded once."""
        gated: torch.Tensor = torch_npu.npu_swiglu(x)
        return gated


def activation_of(
    kind: MoEActivation, limit: float | None = None, alpha: float | None = None, beta: float | None = None
) -> Activation:
    """What lies between the two projections of experts. Raises ConfigError for a kind that is not there yet.

    limit, alpha, beta: where SwiGLU cuts off its halves, the slope of its sigmoid, what is added to its
    second half; None where the model does not say.
    """
    match kind:
        case MoEActivation.SILU if limit is None:
            return torch_npu.npu_swiglu  # type: ignore[no-any-return]  # torch_npu has no types
        case MoEActivation.SILU:
            return _clipped(alpha=1.0, limit=limit, bias=0.0, interleaved=False)
        case MoEActivation.SWIGLUOAI:
            return _clipped(alpha=1.702, limit=7.0, bias=1.0, interleaved=True)
        case MoEActivation.SWIGLUOAI_UNINTERLEAVE:
            return _clipped(alpha=alpha or 1.0, limit=limit, bias=beta or 0.0, interleaved=False)
        case MoEActivation.GELU:
            return _gated(functional.gelu)
        case MoEActivation.GELU_TANH:
            return _gated(functools.partial(functional.gelu, approximate="tanh"))
        case MoEActivation.SILU_NO_MUL:
            return functional.silu
        case MoEActivation.GELU_NO_MUL:
            return functional.gelu
        case MoEActivation.GELU_TANH_NO_MUL:
            return functools.partial(functional.gelu, approximate="tanh")
        case MoEActivation.RELU2_NO_MUL:
            return _squared_relu
        case other:
            raise ConfigError(
                f"experts with the activation {other.value} are not there yet on NPUs; those with silu, "
                f"gelu, squared relu and the clipped variants of SwiGLU are"
            )


def _clipped(**options: float | bool | None) -> Activation:
    return functools.partial(torch_npu.npu_clipped_swiglu, **options)


def _gated(activation: Activation) -> Activation:
    def apply(x: torch.Tensor) -> torch.Tensor:
        gate, up = x.chunk(2, dim=-1)
        return activation(gate) * up

    return apply


def _squared_relu(x: torch.Tensor) -> torch.Tensor:
    return functional.relu(x).square()
