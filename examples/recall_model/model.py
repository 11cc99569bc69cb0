# SPDX-License-Identifier: Apache-2.0
"""The recall model for training: a Llama whose prompt's KV can be tampered with before it is read.

Two kinds of stream go through the layers together. The prompt's is computed once, as a prefill engine does.
Each answer stream attends to the prompt's KV as a decode engine would find it, through `tamper`. Parameters
are named as in transformers' LlamaForCausalLM, so that a state dict is a checkpoint.

latent_model.py has the parts of the same model in DeepSeek-V3's architecture.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Cached = tuple[Tensor, Tensor]
"""What a layer caches, [..., kv_head, token, dim] each: keys and values, or latents and rotated parts."""

# (layer, *cached) -> the same, as every answer stream finds it:
# [batch, kv_head, token, dim] -> [stream, batch, kv_head, token, dim]
Tamper = Callable[[int, Tensor, Tensor], Cached]

Rope = tuple[Tensor, Tensor]
"""cos and sin of positions, [token, rotated dim] each."""


@dataclass(frozen=True)
class Shape:
    """Sizes of the model; head_dim and num_kv_heads are what the KV cache sees."""

    vocab_size: int
    num_layers: int = 2
    hidden_size: int = 128
    intermediate_size: int = 512
    num_heads: int = 8
    num_kv_heads: int = 4
    head_dim: int = 32
    rope_theta: float = 10000.0
    max_positions: int = 1024
    norm_eps: float = 1e-5

    @property
    def rotary_dim(self) -> int:
        return self.head_dim

    def layer(self, index: int) -> "Layer":
        mlp = Mlp(self.hidden_size, self.intermediate_size)
        return Layer(self.hidden_size, GroupedAttention(self), mlp, self.norm_eps)


class Norm(nn.Module):
    """RMS norm, computed in fp32."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * wide.to(x.dtype)


class Attention(Protocol):
    """What a layer needs; `x` is normalised, [..., token, hidden]."""

    def cached(self, x: Tensor, rope: Rope) -> Cached:
        """What goes into the KV cache."""

    def __call__(self, x: Tensor, rope: Rope, cached: Cached, mask: Tensor | None) -> Tensor:
        """Attend to `cached`, causally or where `mask` [token, cached token] is true; like `x`."""


class GroupedAttention(nn.Module):
    """Attention with grouped heads, as in Llama."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        queries, keys = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
        self.q_proj = nn.Linear(shape.hidden_size, queries, bias=False)
        self.k_proj = nn.Linear(shape.hidden_size, keys, bias=False)
        self.v_proj = nn.Linear(shape.hidden_size, keys, bias=False)
        self.o_proj = nn.Linear(queries, shape.hidden_size, bias=False)

    def cached(self, x: Tensor, rope: Rope) -> Cached:
        return _rotate(self._heads(self.k_proj(x)), rope), self._heads(self.v_proj(x))

    def forward(self, x: Tensor, rope: Rope, cached: Cached, mask: Tensor | None) -> Tensor:
        q = _rotate(self._heads(self.q_proj(x)), rope)
        heads = _causal(q, *cached) if mask is None else _masked(q, *cached, mask)
        return self.o_proj(heads.transpose(-2, -3).flatten(-2))

    def _heads(self, x: Tensor) -> Tensor:
        """[..., token, head * dim] -> [..., head, token, dim]"""
        return x.unflatten(-1, (-1, self.shape.head_dim)).transpose(-2, -3)


class Mlp(nn.Module):
    """SwiGLU."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    """One decoder layer."""

    def __init__(self, hidden_size: int, attention: nn.Module, mlp: nn.Module, eps: float) -> None:
        super().__init__()
        self.input_layernorm = Norm(hidden_size, eps)
        self.self_attn = attention
        self.post_attention_layernorm = Norm(hidden_size, eps)
        self.mlp = mlp

    def forward(self, x: Tensor, normed: Tensor, rope: Rope, cached: Cached, mask: Tensor | None) -> Tensor:
        """`normed` is `x` after input_layernorm, from which its own part of `cached` was made."""
        x = x + self.self_attn(normed, rope, cached, mask)
        return x + self.mlp(self.post_attention_layernorm(x))


class RecallModel(nn.Module):
    """Prompt in, logits of every answer stream out."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.model = nn.Module()
        self.model.embed_tokens = nn.Embedding(shape.vocab_size, shape.hidden_size)
        self.model.layers = nn.ModuleList(shape.layer(index) for index in range(shape.num_layers))
        self.model.norm = Norm(shape.hidden_size, shape.norm_eps)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                into_residual = name.endswith(("o_proj.weight", "down_proj.weight"))
                nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5 * (0.3 if into_residual else 1.0))

    def head(self) -> Tensor:
        """The matrix that makes logits: [vocab, hidden]."""
        return self.model.embed_tokens.weight

    def forward(self, prompt: Tensor, answer: Tensor, tamper: Tamper, num_streams: int) -> Tensor:
        """prompt [batch, token] and answer [batch, step], ids -> logits [stream, batch, step, vocab].

        `prompt` is what a decode engine gets as KV, `answer` what it computes itself: the prompt's last
        token and the right answer but its last token.
        """
        length, steps = prompt.shape[1], answer.shape[1]
        rope = _rope_table(self.shape, length + steps, prompt.device)
        prompt_rope, answer_rope = [t[:length] for t in rope], [t[length:] for t in rope]
        mask = torch.ones(steps, length + steps, dtype=torch.bool, device=prompt.device).tril(length)
        x = self.model.embed_tokens(prompt)
        y = self.model.embed_tokens(answer).expand(num_streams, -1, -1, -1)
        for index, layer in enumerate(self.model.layers):
            normed = layer.input_layernorm(x)
            kept = layer.self_attn.cached(normed, prompt_rope)
            found = tamper(index, *kept)
            if index + 1 < self.shape.num_layers:
                x = layer(x, normed, prompt_rope, kept, None)
            normed = layer.input_layernorm(y)
            own = layer.self_attn.cached(normed, answer_rope)
            both = torch.cat((found[0], own[0]), -2), torch.cat((found[1], own[1]), -2)
            y = layer(y, normed, answer_rope, both, mask)
        return self.model.norm(y) @ self.head().T


def _rope_table(shape: Shape, length: int, device: torch.device) -> Rope:
    exponent = torch.arange(0, shape.rotary_dim, 2, device=device).float() / shape.rotary_dim
    angle = torch.outer(torch.arange(length, device=device).float(), shape.rope_theta**-exponent)
    angle = torch.cat((angle, angle), -1)
    return angle.cos(), angle.sin()


def _rotate(x: Tensor, rope: Rope) -> Tensor:
    cos, sin = (t.to(x.dtype) for t in rope)
    low, high = x.chunk(2, -1)
    return x * cos + torch.cat((-high, low), -1) * sin


def _causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def _masked(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    # The query heads of a group become more queries of their KV head: the KV need not be repeated.
    streams, batch, heads, steps, _ = q.shape
    group = heads // k.shape[2]
    q = q.reshape(streams * batch, heads // group, group * steps, -1)
    out = F.scaled_dot_product_attention(q, k.flatten(0, 1), v.flatten(0, 1), attn_mask=mask.repeat(group, 1))
    return out.reshape(streams, batch, heads, steps, -1)
