# SPDX-License-Identifier: Apache-2.0
"""Attention of vision and audio towers on npu_fused_infer_attention_score, in the place of vLLM's layer.

A tower's rows see each other without causality and nothing is cached. All pictures of a batch (or windows of
them) are packed, one sequence after the other, and the operator keeps them apart by where each one ends.

vLLM calls the backend of such layers TORCH_SDPA: a model refuses names that it does not know, and this is the
one that every model knows. The layer below replaces it whatever its name.
"""

from __future__ import annotations

import functools

import numpy as np
import torch
import torch_npu
from torch.nn import functional
from vllm.model_executor.custom_op import CustomOp
from vllm.model_executor.layers.attention.mm_encoder_attention import MMEncoderAttention
from vllm.v1.attention.backends.registry import AttentionBackendEnum

MAX_SEQUENCES = 4096
"""Sequences that one call of the operator takes."""
HEAD_SIZES = (64, 128)
"""Head sizes for which the operator's packed form is made. Zeros fill a smaller head up to one of them."""
HEAD_SIZE_STEP = 16
"""Of larger heads."""


@functools.cache
def register() -> None:
    """Have vLLM build this layer wherever a tower asks for MMEncoderAttention; once per process."""
    CustomOp.register_oot(NPUEncoderAttention, name=MMEncoderAttention.__name__)


class NPUEncoderAttention(MMEncoderAttention):
    """Attention without causality and without a cache."""

    @classmethod
    def maybe_compute_seq_lens(
        cls, attn_backend: AttentionBackendEnum, cu_seqlens: np.ndarray, device: torch.device
    ) -> None:
        """Nothing beside `cu_seqlens` is needed."""

    @classmethod
    def maybe_recompute_cu_seqlens(
        cls,
        attn_backend: AttentionBackendEnum,
        cu_seqlens: np.ndarray,
        hidden_size: int,
        tp_size: int,
        device: torch.device,
        fp8_padded_hidden_size: int | None = None,
    ) -> torch.Tensor:
        """int [sequences + 1] on the CPU, where the operator wants its lengths: no layer waits for a copy."""
        return torch.from_numpy(cu_seqlens)

    def forward_oot(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        cu_seqlens: torch.Tensor | None = None,
        max_seqlen: torch.Tensor | None = None,
        sequence_lengths: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The attended values, of query's shape.

        query: [batch, rows, num_heads * head_size] or [batch, rows, num_heads, head_size]; key, value: alike,
        with their rows and num_kv_heads. cu_seqlens: int [sequences + 1], where in the packed batch each
        sequence begins and the last one ends; None: each of the batch is one sequence.
        """
        packed = self._attend(
            self._packed(query, self.num_heads),
            self._packed(key, self.num_kv_heads),
            self._packed(value, self.num_kv_heads),
            _ends(query) if cu_seqlens is None else cu_seqlens[1:].tolist(),
            _ends(key) if cu_seqlens is None else cu_seqlens[1:].tolist(),
        )
        return packed[..., : self.head_size].reshape(query.shape)

    def _packed(self, x: torch.Tensor, num_heads: int) -> torch.Tensor:
        """[batch * rows, num_heads, a head size that the operator takes], the new elements zero."""
        heads = x.reshape(-1, num_heads, self.head_size)
        return functional.pad(heads, (0, padded_head_size(self.head_size) - self.head_size))

    def _attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        query_ends: list[int],
        key_ends: list[int],
    ) -> torch.Tensor:
        """query and result: [rows, num_heads, size]; key, value: [keys, num_kv_heads, size]."""
        results = []
        row = column = 0
        for first in range(0, len(query_ends), MAX_SEQUENCES):
            row_ends, column_ends = (ends[first : first + MAX_SEQUENCES] for ends in (query_ends, key_ends))
            attended, _ = torch_npu.npu_fused_infer_attention_score_v2(
                query[row : row_ends[-1]],
                key[column : column_ends[-1]],
                value[column : column_ends[-1]],
                actual_seq_qlen=[end - row for end in row_ends],
                actual_seq_kvlen=[end - column for end in column_ends],
                num_query_heads=self.num_heads,
                num_key_value_heads=self.num_kv_heads,
                softmax_scale=self.scale,
                input_layout="TND",
            )
            results.append(attended)
            row, column = row_ends[-1], column_ends[-1]
        return results[0] if len(results) == 1 else torch.cat(results)


def padded_head_size(head_size: int) -> int:
    """The next head size that the operator takes."""
    for size in HEAD_SIZES:
        if head_size <= size:
            return size
    return -(-head_size // HEAD_SIZE_STEP) * HEAD_SIZE_STEP


def _ends(x: torch.Tensor) -> list[int]:
    """Where each of x's batch ends in the packed rows."""
    batch, rows = x.shape[:2]
    return [rows * (index + 1) for index in range(batch)]
