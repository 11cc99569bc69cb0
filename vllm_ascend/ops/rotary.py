# SPDX-License-Identifier: Apache-2.0
"""Rotary position embedding on npu_rotary_mul, in the place of vLLM's rotary layers.

vLLM has one layer class per way to compute the angles, and all of those below apply them in the same way. So
one mixin replaces the application and leaves the angles to vLLM. All layers of a model rotate by the same
positions, so cos and sin are gathered once per forward pass and kept in vLLM's forward context.

Where text and pictures mix (mrope), a token has three positions, in time, height and width, and each pair of
elements turns by one of them. Towers of pictures bring angles of their own.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import torch_npu
from vllm.forward_context import get_forward_context, is_forward_context_available
from vllm.model_executor.custom_op import CustomOp
from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbedding, RotaryEmbeddingBase
from vllm.model_executor.layers.rotary_embedding.common import ApplyRotaryEmb
from vllm.model_executor.layers.rotary_embedding.dynamic_ntk_alpha_rope import DynamicNTKAlphaRotaryEmbedding
from vllm.model_executor.layers.rotary_embedding.dynamic_ntk_scaling_rope import (
    DynamicNTKScalingRotaryEmbedding,
)
from vllm.model_executor.layers.rotary_embedding.linear_scaling_rope import LinearScalingRotaryEmbedding
from vllm.model_executor.layers.rotary_embedding.llama3_rope import Llama3RotaryEmbedding
from vllm.model_executor.layers.rotary_embedding.mrope import MRotaryEmbedding, apply_interleaved_rope
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
    CustomOp.register_oot(FusedMRotary, name=MRotaryEmbedding.__name__)
    CustomOp.register_oot(NPUApplyRotaryEmb, name=ApplyRotaryEmb.__name__)


@dataclass(frozen=True)
class _Angles:
    """cos and sin of every token of a batch, [1, tokens, 1, rotary_dim], as npu_rotary_mul takes them."""

    positions: torch.Tensor
    """What they were gathered for; held so that another tensor cannot take its identity."""
    cos: torch.Tensor
    sin: torch.Tensor


class FusedRotary(RotaryEmbeddingBase):
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
        return _Angles(positions, _full_width(cos, self.is_neox_style), _full_width(sin, self.is_neox_style))

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


class FusedMRotary(FusedRotary, MRotaryEmbedding):
    """Each pair of elements turns by one of a token's three positions."""

    def _gather(self, positions: torch.Tensor, query: torch.Tensor) -> _Angles:
        """positions: int64 [tokens], where all three are the same, or [3, tokens]."""
        if positions.ndim == 1:
            return super()._gather(positions, query)
        cache = self._match_cos_sin_cache_dtype(query)
        angles = cache.index_select(0, positions.flatten()).unflatten(0, positions.shape)
        cos, sin = (self._choose(half) for half in angles.chunk(2, dim=-1))
        return _Angles(positions, _full_width(cos, self.is_neox_style), _full_width(sin, self.is_neox_style))

    def _choose(self, angles: torch.Tensor) -> torch.Tensor:
        """[3, tokens, rotary_dim / 2] -> [tokens, rotary_dim / 2], by the model's sections."""
        assert self.mrope_section is not None
        if self.mrope_interleaved:
            chosen: torch.Tensor = apply_interleaved_rope(angles, self.mrope_section)
            return chosen
        sections = angles.split(self.mrope_section, dim=-1)
        return torch.cat([section[axis] for axis, section in enumerate(sections)], dim=-1)


class NPUApplyRotaryEmb(ApplyRotaryEmb):
    """Applies angles that the caller brings."""

    def forward_oot(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """x rotated; a new tensor.

        x: [batch, rows, heads, head_size] or without the batch; cos, sin: [rows, head_size / 2].
        """
        dtype = torch.float32 if self.enable_fp32_compute else x.dtype
        turned: torch.Tensor = torch_npu.npu_rotary_mul(
            x.to(dtype).reshape(-1, *x.shape[-3:]),
            _full_width(cos.to(dtype), self.is_neox_style),
            _full_width(sin.to(dtype), self.is_neox_style),
            rotary_mode="half" if self.is_neox_style else "interleave",
        )
        return turned.view(x.shape).to(x.dtype)


def _full_width(half: torch.Tensor, is_neox_style: bool) -> torch.Tensor:
    """[tokens, rotary_dim / 2] -> [1, tokens, 1, rotary_dim]: each angle for both elements it turns."""
    full = half.repeat(1, 2) if is_neox_style else half.repeat_interleave(2, dim=-1)
    return full[None, :, None, :]
