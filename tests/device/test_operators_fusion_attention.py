# SPDX-License-Identifier: Apache-2.0
"""npu_fusion_attention over packed tokens against the formula, and what it refuses."""

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch_npu
from device.attention_formula import attend, band, everything
from device.operator_support import HALVES, assert_near, emulator_only, random

Changes = Callable[[], dict[str, Any]]
Results = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, int, int, int]
DTYPES = [*HALVES, torch.float32]
"""A card takes float32 here."""
N, NKV, D = 4, 2, 24


def triangle(size: int = 2048, dtype: torch.dtype = torch.bool) -> torch.Tensor:
    return torch.triu(torch.ones(size, size), 1).to(dtype).to("npu")


def ends(lengths: list[int]) -> list[int]:
    return list(itertools.accumulate(lengths))


def tensors(
    query_lengths: list[int], kv_lengths: list[int], dtype: torch.dtype, size: int = D, value_size: int = D
) -> list[torch.Tensor]:
    """Query [T, N, size], key [T', NKV, size] and value [T', NKV, value_size], on the CPU."""
    rows, keys = sum(query_lengths), sum(kv_lengths)
    return [
        random(rows, N, size, dtype=dtype, seed=1),
        random(keys, NKV, size, dtype=dtype, seed=2),
        random(keys, NKV, value_size, dtype=dtype, seed=3),
    ]


def score(
    packed: list[torch.Tensor], query_lengths: list[int], kv_lengths: list[int], **changes: Any
) -> Results:
    arguments = {
        "head_num": N,
        "input_layout": "TND",
        "scale": 0.3,
        "actual_seq_qlen": ends(query_lengths),
        "actual_seq_kvlen": ends(kv_lengths),
    }
    return torch_npu.npu_fusion_attention(*(each.to("npu") for each in packed), **(arguments | changes))


def expected(
    packed: list[torch.Tensor],
    query_lengths: list[int],
    kv_lengths: list[int],
    visible: Callable[[int, int], torch.Tensor] = everything,
) -> torch.Tensor:
    query, key, value = packed
    sequences = zip(query.split(query_lengths), key.split(kv_lengths), value.split(kv_lengths), strict=True)
    return torch.cat([attend(q, k, v, visible(len(q), len(k)), 0.3)[0] for q, k, v in sequences])


BATCHES = [
    pytest.param([7], [7], id="one sequence"),
    pytest.param([5, 1, 33], [5, 1, 33], id="several lengths"),
    pytest.param([2, 0, 4], [9, 0, 3], id="other keys than rows, and an empty sequence"),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("size", "value_size"),
    [pytest.param(24, 24, id="24"), pytest.param(64, 64, id="64"), pytest.param(33, 20, id="33 and 20")],
)
@pytest.mark.parametrize(("query_lengths", "kv_lengths"), BATCHES)
def test_every_row_sees_every_key_of_its_sequence(
    query_lengths: list[int], kv_lengths: list[int], size: int, value_size: int, dtype: torch.dtype
) -> None:
    packed = tensors(query_lengths, kv_lengths, dtype, size, value_size)
    results = score(packed, query_lengths, kv_lengths)
    assert results[0].dtype == dtype
    assert_near(results[0], expected(packed, query_lengths, kv_lengths))


@pytest.mark.parametrize(
    ("mode", "before", "after"),
    [
        pytest.param(3, None, 0, id="up to its own"),
        pytest.param(4, 2, 2, id="two to either side"),
        pytest.param(4, 0, 0, id="its own"),
        pytest.param(4, 40, 3, id="all before, three behind"),
    ],
)
@pytest.mark.parametrize("mask_dtype", [torch.bool, torch.uint8], ids=str)
def test_bands(mode: int, before: int | None, after: int, mask_dtype: torch.dtype) -> None:
    lengths = [5, 1, 33]
    packed = tensors(lengths, lengths, torch.float32)
    reach = {} if before is None else {"pre_tockens": before, "next_tockens": after}
    out = score(packed, lengths, lengths, sparse_mode=mode, atten_mask=triangle(dtype=mask_dtype), **reach)[0]
    near = expected(
        packed,
        lengths,
        lengths,
        lambda rows, keys: band(rows, keys, before or keys * (before is None), after, 0),
    )
    assert_near(out, near)


def test_reach_means_nothing_without_a_mask() -> None:
    packed = tensors([9], [9], torch.float32)
    out = score(packed, [9], [9], pre_tockens=1, next_tockens=1)[0]
    assert_near(out, expected(packed, [9], [9]))


def test_what_training_takes() -> None:
    """Shapes are a card's; the maximum and the sum of rows are not computed, and show it."""
    packed = tensors([2, 3], [4, 1], torch.bfloat16)
    _, maximum, total, softmax, seed, offset, scores = score(packed, [2, 3], [4, 1])
    assert maximum.shape == total.shape == (5, N, 8)
    assert maximum.dtype == total.dtype == torch.float32
    assert softmax.shape == (0,)
    assert (seed, offset, scores) == (0, 0, N * (2 * 4 + 3 * 1))


