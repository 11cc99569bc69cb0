# SPDX-License-Identifier: Apache-2.0
"""npu_fused_infer_attention_score with a batch dimension: layouts, full masks, and one query token."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch_npu
from device.attention_formula import BLOCK_SIZE, attend, band, causal, compressed_mask, everything, paged
from device.operator_support import assert_near, random

B, N, NKV, D, SCALE = 3, 4, 2, 32, 0.3
DTYPE = torch.bfloat16


def to_layout(tensor: torch.Tensor, layout: str) -> torch.Tensor:
    """[B, S, N, D] in the order of `layout`, on the NPU."""
    ordered = {"BSH": tensor.flatten(2), "BSND": tensor, "BNSD": tensor.transpose(1, 2)}[layout]
    return ordered.contiguous().to("npu")


def inputs(rows: int, keys: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Query, key and value as [B, S, N, D] on the CPU."""
    return (
        random(B, rows, N, D, dtype=DTYPE),
        random(B, keys, NKV, D, dtype=DTYPE, seed=1),
        random(B, keys, NKV, D, dtype=DTYPE, seed=2),
    )


def expected(
    query: torch.Tensor,
    keys: Sequence[torch.Tensor],
    values: Sequence[torch.Tensor],
    visible: Sequence[torch.Tensor],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Out [B, S, N, D] and lse [B, N, S, 1]; `visible` has a mask for each sequence."""
    results = [
        attend(q, k, v, seen, SCALE) for q, k, v, seen in zip(query, keys, values, visible, strict=True)
    ]
    return torch.stack([out for out, _ in results]), torch.stack([lse.T.unsqueeze(-1) for _, lse in results])


def score(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, layout: str, **options: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    return torch_npu.npu_fused_infer_attention_score(
        query,
        key,
        value,
        num_heads=N,
        num_key_value_heads=NKV,
        scale=SCALE,
        input_layout=layout,
        softmax_lse_flag=True,
        **options,
    )


@pytest.mark.parametrize(
    ("layout", "given", "returned"),
    [
        ("BSH", "BSH", "BSH"),
        ("BSND", "BSND", "BSND"),
        ("BNSD", "BNSD", "BNSD"),
        ("BNSD_BSND", "BNSD", "BSND"),
    ],
)
@pytest.mark.parametrize(
    ("sparse_mode", "visible"),
    [
        pytest.param(0, everything, id="mode 0, everything"),
        pytest.param(2, lambda r, k: band(r, k, r + k, 0, 0), id="mode 2, causal from the top left"),
        pytest.param(3, causal, id="mode 3, causal from the bottom right"),
    ],
)
def test_layouts(
    layout: str, given: str, returned: str, sparse_mode: int, visible: Callable[[int, int], torch.Tensor]
) -> None:
    query, keys, values = inputs(5, 7)
    out, lse = score(
        *(to_layout(t, given) for t in (query, keys, values)),
        layout,
        sparse_mode=sparse_mode,
        atten_mask=compressed_mask() if sparse_mode else None,
    )
    expected_out, expected_lse = expected(query, keys, values, [visible(5, 7)] * B)
    assert lse.shape == (B, N, 5, 1)
    assert_near(out, to_layout(expected_out, returned).cpu())
    assert_near(lse, expected_lse)


@pytest.mark.parametrize("form", ["[S1, S2]", "[1, S1, S2]", "[1, 1, S1, S2]", "[B, 1, S1, S2]"])
@pytest.mark.parametrize("sparse_mode", [0, 1])
def test_full_masks_hide_where_they_are_set(form: str, sparse_mode: int) -> None:
    query, keys, values = inputs(5, 7)
    masks = torch.rand(B, 5, 7, generator=torch.Generator().manual_seed(5)) < 0.4
    mask = {
        "[S1, S2]": masks[0],
        "[1, S1, S2]": masks[:1],
        "[1, 1, S1, S2]": masks[:1, None],
        "[B, 1, S1, S2]": masks[:, None],
    }[form]
    rows = (to_layout(t, "BSND") for t in (query, keys, values))
    out, _ = score(*rows, "BSND", sparse_mode=sparse_mode, atten_mask=mask.to("npu"))
    visible = [~masks[b if form.startswith("[B") else 0] for b in range(B)]
    assert_near(out, expected(query, keys, values, visible)[0])


def test_lengths_cut_keys_for_each_sequence() -> None:
    query, keys, values = inputs(2, 9)
    rows = (to_layout(t, "BNSD") for t in (query, keys, values))
    out, _ = score(*rows, "BNSD", actual_seq_lengths_kv=[9, 1, 4])
    visible = [torch.arange(9).expand(2, 9) < n for n in (9, 1, 4)]
    assert_near(out, to_layout(expected(query, keys, values, visible)[0], "BNSD").cpu())


def test_one_length_stands_for_all_sequences() -> None:
    query, keys, values = inputs(2, 9)
    rows = (to_layout(t, "BSND") for t in (query, keys, values))
    out, _ = score(*rows, "BSND", actual_seq_lengths_kv=[3])
    visible = [torch.arange(9).expand(2, 9) < 3] * B
    assert_near(out, expected(query, keys, values, visible)[0])


@pytest.mark.parametrize("window", [None, 1, 8, 40])
def test_decode_over_a_paged_cache_with_a_window(window: int | None) -> None:
    """Layout BSH, one query token: pre_tokens keeps the last keys, with no mask and no sparse_mode."""
    lengths = [33, 5, 16]
    query = random(B, 1, N, D, dtype=DTYPE)
    keys = [random(n, NKV, D, dtype=DTYPE, seed=10 + n) for n in lengths]
    values = [random(n, NKV, D, dtype=DTYPE, seed=20 + n) for n in lengths]
    cache = paged(keys, values)
    out, lse = score(
        query.flatten(2).to("npu"),
        cache.key.flatten(2).to("npu"),
        cache.value.flatten(2).to("npu"),
        "BSH",
        block_table=cache.block_table.to("npu"),
        actual_seq_lengths_kv=lengths,
        block_size=BLOCK_SIZE,
        **({} if window is None else {"pre_tokens": window}),
    )
    visible = [torch.arange(n)[None] >= n - (window or n) for n in lengths]
    expected_out, expected_lse = expected(query, keys, values, visible)
    assert_near(out, expected_out.flatten(2))
    assert_near(lse, expected_lse)


def test_one_query_token_ignores_the_sparse_mode() -> None:
    query, keys, values = inputs(1, 7)
    rows = (to_layout(t, "BSND") for t in (query, keys, values))
    out, _ = score(*rows, "BSND", sparse_mode=4, pre_tokens=2, next_tokens=0, atten_mask=compressed_mask())
    assert_near(out, expected(query, keys, values, [everything(1, 7)] * B)[0])


def test_one_query_token_takes_a_mask_of_batch_and_keys() -> None:
    query, keys, values = inputs(1, 7)
    mask = torch.rand(B, 7, generator=torch.Generator().manual_seed(5)) < 0.4
    rows = (to_layout(t, "BSND") for t in (query, keys, values))
    out, _ = score(*rows, "BSND", atten_mask=mask.to("npu"))
    assert_near(out, expected(query, keys, values, [~row[None] for row in mask])[0])
