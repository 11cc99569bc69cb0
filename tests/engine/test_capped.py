# SPDX-License-Identifier: Apache-2.0
"""Attention with capped scores over pages, against a loop over rows, heads and keys."""

from __future__ import annotations

import math

import pytest
import torch

from vllm_ascend.attention.cache_layout import split_pages
from vllm_ascend.attention.capped import CappedAttention
from vllm_ascend.attention.metadata import GroupedAttentionMetadata
from vllm_ascend.attention.paging import Paging

HEADS, KV_HEADS, SIZE, BLOCK = 4, 2, 16, 16
BLOCKS_OF = [[3], [5, 0, 2]]
"""Two requests: one computes its five tokens, the other the last two of 37."""
ROWS, KEYS = [5, 2], [5, 37]
SCALE, CAP = 0.5, 3.0


def expected(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, window: int | None
) -> torch.Tensor:
    """query: [rows, heads, size]; keys, values: [keys, kv heads, size]; the last row sees all keys."""
    result = torch.zeros_like(query, dtype=torch.float64)
    for row in range(len(query)):
        own = len(keys) - len(query) + row
        seen = range(0 if window is None else max(0, own - window + 1), own + 1)
        for head in range(HEADS):
            kv = head // (HEADS // KV_HEADS)
            scores = [(query[row, head].double() @ keys[key, kv].double()).item() * SCALE for key in seen]
            weights = [math.exp(CAP * math.tanh(score / CAP)) for score in scores]
            for key, weight in zip(seen, weights, strict=True):
                result[row, head] += weight / sum(weights) * values[key, kv].double()
    return result.float()


@pytest.mark.parametrize(
    "window", [pytest.param(None, id="all keys"), pytest.param(9, id="a window of nine")]
)
def test_capped_attention(window: int | None) -> None:
    draw = torch.Generator().manual_seed(6)
    key_pages, value_pages = torch.randn(2, 6, BLOCK, KV_HEADS, SIZE, generator=draw)
    # What a window has left behind is another request's: here, nothing that could be read unnoticed.
    if window is not None:
        key_pages[5] = value_pages[5] = math.nan
    query = torch.randn(sum(ROWS), HEADS, SIZE, generator=draw)
    pages = torch.stack([key_pages, value_pages], 1).to("npu")
    key_cache, value_cache = split_pages(pages.view(6, KV_HEADS, BLOCK, 2 * SIZE))
    metadata = GroupedAttentionMetadata(
        num_tokens=sum(ROWS),
        query_ends=[5, 7],
        kv_lengths=KEYS,
        block_table=torch.tensor([[6, 0, 0], [10, 0, 4]], dtype=torch.int32, device="npu"),
        slots=torch.zeros(0, dtype=torch.int32, device="npu"),
        paging=Paging(BLOCK),
        mask=torch.zeros(0, dtype=torch.int8, device="npu"),
    )
    result = CappedAttention(SCALE, CAP, window).attend(query.to("npu"), key_cache, value_cache, metadata)
    for rows, blocks, num_keys in zip(query.split(ROWS), BLOCKS_OF, KEYS, strict=True):
        keys, values = (pages[blocks].flatten(0, 1)[:num_keys] for pages in (key_pages, value_pages))
        actual, result = result[: len(rows)], result[len(rows) :]
        torch.testing.assert_close(actual.cpu(), expected(rows, keys, values, window), rtol=1e-4, atol=1e-5)
