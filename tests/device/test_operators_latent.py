# SPDX-License-Identifier: Apache-2.0
"""What latent attention runs on: _npu_paged_attention_mla and npu_attention_update, against formulas."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch_npu
from device.attention_formula import Paged, attend, everything, paged
from device.operator_support import (
    CACHE_DTYPES,
    FLOAT32_ALLOWED,
    HALVES,
    assert_near,
    emulator_only,
    int32,
    random,
)

Changes = Callable[[], dict[str, Any]]
SCALE = 0.1


def decode(query: torch.Tensor, cache: Paged, lengths: list[int], value_size: int) -> torch.Tensor:
    out = torch.full((*query.shape[:2], value_size), torch.nan, dtype=query.dtype, device="npu")
    torch_npu._npu_paged_attention_mla(
        query.to("npu"),
        cache.key.to("npu"),
        num_kv_heads=1,
        num_heads=query.shape[1],
        scale_value=SCALE,
        block_table=cache.block_table.to("npu"),
        context_lens=torch.tensor(lengths, dtype=torch.int32),
        mla_vheadsize=value_size,
        out=out,
    )
    return out


@pytest.mark.parametrize("dtype", CACHE_DTYPES, ids=str)
@pytest.mark.parametrize(
    ("lengths", "heads", "row_size", "value_size"),
    [
        pytest.param([1, 16, 17, 50], 16, 576, 512, id="DeepSeek's sizes"),
        pytest.param([40], 1, 576, 576, id="one head, all of the row is value"),
        pytest.param([33, 2], 3, 64, 16, id="other sizes"),
    ],
)
def test_decode_over_joint_rows(
    lengths: list[int], heads: int, row_size: int, value_size: int, dtype: torch.dtype
) -> None:
    query = random(len(lengths), heads, row_size, dtype=dtype, seed=99)
    rows = [random(n, 1, row_size, dtype=dtype, seed=b) for b, n in enumerate(lengths)]
    expected = torch.cat(
        [
            attend(q[None], k, k[..., :value_size], everything(1, len(k)), SCALE)[0]
            for q, k in zip(query, rows, strict=True)
        ]
    )
    assert_near(decode(query, paged(rows, rows), lengths, value_size), expected)


def test_several_rows_of_one_sequence_are_sequences_that_share_blocks() -> None:
    rows = random(20, 1, 576, dtype=torch.bfloat16)
    cache = paged([rows], [rows])
    query = random(2, 4, 576, dtype=torch.bfloat16, seed=1)
    twice = Paged(cache.key, cache.value, cache.block_table.repeat(2, 1))
    expected = torch.cat(
        [
            attend(query[i : i + 1], rows[:n], rows[:n, :, :512], everything(1, n), SCALE)[0]
            for i, n in enumerate((19, 20))
        ]
    )
    assert_near(decode(query, twice, [19, 20], 512), expected)


def zeros(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.zeros(*shape, dtype=dtype, device="npu")


def decode_call() -> dict[str, Any]:
    return {
        "query": zeros(2, 4, 576),
        "key_cache": zeros(6, 128, 1, 576),
        "num_kv_heads": 1,
        "num_heads": 4,
        "scale_value": 1.0,
        "block_table": int32([[1, 2], [3, 0]]),
        "context_lens": torch.tensor([130, 3], dtype=torch.int32),
        "mla_vheadsize": 512,
        "out": zeros(2, 4, 512),
    }


def test_the_unchanged_decode_is_accepted() -> None:
    torch_npu._npu_paged_attention_mla(**decode_call())


@emulator_only
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        pytest.param(
            lambda: {"context_lens": int32([130, 3])}, r"int32\[2\] on cpu", id="lengths on the device"
        ),
        pytest.param(
            lambda: {"context_lens": torch.tensor([130, 3])}, r"int32\[2\] on cpu", id="lengths of 64 bits"
        ),
        pytest.param(
            lambda: {"context_lens": torch.tensor([5], dtype=torch.int32)},
            "one length for each",
            id="a length",
        ),
        pytest.param(
            lambda: {"context_lens": torch.tensor([0, 3], dtype=torch.int32)}, "1 or more", id="no key"
        ),
        pytest.param(
            lambda: {"context_lens": torch.tensor([257, 3], dtype=torch.int32)}, "2 columns", id="short table"
        ),
        pytest.param(lambda: {"block_table": int32([[1, 6], [3, 0]])}, "blocks 0 to 5", id="no such block"),
        pytest.param(lambda: {"block_table": zeros(2, 2, dtype=torch.int64)}, "int32", id="a table of int64"),
        pytest.param(lambda: {"block_table": int32([[1, 2]])}, "one row for each", id="a row is missing"),
        pytest.param(lambda: {"num_kv_heads": 2}, "there has to be 1", id="two latents"),
        pytest.param(
            lambda: {"key_cache": zeros(6, 256, 1, 576)}, "up to 128", id="large blocks of wide rows"
        ),
        pytest.param(lambda: {"key_cache": zeros(6, 24, 1, 576)}, "multiple of 16", id="odd blocks"),
        pytest.param(lambda: {"key_cache": zeros(6, 128, 1, 592)}, "up to 576", id="too wide"),
        pytest.param(lambda: {"key_cache": zeros(6, 128, 576)}, "4-dimensional", id="flat cache"),
        pytest.param(lambda: {"mla_vheadsize": 592}, "up to the 576", id="values wider than rows"),
        pytest.param(
            lambda: {"num_heads": 8}, r"it has to be \[2, 8, 576\]", id="other heads than the query's"
        ),
        pytest.param(
            lambda: {"out": zeros(2, 4, 576)}, r"it has to be \[2, 4, 512\]", id="result of rows' size"
        ),
        pytest.param(
            lambda: {"out": zeros(4, 2, 512).transpose(0, 1)},
            "contiguous",
            id="a result that is not contiguous",
        ),
        pytest.param(
            lambda: {"key_cache": zeros(6, 128, 1, 576, dtype=torch.float16)},
            "bfloat16 as query",
            id="two types",
        ),
    ],
)
def test_decode_refuses(changes: Changes, message: str) -> None:
    with pytest.raises(RuntimeError, match=rf"_npu_paged_attention_mla: .*{message}"):
        torch_npu._npu_paged_attention_mla(**decode_call() | changes())


@pytest.mark.skipif(FLOAT32_ALLOWED, reason="it is taken here")
def test_decode_refuses_float32() -> None:
    call = decode_call()
    for name in ("query", "key_cache", "out"):
        call[name] = call[name].float()
    with pytest.raises(RuntimeError, match="query is float32"):
        torch_npu._npu_paged_attention_mla(**call)


@pytest.mark.parametrize("dtype", [*HALVES, torch.float32], ids=str)
@pytest.mark.parametrize("cuts", [(5, 9, 20), (20,), (1, 2, 3, 4, 20)])
def test_merging_attention_over_pieces_is_attention_over_all(
    cuts: tuple[int, ...], dtype: torch.dtype
) -> None:
    query, keys, values = (random(n, 4, 64, dtype=torch.float32, seed=i) for i, n in enumerate((3, 20, 20)))
    expected, _ = attend(query, keys, values, everything(3, 20), SCALE)
    pieces = [
        attend(query, keys[begin:end], values[begin:end], everything(3, end - begin), SCALE)
        for begin, end in zip((0, *cuts), cuts, strict=False)
    ]
    merged, nothing = torch_npu.npu_attention_update(
        [lse.flatten().to("npu") for _, lse in pieces],
        [out.flatten(0, 1).to(dtype).to("npu") for out, _ in pieces],
        0,
    )
    assert nothing is None or nothing.numel() == 0
    assert_near(merged.view(3, 4, 64), expected)


def test_a_piece_that_saw_no_key_changes_nothing() -> None:
    rows, lse = random(2, 16, dtype=torch.float32), torch.tensor([1.0, 2.0])
    unseeing = torch.full((2,), torch.inf)
    merged, _ = torch_npu.npu_attention_update(
        [unseeing.to("npu"), lse.to("npu")], [torch.zeros(2, 16).to("npu"), rows.to("npu")], 0
    )
    torch.testing.assert_close(merged.cpu(), rows)


def merge_call() -> dict[str, Any]:
    return {
        "lse": [zeros(6, dtype=torch.float32)] * 2,
        "local_out": [zeros(6, 128)] * 2,
        "update_type": 0,
    }


@emulator_only
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        pytest.param(lambda: {"update_type": 1}, "it has to be 0", id="the merged lse"),
        pytest.param(lambda: {"lse": [zeros(6, dtype=torch.float32)]}, "the same number", id="one lse"),
        pytest.param(
            lambda: {"lse": [zeros(6, dtype=torch.float32)] * 17, "local_out": [zeros(6, 128)] * 17},
            "1 to 16",
            id="too many pieces",
        ),
        pytest.param(lambda: {"lse": [zeros(6)] * 2}, "float32", id="rounded sums"),
        pytest.param(lambda: {"lse": [zeros(6, 1, dtype=torch.float32)] * 2}, r"\[rows\]", id="two axes"),
        pytest.param(lambda: {"local_out": [zeros(6, 2, 64)] * 2}, "2-dimensional", id="heads apart"),
        pytest.param(lambda: {"local_out": [zeros(6, 12)] * 2}, "multiple of 8", id="odd rows"),
        pytest.param(lambda: {"local_out": [zeros(6, 520)] * 2}, "up to 512", id="wide rows"),
        pytest.param(
            lambda: {"local_out": [zeros(128, 6).t()] * 2}, "contiguous", id="rows that are not contiguous"
        ),
    ],
)
def test_merging_refuses(changes: Changes, message: str) -> None:
    with pytest.raises(RuntimeError, match=rf"npu_attention_update: .*{message}"):
        torch_npu.npu_attention_update(**merge_call() | changes())
