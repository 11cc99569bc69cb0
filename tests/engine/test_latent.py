# SPDX-License-Identifier: Apache-2.0
"""Latent attention by itself: prefill over cached rows in pieces of any size, and where their rows lie."""

from __future__ import annotations

import pytest
import torch
from device.attention_formula import attend, causal, everything
from device.operator_support import assert_near, random
from torch import nn

from vllm_ascend.attention.latent import LatentAttention, LatentPrefill
from vllm_ascend.attention.latent_metadata import (
    LatentDecodeMetadata,
    LatentMetadata,
    LatentPrefillMetadata,
    context_chunks,
)
from vllm_ascend.attention.metadata import causal_mask
from vllm_ascend.attention.paging import Paging, latent_paging
from vllm_ascend.errors import ConfigError

HEADS, LATENT, ROPE, KEY, VALUE, BLOCK_SIZE = 2, 512, 64, 128, 128, 16
SCALE = 0.05
DTYPE = torch.bfloat16
TABLE = [[7, 2, 0], [5, 1, 6], [3, 4, 0]]
CACHED, NEW = [0, 37, 5], [3, 2, 4]
"""Tokens of three requests: those in the cache already, and those of this step."""


class Decompression(nn.Module):
    """kv_b_proj: latents to K and V of every head."""

    def __init__(self) -> None:
        super().__init__()
        weight = random(HEADS * (KEY + VALUE), LATENT, dtype=torch.float32, seed=7) / LATENT**0.5
        self.weight = nn.Parameter(weight.to(DTYPE).to("npu"))

    def forward(self, latents: torch.Tensor) -> tuple[torch.Tensor, None]:
        return latents @ self.weight.T, None


def sizes() -> dict[str, int]:
    return {
        "kv_lora_rank": LATENT,
        "qk_nope_head_dim": KEY,
        "qk_rope_head_dim": ROPE,
        "v_head_dim": VALUE,
    }


def attention(**changes: object) -> LatentAttention:
    arguments = sizes() | {
        "num_heads": HEADS,
        "head_size": LATENT + ROPE,
        "scale": SCALE,
        "num_kv_heads": 1,
        "alibi_slopes": None,
        "sliding_window": None,
        "kv_cache_dtype": "auto",
        "logits_soft_cap": None,
        "attn_type": "decoder",
        "kv_sharing_target_layer_name": None,
        "q_lora_rank": None,
        "qk_head_dim": KEY + ROPE,
        "kv_b_proj": Decompression(),
    }
    return LatentAttention(**arguments | changes)  # type: ignore[arg-type]


def test_chunks_cover_every_cached_token_once_and_in_order() -> None:
    chunks = context_chunks(CACHED, [3, 5, 9], torch.tensor(TABLE, dtype=torch.int32), BLOCK_SIZE, 20)
    # Of the second request 20 and then 17 tokens, the last with what fits of the third.
    assert [(chunk.query_rows, chunk.query_ends, chunk.kv_ends) for chunk in chunks] == [
        (slice(3, 5), [2], [20]),
        (slice(3, 9), [2, 6], [17, 20]),
        (slice(5, 9), [4], [2]),
    ]
    slots = [slot for chunk in chunks for slot in chunk.slots.tolist()]
    second = [*range(80, 96), *range(16, 32), *range(96, 101)]
    assert slots == [*second, *range(48, 53)]


def test_nothing_cached_needs_no_chunk() -> None:
    assert context_chunks([0, 0], [3, 5], torch.zeros(2, 1, dtype=torch.int32), BLOCK_SIZE, 20) == []


