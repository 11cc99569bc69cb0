# SPDX-License-Identifier: Apache-2.0
"""Attention over latent KV (MLA): the cache holds one row per token, from which each head's K and V are made.

vLLM's layer (MLAAttention) cuts a batch in two and calls this file for each part.

- *Decode*, one query row per request: the layer has multiplied the query by the K half of kv_b_proj, so
  that it compares with latents as they lie in the cache, and multiplies the result by the V half.
- *Prefill*, the rest: latents are decompressed to K and V of every head. The new tokens attend to each other
  first; then, if some of the request was computed before (an earlier chunk, a cached prefix), to the cached
  ones, piece by piece so that no more is decompressed at once than vLLM has reserved memory for.

A row is the latent and the rotated part of the key side by side, as vLLM stores it, since that keeps a block
in one piece. Paged operators that want the two apart (npu_fused_infer_attention_score with key_rope,
npu_multi_head_latent_attention) want each as a contiguous tensor under one block table, which two strips of a
page cannot be (docs/architecture.md). So decode runs on _npu_paged_attention_mla, which takes joint rows.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch_npu
from vllm.v1.attention.backend import AttentionLayer, AttentionType, MLAAttentionImpl
from vllm.v1.attention.backends.mla.prefill.base import MLAPrefillBackend

from vllm_ascend.attention.cache_layout import latent_pages
from vllm_ascend.attention.latent_metadata import ContextChunk, LatentMetadata, LatentPrefillMetadata
from vllm_ascend.attention.paging import latent_paging
from vllm_ascend.errors import ConfigError

if TYPE_CHECKING:
    from vllm.model_executor.layers.linear import ColumnParallelLinear

CAUSAL_FROM_BOTTOM_RIGHT = 3
EVERYTHING = 0
"""`sparse_mode` of npu_fused_infer_attention_score."""

PREFILL_HEAD_SIZES = ((192, 128), (192, 192), (128, 128))
"""(K, V) head sizes that the operator takes over packed tokens outside of a paged cache."""


class LatentPrefill(MLAPrefillBackend):
    """Attention of prefill tokens over decompressed K and V, both packed: [tokens, heads, size]."""

    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.bfloat16, torch.float16, torch.float32]

    @staticmethod
    def get_name() -> str:
        return "NPU_LATENT"

    def run_prefill_new_tokens(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        return_softmax_lse: bool,
        out: torch.Tensor | None = None,
        output_scale: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Each request over its own new tokens, causal.

        Returns [tokens, heads, V size] of q's type, and its lse, float32 [tokens, heads, 1] (empty unless
        asked for).
        """
        assert out is None
        assert output_scale is None
        step: LatentPrefillMetadata = self._prefill_metadata  # type: ignore[assignment]  # vLLM's type is its own
        return self._attend(
            q, k, v, step.query_ends, step.query_ends, CAUSAL_FROM_BOTTOM_RIGHT, return_softmax_lse
        )

    def run_prefill_context_chunk(
        self,
        chunk: ContextChunk,  # type: ignore[override]  # vLLM's has what its own kernels want
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The chunk's requests over the chunk's cached tokens, all of which they see; results as above."""
        assert out is None
        return self._attend(q, k, v, chunk.query_ends, chunk.kv_ends, EVERYTHING, True)

    def _attend(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        query_ends: list[int],
        kv_ends: list[int],
        sparse_mode: int,
        wants_lse: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        step: LatentPrefillMetadata = self._prefill_metadata  # type: ignore[assignment]  # as above
        attended, lse = torch_npu.npu_fused_infer_attention_score(
            q.contiguous(),
            k,
            v.contiguous(),
            atten_mask=step.mask if sparse_mode else None,
            actual_seq_lengths=query_ends,
            actual_seq_lengths_kv=kv_ends,
            num_heads=self.num_heads,
            scale=self.scale,
            input_layout="TND",
            sparse_mode=sparse_mode,
            softmax_lse_flag=wants_lse,
        )
        return attended, lse


class LatentAttention(MLAAttentionImpl[LatentMetadata]):
    """Attention of one layer; every query head of this rank reads the one latent."""

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int,
        alibi_slopes: list[float] | None,
        sliding_window: int | None,
        kv_cache_dtype: str,
        logits_soft_cap: float | None,
        attn_type: str,
        kv_sharing_target_layer_name: str | None,
        q_lora_rank: int | None,
        kv_lora_rank: int,
        qk_nope_head_dim: int,
        qk_rope_head_dim: int,
        qk_head_dim: int,
        v_head_dim: int,
        kv_b_proj: ColumnParallelLinear,
        indexer: object | None = None,
        q_pad_num_heads: int | None = None,
    ) -> None:
        wishes: dict[str, Any] = {
            "ALiBi slopes": alibi_slopes,
            "a sliding window over latents": sliding_window,
            "logits_soft_cap": logits_soft_cap,
            "a KV cache shared between layers": kv_sharing_target_layer_name,
        }
        for name, value in wishes.items():
            if value:
                raise ConfigError(f"this model needs {name}, and an NPU engine does not do that yet")
        if (qk_head_dim, v_head_dim) not in PREFILL_HEAD_SIZES:
            raise ConfigError(
                f"this model's heads have {qk_head_dim} elements of K (qk_nope_head_dim + qk_rope_head_dim) "
                f"and {v_head_dim} of V (v_head_dim), and an NPU's prefill takes {PREFILL_HEAD_SIZES} only"
            )
        assert attn_type == AttentionType.DECODER
        assert num_kv_heads == 1
        self.num_heads = num_heads
        self.head_size = head_size
        self.scale = scale
        self.num_kv_heads = num_kv_heads
        self.kv_cache_dtype = kv_cache_dtype
        self._latent_size = kv_lora_rank
        self._key_size = qk_nope_head_dim
        self._decompress = kv_b_proj

    def do_kv_cache_update(
        self,
        kv_c_normed: torch.Tensor,
        k_pe: torch.Tensor,
        kv_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
        kv_cache_dtype: str,
        k_scale: torch.Tensor,
    ) -> None:
        """Store a row for each token with a slot.

        kv_c_normed: [tokens, latent size]; k_pe: [tokens, 1, rope size], rotated; kv_cache: [num_blocks,
        block_size, latent size + rope size], empty while vLLM is measuring memory; slot_mapping: vLLM's
        slots, block * block_size + offset, of which negative ones go nowhere.
        """
        if kv_cache.numel() == 0:
            return
        num_tokens = slot_mapping.numel()
        rows = torch.cat((kv_c_normed[:num_tokens].unsqueeze(1), k_pe[:num_tokens]), dim=-1)
        torch_npu._npu_reshape_and_cache_siso(
            rows, latent_pages(kv_cache), latent_paging(kv_cache).slots(slot_mapping.flatten())
        )

    def forward_mqa(
        self,
        q: torch.Tensor | tuple[torch.Tensor, torch.Tensor],
        kv_c_and_k_pe_cache: torch.Tensor,
        attn_metadata: LatentMetadata,
        layer: AttentionLayer,
    ) -> tuple[torch.Tensor, None]:
        """Decode: one query row per request, its K part already in terms of latents.

        q: [requests, heads, latent size] and [requests, heads, rope size]. Returns a mean of latents for each
        head, [requests, heads, latent size], and no lse.
        """
        decode = attn_metadata.decode
        assert decode is not None
        query = torch.cat(q, dim=-1) if isinstance(q, tuple) else q
        attended = query.new_empty(*query.shape[:2], self._latent_size)
        torch_npu._npu_paged_attention_mla(
            query,
            latent_pages(kv_c_and_k_pe_cache),
            num_kv_heads=1,
            num_heads=query.shape[1],
            scale_value=self.scale,
            block_table=decode.block_table,
            context_lens=decode.kv_lengths,
            mla_vheadsize=self._latent_size,
            out=attended,
        )
        return attended, None

    def forward_mha(
        self,
        q: torch.Tensor,
        kv_c_normed: torch.Tensor,
        k_pe: torch.Tensor,
        kv_c_and_k_pe_cache: torch.Tensor,
        attn_metadata: LatentMetadata,
        k_scale: torch.Tensor,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
    ) -> None:
        """Prefill; the result goes to `output` [tokens, heads * V size].

        q: [tokens, heads, K size]; kv_c_normed: [tokens, latent size]; k_pe: [tokens, 1, rope size], rotated.
        """
        assert output_scale is None
        prefill = attn_metadata.prefill
        assert prefill is not None
        k, v = self._keys_and_values(kv_c_normed, k_pe)
        attended, lse = prefill.backend.run_prefill_new_tokens(
            q, k, v, return_softmax_lse=bool(prefill.chunks)
        )
        rows = latent_pages(kv_c_and_k_pe_cache).flatten(0, 1)
        for chunk in prefill.chunks:
            cached = rows.index_select(0, chunk.slots)
            k, v = self._keys_and_values(cached[:, 0, : self._latent_size], cached[..., self._latent_size :])
            piece = prefill.backend.run_prefill_context_chunk(chunk, q[chunk.query_rows], k, v)
            _merge(attended[chunk.query_rows], lse[chunk.query_rows], *piece)
        output.copy_(attended.flatten(1))

    def _keys_and_values(
        self, latents: torch.Tensor, rope: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V of every head, [tokens, heads, size]; latents: [tokens, size]; rope: [tokens, 1, size]."""
        both = self._decompress(latents)[0].unflatten(-1, (self.num_heads, -1))
        keys, values = both[..., : self._key_size], both[..., self._key_size :]
        return torch.cat((keys, rope.expand(-1, self.num_heads, -1)), dim=-1), values


def _merge(
    attended: torch.Tensor, lse: torch.Tensor, attended_too: torch.Tensor, lse_too: torch.Tensor
) -> None:
    """Make `attended` [tokens, heads, size] and `lse` [tokens, heads, 1] those over the keys of both."""
    merged, _ = torch_npu.npu_attention_update(
        [lse.flatten(), lse_too.flatten()], [attended.flatten(0, 1), attended_too.flatten(0, 1)], 0
    )
    attended.copy_(merged.view(attended.shape))
    lse.copy_(torch.logaddexp(lse, lse_too))
