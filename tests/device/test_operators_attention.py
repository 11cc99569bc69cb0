# SPDX-License-Identifier: Apache-2.0
"""npu_fused_infer_attention_score (v1 and v2) against the formula: packed tokens over a paged cache, as
vLLM's batches are, and the same without paging."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch_npu
from device.attention_formula import (
    BLOCK_SIZE,
    Paged,
    attend,
    band,
    causal,
    compressed_mask,
    everything,
    paged,
)
from device.operator_support import CACHE_DTYPES, assert_near, random

Visible = Callable[[int, int], torch.Tensor]
"""Makes the mask of a sequence from its numbers of rows and keys."""

Results = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Heads:
    query: int
    kv: int
    size: int
    value_size: int


@dataclass(frozen=True)
class Batch:
    """Sequences one by one, as the formula wants them."""

    queries: list[torch.Tensor]
    keys: list[torch.Tensor]
    values: list[torch.Tensor]

    @property
    def query_ends(self) -> list[int]:
        return list(itertools.accumulate(len(q) for q in self.queries))

    @property
    def kv_lengths(self) -> list[int]:
        return [len(k) for k in self.keys]


def batch(query_lengths: list[int], kv_lengths: list[int], heads: Heads, dtype: torch.dtype) -> Batch:
    return Batch(
        [random(n, heads.query, heads.size, dtype=dtype, seed=3 * b) for b, n in enumerate(query_lengths)],
        [random(n, heads.kv, heads.size, dtype=dtype, seed=3 * b + 1) for b, n in enumerate(kv_lengths)],
        [
            random(n, heads.kv, heads.value_size, dtype=dtype, seed=3 * b + 2)
            for b, n in enumerate(kv_lengths)
        ],
    )


def expected(sequences: Batch, visible: Visible, scale: float, sinks: torch.Tensor | None = None) -> Results:
    """Out [T, N, Dv] and lse [T, N, 1]."""
    results = [
        attend(q, k, v, visible(len(q), len(k)), scale, sinks)
        for q, k, v in zip(sequences.queries, sequences.keys, sequences.values, strict=True)
    ]
    return torch.cat([out for out, _ in results]), torch.cat([lse for _, lse in results]).unsqueeze(-1)


def score(sequences: Batch, cache: Paged, heads: Heads, scale: float, **changes: Any) -> Results:
    """The call that a vLLM batch makes: packed tokens, flat cache, lse."""
    arguments = {
        "block_table": cache.block_table.to("npu"),
        "actual_seq_lengths": sequences.query_ends,
        "actual_seq_lengths_kv": sequences.kv_lengths,
        "num_heads": heads.query,
        "num_key_value_heads": heads.kv,
        "scale": scale,
        "input_layout": "TND",
        "block_size": BLOCK_SIZE,
        "softmax_lse_flag": True,
    }
    return torch_npu.npu_fused_infer_attention_score(
        torch.cat(sequences.queries).to("npu"),
        cache.key.flatten(2).to("npu"),
        cache.value.flatten(2).to("npu"),
        **(arguments | changes),
    )


BATCHES = [
    pytest.param([1, 1, 1], [1, 16, 37], id="decode"),
    pytest.param([5, 17, 32], [5, 17, 32], id="prefill"),
    pytest.param([1, 7, 3, 16], [20, 23, 3, 64], id="decode beside chunks of prefill"),
    pytest.param([2, 0, 1], [4, 5, 33], id="a sequence without query tokens"),
    pytest.param([1, 1, 1, 1, 1], [16, 16, 37, 37, 16], id="decode, some of one length"),
    pytest.param([4, 4, 0, 0, 4, 3], [9, 9, 9, 9, 9, 9], id="chunks of one length"),
]
HEADS = [
    pytest.param(Heads(4, 4, 16, 16), id="a kv head for each head"),
    pytest.param(Heads(8, 2, 64, 64), id="grouped heads"),
    pytest.param(Heads(4, 1, 32, 48), id="one kv head, values of another size"),
]


@pytest.mark.parametrize("dtype", CACHE_DTYPES, ids=str)
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize(("query_lengths", "kv_lengths"), BATCHES)
def test_causal_over_a_paged_cache(
    query_lengths: list[int], kv_lengths: list[int], heads: Heads, dtype: torch.dtype
) -> None:
    sequences = batch(query_lengths, kv_lengths, heads, dtype)
    cache = paged(sequences.keys, sequences.values)
    out, lse = score(sequences, cache, heads, 0.3, sparse_mode=3, atten_mask=compressed_mask())
    expected_out, expected_lse = expected(sequences, causal, 0.3)
    assert (out.dtype, lse.dtype) == (dtype, torch.float32)
    assert_near(out, expected_out)
    assert_near(lse, expected_lse)


@pytest.mark.parametrize(("query_lengths", "kv_lengths"), BATCHES)
def test_every_key_is_seen_in_mode_0(query_lengths: list[int], kv_lengths: list[int]) -> None:
    heads = Heads(4, 2, 32, 32)
    sequences = batch(query_lengths, kv_lengths, heads, torch.bfloat16)
    out, lse = score(sequences, paged(sequences.keys, sequences.values), heads, 0.2)
    expected_out, expected_lse = expected(sequences, everything, 0.2)
    assert_near(out, expected_out)
    assert_near(lse, expected_lse)


@pytest.mark.parametrize(("before", "after"), [(0, 0), (3, 0), (20, 0), (4, 2), (100, 0)])
@pytest.mark.parametrize(("query_lengths", "kv_lengths"), BATCHES)
def test_a_band_is_seen_in_mode_4(
    query_lengths: list[int], kv_lengths: list[int], before: int, after: int
) -> None:
    heads = Heads(4, 2, 32, 32)
    sequences = batch(query_lengths, kv_lengths, heads, torch.float16)
    out, lse = score(
        sequences,
        paged(sequences.keys, sequences.values),
        heads,
        0.2,
        sparse_mode=4,
        pre_tokens=before,
        next_tokens=after,
        atten_mask=compressed_mask(torch.bool),
    )
    expected_out, expected_lse = expected(
        sequences, lambda rows, keys: band(rows, keys, before, after, keys - rows), 0.2
    )
    assert_near(out, expected_out)
    assert_near(lse, expected_lse)


def test_blocks_that_a_window_has_left_are_not_read() -> None:
    """vLLM frees them and leaves the null block in the table; here a block that was never written."""
    heads = Heads(2, 1, 16, 16)
    sequences = batch([2], [50], heads, torch.bfloat16)
    cache = paged(sequences.keys, sequences.values)
    cache.block_table[0, 0] = 0
    out, _ = score(
        sequences,
        cache,
        heads,
        0.2,
        sparse_mode=4,
        pre_tokens=20,
        next_tokens=0,
        atten_mask=compressed_mask(),
    )
    assert_near(out, expected(sequences, lambda r, k: band(r, k, 20, 0, k - r), 0.2)[0])


def test_rows_that_see_no_key_are_zero_and_marked() -> None:
    heads = Heads(2, 2, 16, 16)
    sequences = batch([4, 3, 2], [2, 0, 2], heads, torch.bfloat16)
    out, lse = score(
        sequences,
        paged(sequences.keys, sequences.values),
        heads,
        0.2,
        sparse_mode=3,
        atten_mask=compressed_mask(torch.uint8),
    )
    unseeing = [True, True, False, False, True, True, True, False, False]
    assert out.cpu().eq(0).all(-1).all(-1).tolist() == unseeing
    assert lse.cpu().isposinf().all(-1).all(-1).tolist() == unseeing
    assert_near(out, expected(sequences, causal, 0.2)[0])


def test_known_numbers() -> None:
    """Two keys of equal score share their values in halves; ln(e^0 + e^0) is the lse."""
    query = torch.zeros(1, 1, 16, dtype=torch.float16, device="npu")
    key = torch.ones(1, BLOCK_SIZE, 16, dtype=torch.float16, device="npu")
    value = torch.arange(BLOCK_SIZE, dtype=torch.float16)[None, :, None].expand(1, BLOCK_SIZE, 16)
    out, lse = torch_npu.npu_fused_infer_attention_score(
        query,
        key,
        value.contiguous().to("npu"),
        block_table=torch.zeros(1, 1, dtype=torch.int32, device="npu"),
        actual_seq_lengths=[1],
        actual_seq_lengths_kv=[2],
        input_layout="TND",
        block_size=BLOCK_SIZE,
        softmax_lse_flag=True,
    )
    assert out.cpu().eq(0.5).all()  # values 0 and 1
    assert lse.item() == pytest.approx(0.6931472)


def test_a_prefill_with_more_scores_than_are_held_at_once() -> None:
    heads = Heads(8, 1, 16, 16)
    sequences = batch([1500], [1500], heads, torch.bfloat16)
    out, lse = score(
        sequences,
        paged(sequences.keys, sequences.values),
        heads,
        0.1,
        sparse_mode=3,
        atten_mask=compressed_mask(),
    )
    rows = torch.arange(1500)
    expected_out, expected_lse = expected(sequences, lambda r, k: rows[:, None] >= rows[None, :], 0.1)
    assert_near(out, expected_out)
    assert_near(lse, expected_lse)


@pytest.mark.parametrize("form", ["shifted views of one region", "heads before tokens", "strides"])
def test_forms_of_the_cache(form: str) -> None:
    heads = Heads(4, 2, 32, 32)
    sequences = batch([1, 5], [17, 30], heads, torch.bfloat16)
    cache = paged(sequences.keys, sequences.values)
    table = cache.block_table
    if form == "shifted views of one region":
        region = torch.stack([cache.key, cache.value], 1).flatten(0, 1).flatten(2).to("npu")
        key, value, table = region[:-1], region[1:], table * 2
    elif form == "heads before tokens":
        key, value = (c.transpose(1, 2).contiguous().to("npu") for c in (cache.key, cache.value))
    else:
        both = torch.cat([cache.key.flatten(2), cache.value.flatten(2)], 2).to("npu")
        key, value = both.chunk(2, 2)
    out, _ = torch_npu.npu_fused_infer_attention_score(
        torch.cat(sequences.queries).to("npu"),
        key,
        value,
        block_table=table.to("npu"),
        actual_seq_lengths=sequences.query_ends,
        actual_seq_lengths_kv=sequences.kv_lengths,
        num_heads=4,
        num_key_value_heads=2,
        scale=0.3,
        input_layout="TND",
        block_size=BLOCK_SIZE,
        sparse_mode=3,
        atten_mask=compressed_mask(),
    )
    assert_near(out, expected(sequences, causal, 0.3)[0])


@pytest.mark.parametrize(
    "heads",
    [
        pytest.param(Heads(4, 2, 32, 16), id="grouped heads"),
        pytest.param(Heads(4, 4, 192, 128), id="the heads of latent attention's prefill"),
    ],
)
@pytest.mark.parametrize(("sparse_mode", "visible"), [(0, everything), (3, causal)])
def test_packed_keys_without_a_cache(sparse_mode: int, visible: Visible, heads: Heads) -> None:
    """Lengths of keys are cumulative here, unlike with a block table."""
    sequences = batch([3, 1, 6], [3, 9, 8], heads, torch.bfloat16)
    out, lse = torch_npu.npu_fused_infer_attention_score(
        torch.cat(sequences.queries).to("npu"),
        torch.cat(sequences.keys).to("npu"),
        torch.cat(sequences.values).to("npu"),
        actual_seq_lengths=[3, 4, 10],
        actual_seq_lengths_kv=[3, 12, 20],
        num_heads=heads.query,
        num_key_value_heads=heads.kv,
        scale=0.1,
        input_layout="TND",
        sparse_mode=sparse_mode,
        atten_mask=compressed_mask() if sparse_mode else None,
        softmax_lse_flag=True,
    )
    expected_out, expected_lse = expected(sequences, visible, 0.1)
    assert_near(out, expected_out)
    assert_near(lse, expected_lse)


def test_lse_that_is_not_asked_for_is_empty() -> None:
    heads = Heads(2, 2, 16, 16)
    sequences = batch([1], [1], heads, torch.bfloat16)
    _, lse = score(sequences, paged(sequences.keys, sequences.values), heads, 1.0, softmax_lse_flag=False)
    assert lse.shape == (0,)


def test_given_results_are_filled_and_an_lse_not_asked_for_is_left_alone() -> None:
    heads = Heads(4, 2, 16, 16)
    sequences = batch([2, 1], [5, 20], heads, torch.bfloat16)
    cache = paged(sequences.keys, sequences.values)
    out = torch.zeros(3, 4, 16, dtype=torch.bfloat16, device="npu")
    lse = torch.full((3,), 7.0, dtype=torch.bfloat16, device="npu")
    result = torch_npu.npu_fused_infer_attention_score.out(
        torch.cat(sequences.queries).to("npu"),
        cache.key.flatten(2).to("npu"),
        cache.value.flatten(2).to("npu"),
        block_table=cache.block_table.to("npu"),
        actual_seq_lengths=[2, 3],
        actual_seq_lengths_kv=[5, 20],
        num_heads=4,
        num_key_value_heads=2,
        input_layout="TND",
        block_size=BLOCK_SIZE,
        sparse_mode=3,
        atten_mask=compressed_mask(),
        workspace=torch.empty(16, dtype=torch.uint8, device="npu"),
        out=[out, lse],
    )
    assert result[0].data_ptr() == out.data_ptr()
    assert_near(out, expected(sequences, causal, 1.0)[0])
    assert lse.cpu().eq(7.0).all()


@pytest.mark.parametrize("with_sink", [False, True])
def test_version_2(with_sink: bool) -> None:
    sequences = batch([1, 5], [17, 30], Heads(4, 2, 32, 32), torch.bfloat16)
    cache = paged(sequences.keys, sequences.values)
    sinks = torch.tensor([0.5, -1.0, 3.0, 0.0], dtype=torch.bfloat16) if with_sink else None
    out, lse = torch_npu.npu_fused_infer_attention_score_v2(
        torch.cat(sequences.queries).to("npu"),
        cache.key.flatten(2).to("npu"),
        cache.value.flatten(2).to("npu"),
        block_table=cache.block_table.to("npu"),
        actual_seq_qlen=sequences.query_ends,
        actual_seq_kvlen=sequences.kv_lengths,
        num_query_heads=4,
        num_key_value_heads=2,
        softmax_scale=0.3,
        input_layout="TND",
        block_size=BLOCK_SIZE,
        sparse_mode=3,
        atten_mask=compressed_mask(),
        learnable_sink=sinks.to("npu") if with_sink else None,
        return_softmax_lse=not with_sink,
    )
    expected_out, expected_lse = expected(sequences, causal, 0.3, sinks)
    assert_near(out, expected_out)
    if not with_sink:
        assert_near(lse, expected_lse)


def test_lengths_may_be_tensors() -> None:
    """vLLM's Ascend plugins pass CPU tensors where the schema says list."""
    heads = Heads(2, 2, 16, 16)
    sequences = batch([2, 1], [5, 20], heads, torch.bfloat16)
    out, _ = score(
        sequences,
        paged(sequences.keys, sequences.values),
        heads,
        1.0,
        actual_seq_lengths=torch.tensor([2, 3], dtype=torch.int32),
    )
    assert_near(out, expected(sequences, everything, 1.0)[0])