def empty_cache(num_layers: int) -> torch.Tensor:
    """Eight blocks of NaN: of the only layer, or head-major of the second of several."""
    blocks = torch.full((8, num_layers, BLOCK_SIZE, LATENT + ROPE), torch.nan, dtype=DTYPE, device="npu")
    return blocks[:, num_layers // 2]


@pytest.mark.parametrize(("max_tokens", "num_layers"), [(1000, 1), (20, 1), (7, 1), (20, 3)])
def test_prefill_in_pieces_is_causal_attention_over_all(max_tokens: int, num_layers: int) -> None:
    impl = attention()
    total = [cached + new for cached, new in zip(CACHED, NEW, strict=True)]
    latents = [random(n, LATENT, dtype=DTYPE, seed=b) for b, n in enumerate(total)]
    ropes = [random(n, 1, ROPE, dtype=DTYPE, seed=9 + b) for b, n in enumerate(total)]
    query = random(sum(NEW), HEADS, KEY + ROPE, dtype=DTYPE, seed=20)
    cache = empty_cache(num_layers)
    for b, cached in enumerate(CACHED):
        slots = [TABLE[b][t // BLOCK_SIZE] * BLOCK_SIZE + t % BLOCK_SIZE for t in range(cached)]
        impl.do_kv_cache_update(
            latents[b][:cached].to("npu"),
            ropes[b][:cached].to("npu"),
            cache,
            torch.tensor(slots, dtype=torch.int64, device="npu"),
            "auto",
            torch.ones(()),
        )
    output = torch.empty(sum(NEW), HEADS * VALUE, dtype=DTYPE, device="npu")
    impl.forward_mha(
        query.to("npu"),
        torch.cat([rows[cached:] for rows, cached in zip(latents, CACHED, strict=True)]).to("npu"),
        torch.cat([rows[cached:] for rows, cached in zip(ropes, CACHED, strict=True)]).to("npu"),
        cache,
        prefill_metadata(max_tokens, latent_paging(cache)),
        torch.ones(()),
        output,
    )
    weight = impl._decompress.weight.detach().cpu().float()
    expected = []
    for rows, rope, q in zip(latents, ropes, query.split(NEW), strict=True):
        # K and V are rounded, as they are on the device.
        both = (rows.float() @ weight.T).to(DTYPE).unflatten(1, (HEADS, -1))
        keys = torch.cat((both[..., :KEY], rope.expand(-1, HEADS, -1)), -1)
        expected.append(attend(q, keys, both[..., KEY:], causal(len(q), len(rows)), SCALE)[0])
    assert_near(output, torch.cat(expected).flatten(1))


@pytest.mark.parametrize("num_layers", [1, 3])
def test_decode_reads_the_rows_that_were_stored(num_layers: int) -> None:
    impl = attention(num_heads=16)
    cache = empty_cache(num_layers)
    rows = random(37, LATENT + ROPE, dtype=DTYPE, seed=1)
    slots = torch.tensor([TABLE[1][t // BLOCK_SIZE] * BLOCK_SIZE + t % BLOCK_SIZE for t in range(37)])
    latents, ropes = rows[:, :LATENT].to("npu"), rows[:, None, LATENT:].to("npu")
    impl.do_kv_cache_update(latents, ropes, cache, slots.to("npu"), "auto", torch.ones(()))
    query = random(1, 16, LATENT + ROPE, dtype=DTYPE, seed=2)
    table = torch.tensor([TABLE[1]], dtype=torch.int32, device="npu")
    decode = LatentDecodeMetadata(
        block_table=latent_paging(cache).block_table(table), kv_lengths=torch.tensor([37], dtype=torch.int32)
    )
    step = LatentMetadata(
        num_actual_tokens=1, num_decodes=1, num_decode_tokens=1, num_prefills=0, decode=decode, prefill=None
    )
    attended, _ = impl.forward_mqa(query.to("npu"), cache, step, None)  # type: ignore[arg-type]
    keys = rows[:, None]
    assert_near(attended, attend(query, keys, keys[..., :LATENT], everything(1, 37), SCALE)[0])


def prefill_metadata(max_tokens: int, paging: Paging) -> LatentMetadata:
    query_ends = [3, 5, 9]
    backend = LatentPrefill(num_heads=HEADS, scale=SCALE, vllm_config=None, **sizes())  # type: ignore[arg-type]
    table = torch.tensor(TABLE, dtype=torch.int32, device="npu")
    prefill = LatentPrefillMetadata(
        query_ends=query_ends,
        chunks=context_chunks(CACHED, query_ends, paging.block_table(table), BLOCK_SIZE, max_tokens),
        mask=causal_mask(torch.device("npu", 0)),
        backend=backend,
    )
    backend.prepare_metadata(prefill)  # type: ignore[arg-type]
    return LatentMetadata(
        num_actual_tokens=9, num_decodes=0, num_decode_tokens=0, num_prefills=3, decode=None, prefill=prefill
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        pytest.param({"qk_head_dim": 256}, "256 elements of K .* 128 of V", id="heads of other sizes"),
        pytest.param({"sliding_window": 128}, "a sliding window over latents", id="a window"),
        pytest.param({"logits_soft_cap": 30.0}, "logits_soft_cap", id="soft caps"),
    ],
)
def test_what_it_does_not_do_is_refused_by_name(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        attention(**changes)
