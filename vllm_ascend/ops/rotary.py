# SPDX-License-Identifier: Apache-2.0
"""Rotary position embedding on npu_rotary_mul, in the place of vLLM's rotary layers.

vLLM has one layer class per way to compute the angles, and all of those below apply them in the same way. So
one mixin replaces the application and leaves the angles to vLLM. All layers of a model rotate by the same
positions, so cos and sin are gathered once per forward pass and kept in vLLM's forward context.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import torch_npu
from vllm.forward_context import get_forward_context, is_forward_context_available
from vllm.model_executor.custom_op import CustomOp
from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbedding
from vllm.model_executor.layers.rotary_embedding.dynamic_ntk_alpha_rope import DynamicNTKAlphaRotaryEmbedding
from vllm.model_executor.layers.rotary_embedding.dynamic_ntk_scaling_rope import (
    DynamicNTKScalingRotaryEmbedding,
)
from vllm.model_executor.layers.rotary_embedding.linear_scaling_rope import LinearScalingRotaryEmbedding
from vllm.model_executor.layers.rotary_embedding.llama3_rope import Llama3RotaryEmbedding
from vllm.model_executor.layers.rotary_embedding.ntk_scaling_rope import NTKScalingRotaryEmbedding
from vllm.model_executor.layers.rotary_embedding.yarn_scaling_rope import YaRNScalingRotaryEmbedding

_REPLACED = (
    RotaryEmbedding,
    DynamicNTKAlphaRotaryEmbedding,
    DynamicNTKScalingRotaryEmbedding,
    LinearScalingRotaryEmbedding,
    Llama3RotaryEmbedding,
    NTKScalingRotaryEmbedding,
    YaRNScalingRotaryEmbedding,
)


@functools.cache
def register() -> None:
    """Have vLLM build the fused layer wherever a model asks for one of the above; once per process."""
    for layer in _REPLACED:
        fused = type(f"NPU{layer.__name__}", (FusedRotary, layer), {"__module__": __name__})
        CustomOp.register_oot(fused, name=layer.__name__)


@dataclass(frozen=True)
class _Angles:
    """cos and sin of every token of a batch, [1, tokens, 1, rotary_dim], as npu_rotary_mul takes them."""

    positions: torch.Tensor
    """What they were gathered for; held so that another tensor cannot take its identity."""
    cos: torch.Tensor
    sin: torch.Tensor


class FusedRotary(RotaryEmbedding):
    """Applies the angles of vLLM's cos_sin_cache to query and key."""

    def forward_oot(
        self, positions: torch.Tensor, query: torch.Tensor, key: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Query and key with the first rotary_dim elements of every head rotated; new tensors, same shapes.

        positions: int64 [tokens]; query, key: [tokens, heads * head_size] or [tokens, heads, head_size].
        """
        angles = self._angles_of(positions, query)
        return self._rotate(query, angles), None if key is None else self._rotate(key, angles)

    def _angles_of(self, positions: torch.Tensor, query: torch.Tensor) -> _Angles:
        if not is_forward_context_available():
            return self._gather(positions, query)
        kept = get_forward_context().additional_kwargs
        name = f"rotary angles of {id(self)}"
        angles: _Angles | None = kept.get(name)
        if angles is None or angles.positions is not positions:
            angles = kept[name] = self._gather(positions, query)
        return angles

    def _gather(self, positions: torch.Tensor, query: torch.Tensor) -> _Angles:
        cache = self._match_cos_sin_cache_dtype(query)
        cos, sin = cache.index_select(0, positions.flatten()).chunk(2, dim=-1)
        return _Angles(positions, self._full_width(cos), self._full_width(sin))

    def _full_width(self, half: torch.Tensor) -> torch.Tensor:
        """[tokens, rotary_dim / 2] -> [1, tokens, 1, rotary_dim]: each angle for both elements it turns."""
        full = half.repeat(1, 2) if self.is_neox_style else half.repeat_interleave(2, dim=-1)
        return full[None, :, None, :]

    def _rotate(self, x: torch.Tensor, angles: _Angles) -> torch.Tensor:
        heads = x.view(1, angles.cos.shape[1], -1, self.head_size)
        turned: torch.Tensor = torch_npu.npu_rotary_mul(
            heads[..., : self.rotary_dim],
            angles.cos,
            angles.sin,
            rotary_mode="half" if self.is_neox_style else "interleave",
        )
        if self.rotary_dim < self.head_size:
            turned = torch.cat((turned, heads[..., self.rotary_dim :]), dim=-1)
        return turned.view(x.shape)
