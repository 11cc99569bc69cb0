# SPDX-License-Identifier: Apache-2.0
"""The recall model for training: a Llama whose prompt's KV can be tampered with before it is read.

Two kinds of stream go through the layers together. The prompt's is computed once, as a prefill engine does.
Each answer stream attends to the prompt's KV as a decode engine would find it, through `tamper`. Parameters
are named as in transformers' LlamaForCausalLM, so that a state dict is a checkpoint.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# (layer, keys, values) -> the same, as every answer stream finds them:
# [batch, kv_head, token, dim] -> [stream, batch, kv_head, token, dim]
Tamper = Callable[[int, Tensor, Tensor], tuple[Tensor, Tensor]]


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


class Norm(nn.Module):
    """RMS norm, computed in fp32."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5)
        return self.weight * wide.to(x.dtype)


class Attention(nn.Module):
    """Projections of grouped-query attention; the layer decides who attends to what."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        queries, keys = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
        self.q_proj = nn.Linear(shape.hidden_size, queries, bias=False)
        self.k_proj = nn.Linear(shape.hidden_size, keys, bias=False)
        self.v_proj = nn.Linear(shape.hidden_size, keys, bias=False)
        self.o_proj = nn.Linear(queries, shape.hidden_size, bias=False)

    def project(self, x: Tensor, rope: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """x [..., token, hidden] -> q, k, v [..., head, token, dim], q and k rotated."""
        heads = (-1, self.shape.head_dim)
        q, k, v = (
            p(x).unflatten(-1, heads).transpose(-2, -3) for p in (self.q_proj, self.k_proj, self.v_proj)
        )
        return _rotate(q, rope), _rotate(k, rope), v

    def merge(self, heads: Tensor) -> Tensor:
        return self.o_proj(heads.transpose(-2, -3).flatten(-2))


class Mlp(nn.Module):
    """SwiGLU."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(shape.hidden_size, shape.intermediate_size, bias=False)
        self.up_proj = nn.Linear(shape.hidden_size, shape.intermediate_size, bias=False)
        self.down_proj = nn.Linear(shape.intermediate_size, shape.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    """One decoder layer but its attention, which the model computes for each kind of stream."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.input_layernorm = Norm(shape.hidden_size)
        self.self_attn = Attention(shape)
        self.post_attention_layernorm = Norm(shape.hidden_size)
        self.mlp = Mlp(shape)

    def finish(self, x: Tensor, heads: Tensor) -> Tensor:
        x = x + self.self_attn.merge(heads)
        return x + self.mlp(self.post_attention_layernorm(x))


class RecallModel(nn.Module):
    """Prompt in, logits of every answer stream out."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.model = nn.Module()
        self.model.embed_tokens = nn.Embedding(shape.vocab_size, shape.hidden_size)
        self.model.layers = nn.ModuleList(Layer(shape) for _ in range(shape.num_layers))
        self.model.norm = Norm(shape.hidden_size)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                into_residual = name.endswith(("o_proj.weight", "down_proj.weight"))
                nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5 * (0.3 if into_residual else 1.0))

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
            q, k, v = layer.self_attn.project(layer.input_layernorm(x), prompt_rope)
            found_k, found_v = tamper(index, k, v)
            if index + 1 < self.shape.num_layers:
                x = layer.finish(x, _causal(q, k, v))
            q, k, v = layer.self_attn.project(layer.input_layernorm(y), answer_rope)
            y = layer.finish(y, _masked(q, torch.cat((found_k, k), -2), torch.cat((found_v, v), -2), mask))
        return self.model.norm(y) @ self.model.embed_tokens.weight.T


def _rope_table(shape: Shape, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
    exponent = torch.arange(0, shape.head_dim, 2, device=device).float() / shape.head_dim
    angle = torch.outer(torch.arange(length, device=device).float(), shape.rope_theta**-exponent)
    angle = torch.cat((angle, angle), -1)
    return angle.cos(), angle.sin()


def _rotate(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
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
