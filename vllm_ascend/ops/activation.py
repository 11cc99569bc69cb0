# SPDX-License-Identifier: Apache-2.0
"""SwiGLU on npu_swiglu, in the place of vLLM's SiluAndMul layer."""

from __future__ import annotations

import functools

import torch
import torch_npu
from vllm.model_executor.custom_op import CustomOp
from vllm.model_executor.layers.activation import SiluAndMul


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
