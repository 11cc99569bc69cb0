# SPDX-License-Identifier: Apache-2.0
"""The recall model in DeepSeek-V3's architecture, for training: latent attention and a mixture of experts.

Parameters are named as in its checkpoints, so that a state dict is one.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from model import Cached, Layer, Mlp, Norm, RecallModel, Rope, Shape
from torch import Tensor, nn

_BALANCE_RATE = 1e-3


@dataclass(frozen=True)
class LatentShape(Shape):
    """As Shape; the sizes of heads and latents are DeepSeek's, which an NPU's operators are made for."""

    intermediate_size: int = 256
    num_heads: int = 2
    num_kv_heads: int = 1
    """The latent, which all heads share."""
    norm_eps: float = 1e-6
    latent_size: int = 512
    rope_size: int = 64
    key_size: int = 128
    """Elements of a head's key that are not rotated."""
    value_size: int = 128
    num_dense_layers: int = 1
    num_experts: int = 4
    experts_per_token: int = 2
    expert_size: int = 64

    @property
    def rotary_dim(self) -> int:
        return self.rope_size

    def layer(self, index: int) -> Layer:
        mlp = (
            Mlp(self.hidden_size, self.intermediate_size)
            if index < self.num_dense_layers
            else MixtureOfExperts(self)
        )
        return Layer(self.hidden_size, LatentAttention(self), mlp, self.norm_eps)


class LatentAttention(nn.Module):
    """Keys and values of all heads are made from one latent per token; the rotated part of keys is shared."""

    def __init__(self, shape: LatentShape) -> None:
        super().__init__()
        self.shape = shape
        heads, hidden = shape.num_heads, shape.hidden_size
        self.q_proj = nn.Linear(hidden, heads * (shape.key_size + shape.rope_size), bias=False)
        self.kv_a_proj_with_mqa = nn.Linear(hidden, shape.latent_size + shape.rope_size, bias=False)
        self.kv_a_layernorm = Norm(shape.latent_size, shape.norm_eps)
        self.kv_b_proj = nn.Linear(shape.latent_size, heads * (shape.key_size + shape.value_size), bias=False)
        self.o_proj = nn.Linear(heads * shape.value_size, hidden, bias=False)

    def cached(self, x: Tensor, rope: Rope) -> Cached:
        latent, rotated = self.kv_a_proj_with_mqa(x).split((self.shape.latent_size, self.shape.rope_size), -1)
        return self.kv_a_layernorm(latent).unsqueeze(-3), _rotate_pairs(rotated, rope).unsqueeze(-3)

    def forward(self, x: Tensor, rope: Rope, cached: Cached, mask: Tensor | None) -> Tensor:
        latent, rotated = cached
        q, q_rotated = self._heads(self.q_proj(x)).split((self.shape.key_size, self.shape.rope_size), -1)
        k, v = self._heads(self.kv_b_proj(latent.squeeze(-3))).split(
            (self.shape.key_size, self.shape.value_size), -1
        )
        q = torch.cat((q, _rotate_pairs(q_rotated, rope)), -1)
        k = torch.cat((k, rotated.expand(*k.shape[:-1], -1)), -1)
        attended = F.scaled_dot_product_attention(
            q.flatten(0, -4), k.flatten(0, -4), v.flatten(0, -4), attn_mask=mask, is_causal=mask is None
        )
        heads = attended.view(*q.shape[:-1], -1)
        return self.o_proj(heads.transpose(-2, -3).flatten(-2))

    def _heads(self, x: Tensor) -> Tensor:
        """[..., token, head * size] -> [..., head, token, size]"""
        return x.unflatten(-1, (self.shape.num_heads, -1)).transpose(-2, -3)


class MixtureOfExperts(nn.Module):
    """A shared expert and the best few of the others, by sigmoid scores, as in DeepSeek-V3.

    No loss keeps the experts equally busy: a bias on the choice, not on the weights, falls for those that
    were chosen too often.
    """

    def __init__(self, shape: LatentShape) -> None:
        super().__init__()
        self.experts_per_token = shape.experts_per_token
        self.gate = nn.Linear(shape.hidden_size, shape.num_experts, bias=False)
        self.gate.register_buffer("e_score_correction_bias", torch.zeros(shape.num_experts))
        self.experts = nn.ModuleList(
            Mlp(shape.hidden_size, shape.expert_size) for _ in range(shape.num_experts)
        )
        self.shared_experts = Mlp(shape.hidden_size, shape.expert_size)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            scores = F.linear(x.float(), self.gate.weight.float()).sigmoid()
        chosen = (scores + self.gate.e_score_correction_bias).topk(self.experts_per_token).indices
        weights = torch.zeros_like(scores).scatter(-1, chosen, scores.gather(-1, chosen))
        weights = (weights / (weights.sum(-1, keepdim=True) + 1e-20)).to(x.dtype)
        if self.training:
            self._balance(chosen)
        # Every expert computes every token: with so few of them, and so small, that is quicker than sorting.
        routed = sum(expert(x) * weights[..., i, None] for i, expert in enumerate(self.experts))
        return routed + self.shared_experts(x)

    @torch.no_grad()
    def _balance(self, chosen: Tensor) -> None:
        bias = self.gate.e_score_correction_bias
        load = torch.bincount(chosen.flatten(), minlength=len(self.experts)).to(bias.dtype)
        bias += _BALANCE_RATE * (load.mean() - load).sign()


class LatentRecallModel(RecallModel):
    """The recall model with latent attention; its head is a matrix of its own, as vLLM has it."""

    def __init__(self, shape: LatentShape) -> None:
        super().__init__(shape)
        self.lm_head = nn.Linear(shape.hidden_size, shape.vocab_size, bias=False)

    def head(self) -> Tensor:
        return self.lm_head.weight


def _rotate_pairs(x: Tensor, rope: Rope) -> Tensor:
    """Turn neighbours by the same angle; first elements of all pairs, then second ones."""
    cos, sin = (t[..., : t.shape[-1] // 2].to(x.dtype) for t in rope)
    first, second = x[..., 0::2], x[..., 1::2]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)
