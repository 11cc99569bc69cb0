# SPDX-License-Identifier: Apache-2.0
"""What npu_fused_infer_attention_score refuses, one change of an accepted call at a time."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch_npu
from device.operator_support import FLOAT32_ALLOWED, emulator_only

Changes = Callable[[], dict[str, Any]]
T, N, NKV, D, BLOCKS, BLOCK_SIZE = 3, 4, 2, 32, 6, 16


def zeros(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.zeros(*shape, dtype=dtype, device="npu")


def triangle(size: int = 2048, dtype: torch.dtype = torch.int8) -> torch.Tensor:
    return torch.triu(torch.ones(size, size), 1).to(dtype).to("npu")


def packed() -> dict[str, Any]:
    """Two sequences, of 1 and 2 query tokens, over a paged cache."""
    return {
        "query": zeros(T, N, D),
        "key": zeros(BLOCKS, BLOCK_SIZE, NKV * D),
        "value": zeros(BLOCKS, BLOCK_SIZE, NKV * D),
        "block_table": zeros(2, 3, dtype=torch.int32),
        "actual_seq_lengths": [1, 3],
        "actual_seq_lengths_kv": [20, 2],
        "num_heads": N,
        "num_key_value_heads": NKV,
        "input_layout": "TND",
        "block_size": BLOCK_SIZE,
        "sparse_mode": 3,
        "atten_mask": triangle(),
    }


def batched() -> dict[str, Any]:
    """Two sequences of 3 query tokens and 5 keys."""
    return {
        "query": zeros(2, 3, N, D),
        "key": zeros(2, 5, NKV, D),
        "value": zeros(2, 5, NKV, D),
        "num_heads": N,
        "num_key_value_heads": NKV,
        "input_layout": "BSND",
    }


def refuses(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(RuntimeError, match=rf"npu_fused_infer_attention_score: .*{message}"):
        torch_npu.npu_fused_infer_attention_score(**arguments)


@pytest.mark.parametrize("arguments", [packed, batched])
def test_the_unchanged_call_is_accepted(arguments: Changes) -> None:
    torch_npu.npu_fused_infer_attention_score(**arguments())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        pytest.param(
            lambda: {"query": zeros(T, N, D, dtype=torch.int32)},
            "query is int32.*float16 or bfloat16",
            id="integer query",
        ),
        pytest.param(
            lambda: {"query": zeros(T, N, D, dtype=torch.float32)},
            "query is float32.*float16 or bfloat16",
            marks=pytest.mark.skipif(FLOAT32_ALLOWED, reason="float32 is allowed"),
            id="float32",
        ),
        pytest.param(
            lambda: {"query": zeros(T, N, D, dtype=torch.float16)},
            "key is bfloat16.*float16 as query is",
            id="query of another dtype than the cache",
        ),
        pytest.param(lambda: {"num_heads": 3}, "3 query heads and 2 kv heads", id="heads not a multiple"),
        pytest.param(
            lambda: {"query": zeros(T, 258, D), "num_heads": 258},
            "258 query heads.*1 to 256",
            id="too many heads",
        ),
        pytest.param(
            lambda: {"query": zeros(T, 130, D), "num_heads": 130, "num_key_value_heads": 2},
            "65 query heads share.*up to 64",
            id="too large groups",
        ),
        pytest.param(
            lambda: {"num_heads": 8}, r"query is bfloat16\[3, 4, 32\].*8 heads", id="other head count"
        ),
        pytest.param(
            lambda: {"query": zeros(T, N * D)},
            r"query is bfloat16\[3, 128\].*\[tokens, heads, head size\]",
            id="flat query",
        ),
        pytest.param(
            lambda: {
                "query": zeros(T, N, 24),
                "key": zeros(BLOCKS, BLOCK_SIZE, NKV * 24),
                "value": zeros(BLOCKS, BLOCK_SIZE, NKV * 24),
            },
            "head size of query is 24; it has to be a multiple of 16",
            id="head size 24",
        ),
        pytest.param(
            lambda: {"key": zeros(BLOCKS, BLOCK_SIZE, NKV * 16)},
            "head size of query is 32 and that of key 16",
            id="keys of another head size",
        ),
        pytest.param(lambda: {"input_layout": "SBH"}, 'input_layout is "SBH"', id="layout SBH"),
        pytest.param(lambda: {"inner_precise": 4}, "inner_precise is 4", id="unknown precision"),
        pytest.param(
            lambda: {"query_rope": zeros(T, N, 64), "key_rope": zeros(BLOCKS, BLOCK_SIZE, NKV * 64)},
            "the argument (query|key)_rope is not emulated",
            marks=emulator_only,
            id="rope apart",
        ),
        pytest.param(
            lambda: {"antiquant_mode": 1},
            "the argument antiquant_mode is not emulated",
            marks=emulator_only,
            id="quantised cache",
        ),
    ],
)
def test_heads_and_dtypes(changes: Changes, message: str) -> None:
    refuses(packed() | changes(), message)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        pytest.param(
            lambda: {"actual_seq_lengths": None}, "actual_seq_lengths is None", id="no query lengths"
        ),
        pytest.param(
            lambda: {"actual_seq_lengths": [1, 2]},
            "ends with 2 and there are 3 tokens",
            id="not the last token",
        ),
        pytest.param(lambda: {"actual_seq_lengths": [4, 3]}, "holds 3 after 4", id="not cumulative"),
        pytest.param(
            lambda: {"actual_seq_lengths_kv": None}, "actual_seq_lengths_kv is None", id="no key lengths"
        ),
        pytest.param(
            lambda: {"actual_seq_lengths_kv": [20]}, "kv has 1 entries and .* has 2", id="too few key lengths"
        ),
        pytest.param(
            lambda: {"actual_seq_lengths_kv": [20, 49]},
            "length 49; .* between 0 and 48",
            id="longer than the table",
        ),
        pytest.param(lambda: {"actual_seq_lengths_kv": [20, -1]}, "length -1", id="negative length"),
        pytest.param(
            lambda: {"actual_seq_lengths": [1, 2, 3], "actual_seq_lengths_kv": [1, 1, 1]},
            r"block_table is int32\[2, 3\].*for 3 sequences",
            id="too few rows of the block table",
        ),
    ],
)
def test_lengths(changes: Changes, message: str) -> None:
    refuses(packed() | changes(), message)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        pytest.param(
            lambda: {"block_table": zeros(2, 3, dtype=torch.int64)},
            "block_table is int64.*int32",
            id="int64 table",
        ),
        pytest.param(
            lambda: {"block_table": torch.zeros(2, 3, dtype=torch.int32)},
            "block_table is int32.*on cpu.*on the npu",
            id="CPU table",
        ),
        pytest.param(
            lambda: {"block_table": zeros(6, dtype=torch.int32)},
            "block_table is .*2-dimensional",
            id="flat table",
        ),
        pytest.param(
            lambda: {"block_size": 0}, "block_size is 0.*multiple of 16 up to 1024", id="no block size"
        ),
        pytest.param(
            lambda: {
                "block_size": 24,
                "key": zeros(BLOCKS, 24, NKV * D),
                "value": zeros(BLOCKS, 24, NKV * D),
            },
            "block_size is 24.*multiple of 16",
            id="block size 24",
        ),
        pytest.param(
            lambda: {"block_size": 32}, "block_size is 32.*blocks of 16", id="not the cache's block size"
        ),
        pytest.param(
            lambda: {"key": zeros(BLOCKS, BLOCK_SIZE, NKV, D), "value": zeros(BLOCKS, BLOCK_SIZE, NKV, D)},
            r"key is .*read as \[num_blocks, kv heads, block_size, head size\]",
            id="vLLM's own order of a 4-D cache",
        ),
        pytest.param(
            lambda: {"value": zeros(BLOCKS - 1, BLOCK_SIZE, NKV * D)},
            "same number of blocks",
            id="unequal caches",
        ),
        pytest.param(
            lambda: {"block_table": torch.tensor([[0, 6, 0], [0, 0, 0]], dtype=torch.int32).to("npu")},
            "block 6 in column 1; the cache has blocks 0 to 5",
            marks=emulator_only,
            id="block past the end",
        ),
    ],
)
def test_paging(changes: Changes, message: str) -> None:
    refuses(packed() | changes(), message)


def test_a_prefill_that_is_not_packed_needs_large_blocks() -> None:
    arguments = packed() | {
        "query": zeros(2, 3, N * D),
        "input_layout": "BSH",
        "actual_seq_lengths": None,
    }
    refuses(arguments, "block_size is 16.*multiple of 128 up to 512")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        pytest.param(lambda: {"atten_mask": None}, "atten_mask is None; sparse_mode 3 needs", id="no mask"),
        pytest.param(
            lambda: {"atten_mask": triangle(dtype=torch.bfloat16)},
            "atten_mask is bfloat16.*bool or int8 or uint8",
            id="additive mask",
        ),
        pytest.param(
            lambda: {"atten_mask": triangle(1024)}, r"atten_mask is int8\[1024, 1024\].*2048", id="small mask"
        ),
        pytest.param(
            lambda: {"atten_mask": triangle().cpu()}, "atten_mask is .*on cpu.*on the npu", id="CPU mask"
        ),
        pytest.param(
            lambda: {"atten_mask": triangle().T.contiguous()},
            r"atten_mask is not triu\(ones",
            marks=emulator_only,
            id="mask of what is visible",
        ),
        pytest.param(lambda: {"sparse_mode": 2}, "sparse_mode is 2.*0, 3 or 4", id="mode 2"),
        pytest.param(lambda: {"sparse_mode": 9}, "sparse_mode is 9", id="mode 9"),
        pytest.param(lambda: {"sparse_mode": 0}, "takes no mask in this mode", id="mode 0 with a mask"),
    ],
)
def test_masks_of_packed_tokens(changes: Changes, message: str) -> None:
    refuses(packed() | changes(), message)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        pytest.param(lambda: {"sparse_mode": 1}, "sparse_mode 1 needs the mask", id="mode 1 without a mask"),
        pytest.param(
            lambda: {"atten_mask": zeros(3, 4, dtype=torch.bool)},
            r"atten_mask is bool\[3, 4\]",
            id="too few keys",
        ),
        pytest.param(
            lambda: {"atten_mask": zeros(2, 3, 5, dtype=torch.bool)},
            r"\[1, queries, keys\]",
            id="a batch of masks without the dimension for heads",
        ),
        pytest.param(
            lambda: {"value": zeros(2, 4, NKV, D)},
            "tokens and heads of key and value",
            id="unequal keys and values",
        ),
        pytest.param(
            lambda: {"actual_seq_lengths_kv": [1, 2, 3], "query": zeros(4, 3, N, D)},
            "sequences, tokens and heads",
            id="keys of fewer sequences",
        ),
        pytest.param(lambda: {"actual_seq_lengths": [1, 4]}, "length 4; .* between 0 and 3", id="too long"),
    ],
)
def test_batched(changes: Changes, message: str) -> None:
    refuses(batched() | changes(), message)


@pytest.mark.parametrize(
    ("sink", "message"),
    [
        pytest.param(lambda: zeros(N - 1), "learnable_sink is bfloat16.*shape .4.", id="of other heads"),
        pytest.param(
            lambda: zeros(N, dtype=torch.float32),
            "learnable_sink is float32.*bfloat16",
            id="of another dtype",
        ),
    ],
)
def test_sinks(sink: Callable[[], torch.Tensor], message: str) -> None:
    renamed = {
        "actual_seq_lengths": "actual_seq_qlen",
        "actual_seq_lengths_kv": "actual_seq_kvlen",
        "num_heads": "num_query_heads",
    }
    arguments = {renamed.get(name, name): value for name, value in packed().items()}
    with pytest.raises(RuntimeError, match=f"npu_fused_infer_attention_score_v2: .*{message}"):
        torch_npu.npu_fused_infer_attention_score_v2(**arguments, learnable_sink=sink())


def test_given_results_of_another_shape() -> None:
    arguments = packed() | {"out": [zeros(T, N, 16), zeros(1)]}
    with pytest.raises(RuntimeError, match=r"out\[0\] is bfloat16\[3, 4, 16\].*shape \[3, 4, 32\]"):
        torch_npu.npu_fused_infer_attention_score.out(**arguments)