@emulator_only
def test_statistics_that_are_not_computed_are_nan() -> None:
    _, maximum, total, *_ = score(tensors([2], [2], torch.bfloat16), [2], [2])
    assert maximum.isnan().all()
    assert total.isnan().all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        pytest.param(lambda: {"head_num": 3}, "head_num is 3", id="other number of heads"),
        pytest.param(
            lambda: {"key": torch.zeros(5, 3, D), "value": torch.zeros(5, 3, D)},
            "query has 4 heads and key has 3",
            id="heads that do not share evenly",
        ),
        pytest.param(
            lambda: {"key": torch.zeros(5, NKV, D + 1)},
            "of query is 24 and that of key 25",
            id="head size of keys",
        ),
        pytest.param(
            lambda: {"value": torch.zeros(5, NKV, D + 1)}, "cannot be larger than", id="large values"
        ),
        pytest.param(
            lambda: {"value": torch.zeros(4, NKV, D)}, "tokens and heads have to agree", id="fewer values"
        ),
        pytest.param(
            lambda: {name: torch.zeros(5, 4, 784) for name in ("query", "key", "value")},
            "1 to 768",
            id="a head of 784 elements",
        ),
        pytest.param(lambda: {"query": torch.zeros(5, N * D)}, "3-dimensional", id="heads not apart"),
        pytest.param(
            lambda: {"query": torch.zeros(5, N, D, dtype=torch.int32)}, "query is int32", id="integers"
        ),
        pytest.param(
            lambda: {"key": torch.zeros(5, NKV, D, dtype=torch.float16)}, "key is float16", id="two dtypes"
        ),
        pytest.param(lambda: {"actual_seq_qlen": None}, "actual_seq_qlen is None", id="no lengths"),
        pytest.param(lambda: {"actual_seq_qlen": [3, 2, 5]}, "cannot fall", id="falling lengths"),
        pytest.param(lambda: {"actual_seq_kvlen": [2, 4]}, "ends with 4", id="lengths that leave a key out"),
        pytest.param(lambda: {"actual_seq_kvlen": [5]}, "one for each sequence", id="too few lengths"),
        pytest.param(
            lambda: {"actual_seq_qlen": [0] * 1024 + [5], "actual_seq_kvlen": [0] * 1024 + [5]},
            "up to 1024 sequences",
            id="1025 sequences",
        ),
        pytest.param(lambda: {"sparse_mode": 5}, "sparse_mode is 5", id="mode 5"),
        pytest.param(lambda: {"sparse_mode": 4}, "atten_mask is None", id="a band without a mask"),
        pytest.param(lambda: {"sparse_mode": 4, "atten_mask": triangle(64)}, "needs triu", id="a small mask"),
        pytest.param(
            lambda: {"sparse_mode": 4, "atten_mask": triangle(dtype=torch.int8)},
            "atten_mask is int8",
            id="a mask of int8",
        ),
        pytest.param(
            lambda: {"sparse_mode": 4, "atten_mask": ~triangle()}, "is not triu", id="a mask turned around"
        ),
        pytest.param(lambda: {"input_layout": "XYZ"}, "has to be TND", id="an unknown layout"),
        pytest.param(lambda: {"keep_prob": 0.0}, "keep_prob is 0", id="everything dropped out"),
        pytest.param(lambda: {"softmax_layout": "NTD"}, "softmax_layout is", id="an unknown softmax layout"),
    ],
)
def test_refusals(changes: Changes, message: str) -> None:
    with pytest.raises(RuntimeError, match=rf"npu_fusion_attention: .*{message}"):
        torch_npu.npu_fusion_attention(**_small() | _on_npu(changes()))


@emulator_only
@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"keep_prob": 0.5}, id="dropout"),
        pytest.param({"input_layout": "BSND"}, id="other layouts"),
        pytest.param({"actual_seq_qlen": [2, 5, 0], "actual_seq_kvlen": [2, 5, 0]}, id="sequences left out"),
        pytest.param({"prefix": [1]}, id="prefixes"),
    ],
)
def test_what_the_emulator_lacks_is_refused_by_name(changes: dict[str, Any]) -> None:
    with pytest.raises(NotImplementedError, match="npu_fusion_attention"):
        torch_npu.npu_fusion_attention(**_small() | changes)


def test_the_call_that_is_changed_is_taken() -> None:
    assert torch_npu.npu_fusion_attention(**_small())[0].shape == (5, N, D)


def _small() -> dict[str, Any]:
    """Two sequences, of two and three tokens."""
    return _on_npu(
        {
            "query": torch.zeros(5, N, D),
            "key": torch.zeros(5, NKV, D),
            "value": torch.zeros(5, NKV, D),
            "head_num": N,
            "input_layout": "TND",
            "actual_seq_qlen": [2, 5],
            "actual_seq_kvlen": [2, 5],
        }
    )


def _on_npu(arguments: dict[str, Any]) -> dict[str, Any]:
    return {
        name: value.to("npu") if isinstance(value, torch.Tensor) else value
        for name, value in arguments.items()
    }
