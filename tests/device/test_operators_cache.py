# SPDX-License-Identifier: Apache-2.0
"""Tokens into a paged cache and out of it: _npu_reshape_and_cache(_siso) and npu_paged_cache_load."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch_npu
from device.operator_support import CACHE_DTYPES, emulator_only, int32, random
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

Changes = Callable[[], dict[str, Any]]
BLOCK_SIZE, HEADS, SIZE = 16, 2, 16


def caches(num_blocks: int, dtype: torch.dtype, value_size: int = SIZE) -> tuple[torch.Tensor, torch.Tensor]:
    """Key and value cache on the CPU, every element of its own value as far as the dtype can tell."""
    key = random(num_blocks, BLOCK_SIZE, HEADS, SIZE, dtype=torch.float32, seed=3)
    value = random(num_blocks, BLOCK_SIZE, HEADS, value_size, dtype=torch.float32, seed=4)
    if dtype == torch.int8:
        return (key * 40).to(dtype), (value * 40).to(dtype)
    return key.to(dtype), value.to(dtype)


def load_by_hand(
    cache: torch.Tensor, table: list[list[int]], lengths: list[int], first_columns: list[int]
) -> torch.Tensor:
    """The rows of each sequence, token by token."""
    rows = [
        cache[table[b][first_columns[b] + t // BLOCK_SIZE], t % BLOCK_SIZE]
        for b, length in enumerate(lengths)
        for t in range(length)
    ]
    return torch.stack(rows) if rows else cache.new_empty(0, *cache.shape[2:])


TABLE = [[3, 0, 4], [5, 5, 1], [2, 0, 0]]


@pytest.mark.parametrize("dtype", [*CACHE_DTYPES, torch.int8], ids=str)
@pytest.mark.parametrize(
    ("lengths", "seq_starts", "first_columns"),
    [
        pytest.param([48, 17, 1], None, [0, 0, 0], id="full, partial and single token"),
        pytest.param([0, 16, 0], None, [0, 0, 0], id="empty sequences"),
        pytest.param([16, 20, 1], [32, 16, 0], [2, 1, 0], id="starts count tokens"),
        pytest.param(
            [16, 20, 1], [47, 31, 15], [2, 1, 0], id="a start drops what follows its last whole block"
        ),
    ],
)
def test_load(
    lengths: list[int], seq_starts: list[int] | None, first_columns: list[int], dtype: torch.dtype
) -> None:
    key_cache, value_cache = caches(6, dtype, value_size=32)
    starts = None if seq_starts is None else int32(seq_starts)
    key, value = torch_npu.atb.npu_paged_cache_load(
        key_cache.to("npu"),
        value_cache.to("npu"),
        int32(TABLE),
        int32(lengths),
        seq_starts=starts,
    )
    assert key.cpu().equal(load_by_hand(key_cache, TABLE, lengths, first_columns))
    assert value.cpu().equal(load_by_hand(value_cache, TABLE, lengths, first_columns))


def test_load_with_cumulative_lengths_into_given_rows() -> None:
    key_cache, value_cache = caches(6, torch.bfloat16)
    key = torch.zeros(70, HEADS, SIZE, dtype=torch.bfloat16, device="npu")
    value = torch.zeros_like(key)
    result = torch_npu.atb.npu_paged_cache_load(
        key_cache.to("npu"),
        value_cache.to("npu"),
        int32(TABLE),
        int32([0, 48, 65, 66]),
        cumsum=True,
        key=key,
        value=value,
    )
    assert [r.data_ptr() for r in result] == [key.data_ptr(), value.data_ptr()]
    assert key[:66].cpu().equal(load_by_hand(key_cache, TABLE, [48, 17, 1], [0, 0, 0]))
    assert value[:66].cpu().equal(load_by_hand(value_cache, TABLE, [48, 17, 1], [0, 0, 0]))
    assert key[66:].cpu().eq(0).all()


def test_store_puts_rows_at_their_slots_and_skips_negative_ones() -> None:
    key, value = (
        random(4, HEADS, SIZE, dtype=torch.float16),
        random(4, HEADS, 32, dtype=torch.float16, seed=1),
    )
    # A block in front of each cache, where a negative slot would land.
    key_blocks = torch.zeros(4, BLOCK_SIZE, HEADS, SIZE, dtype=torch.float16, device="npu")
    value_blocks = torch.zeros(4, BLOCK_SIZE, HEADS, 32, dtype=torch.float16, device="npu")
    slots = int32([0, -1, 17, 47])
    returned = torch_npu._npu_reshape_and_cache(
        key.to("npu"), value.to("npu"), key_blocks[1:], value_blocks[1:], slots
    )
    assert returned is None
    for blocks, rows in ((key_blocks.cpu(), key), (value_blocks.cpu(), value)):
        expected = torch.zeros_like(blocks)
        expected[1, 0], expected[2, 1], expected[3, 15] = rows[0], rows[2], rows[3]
        assert blocks.equal(expected)


def test_store_one_cache() -> None:
    rows = random(2, HEADS, SIZE, dtype=torch.bfloat16)
    cache = torch.zeros(2, BLOCK_SIZE, HEADS, SIZE, dtype=torch.bfloat16, device="npu")
    torch_npu._npu_reshape_and_cache_siso(rows.to("npu"), cache, int32([31, 3]))
    assert cache[1, 15].cpu().equal(rows[0])
    assert cache[0, 3].cpu().equal(rows[1])
    assert cache.cpu().count_nonzero() == rows.count_nonzero()


@pytest.mark.parametrize("dtype", [*CACHE_DTYPES, torch.int8], ids=str)
def test_pages_of_key_and_value_in_one_region(dtype: torch.dtype) -> None:
    """The plugin's layout: page b is its keys, then its values. As two caches, the second is the first
    shifted by half a page, and block 2 * b of either is what page b holds."""
    num_pages = 4
    region = torch.zeros(2 * num_pages, BLOCK_SIZE, HEADS, SIZE, dtype=dtype, device="npu")
    key_cache, value_cache = region[:-1], region[1:]
    key = caches(1, dtype)[0][0]
    value = caches(1, dtype)[1][0]
    page = 2
    slots = torch.arange(BLOCK_SIZE, dtype=torch.int32, device="npu") + 2 * page * BLOCK_SIZE
    torch_npu._npu_reshape_and_cache(key.to("npu"), value.to("npu"), key_cache, value_cache, slots)
    expected = torch.zeros(2 * num_pages, BLOCK_SIZE, HEADS, SIZE, dtype=dtype)
    expected[2 * page], expected[2 * page + 1] = key, value
    assert region.cpu().equal(expected)
    loaded = torch_npu.atb.npu_paged_cache_load(
        key_cache, value_cache, int32([[2 * page]]), int32([BLOCK_SIZE])
    )
    assert loaded[0].cpu().equal(key)
    assert loaded[1].cpu().equal(value)


@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_what_is_stored_is_loaded(data: st.DataObject) -> None:
    """For any blocks of any sequences: store at the slots of the block table, load through it."""
    lengths = data.draw(st.lists(st.integers(0, 3 * BLOCK_SIZE), min_size=1, max_size=4))
    columns = 3
    blocks = data.draw(st.permutations(range(len(lengths) * columns)))
    table = [blocks[b * columns : (b + 1) * columns] for b in range(len(lengths))]
    slots = [
        table[b][t // BLOCK_SIZE] * BLOCK_SIZE + t % BLOCK_SIZE
        for b, n in enumerate(lengths)
        for t in range(n)
    ]
    key = random(len(slots), HEADS, SIZE, dtype=torch.bfloat16)
    value = random(len(slots), HEADS, SIZE, dtype=torch.bfloat16, seed=1)
    key_cache = torch.zeros(len(blocks), BLOCK_SIZE, HEADS, SIZE, dtype=torch.bfloat16, device="npu")
    value_cache = torch.zeros_like(key_cache)
    order = data.draw(st.permutations(range(len(slots))))
    torch_npu._npu_reshape_and_cache(
        key[order].to("npu"), value[order].to("npu"), key_cache, value_cache, int32([slots[i] for i in order])
    )
    loaded = torch_npu.atb.npu_paged_cache_load(key_cache, value_cache, int32(table), int32(lengths))
    assert loaded[0].cpu().equal(key)
    assert loaded[1].cpu().equal(value)


def load(**changes: torch.Tensor | bool) -> None:
    """A call that is accepted, but for `changes`."""
    cache = torch.zeros(6, BLOCK_SIZE, HEADS, SIZE, dtype=torch.bfloat16, device="npu")
    arguments = {
        "key_cache": cache,
        "value_cache": cache.clone(),
        "block_table": int32(TABLE),
        "context_lens": int32([1, 1, 1]),
    }
    torch_npu.atb.npu_paged_cache_load(**(arguments | changes))


def store(**changes: torch.Tensor) -> None:
    """A call that is accepted, but for `changes`."""
    cache = torch.zeros(6, BLOCK_SIZE, HEADS, SIZE, dtype=torch.bfloat16, device="npu")
    rows = torch.zeros(3, HEADS, SIZE, dtype=torch.bfloat16, device="npu")
    arguments = {
        "key": rows,
        "value": rows.clone(),
        "key_cache": cache,
        "value_cache": cache.clone(),
        "slot_indices": int32([0, 1, 2]),
    }
    torch_npu._npu_reshape_and_cache(**(arguments | changes))


def zeros(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.zeros(*shape, dtype=dtype, device="npu")


def test_the_unchanged_calls_are_accepted() -> None:
    load()
    store()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        pytest.param(
            lambda: {"block_table": int32(TABLE).long().to("npu")},
            "block_table is int64.*int32",
            id="int64 table",
        ),
        pytest.param(
            lambda: {"block_table": int32(TABLE).cpu()},
            "block_table is int32.*on cpu.*on the npu",
            id="CPU table",
        ),
        pytest.param(
            lambda: {"context_lens": int32([1, 1, 1]).cpu()},
            "context_lens is int32.*on cpu.*on the npu",
            id="CPU lengths",
        ),
        pytest.param(
            lambda: {"context_lens": torch.ones(3, dtype=torch.int64, device="npu")},
            "context_lens is int64.*int32",
            id="int64 lengths",
        ),
        pytest.param(
            lambda: {"context_lens": int32([1, 1])},
            "context_lens is .*one length per row",
            id="short lengths",
        ),
        pytest.param(
            lambda: {"context_lens": int32([1, 2, 3]), "cumsum": True},
            "with cumsum=True.*leading 0",
            id="cumulative lengths without the leading 0",
        ),
        pytest.param(
            lambda: {"context_lens": int32([1, 2, 3, 4]), "cumsum": True},
            "begins with 1",
            id="cumulative lengths that do not begin with 0",
        ),
        pytest.param(
            lambda: {"key_cache": zeros(6, BLOCK_SIZE, 32)}, "key_cache is .*4-dimensional", id="3-D cache"
        ),
        pytest.param(
            lambda: {"value_cache": zeros(5, BLOCK_SIZE, HEADS, SIZE)},
            "differ in the last size only",
            id="unequal caches",
        ),
        pytest.param(
            lambda: {"value_cache": zeros(6, BLOCK_SIZE, HEADS, SIZE, dtype=torch.float16)},
            "value_cache is float16.*bfloat16 as key_cache is",
            id="caches of two dtypes",
        ),
        pytest.param(
            lambda: {"key_cache": zeros(6, BLOCK_SIZE, 1, 24)},
            "24 elements per token.*multiple of 16",
            id="24 elements",
        ),
        pytest.param(
            lambda: {
                "key_cache": zeros(6, BLOCK_SIZE, 1, 16, dtype=torch.int8),
                "value_cache": zeros(6, BLOCK_SIZE, 1, 32, dtype=torch.int8),
            },
            "16 elements per token.*multiple of 32",
            id="16 elements of int8",
        ),
        pytest.param(
            lambda: {"key_cache": zeros(6, BLOCK_SIZE, HEADS, SIZE, dtype=torch.int32)},
            "key_cache is int32.*float16 or bfloat16",
            id="int32 cache",
        ),
        pytest.param(
            lambda: {"seq_starts": int32([0])},
            "seq_starts is .*one start for each of the 3",
            id="one start",
        ),
        pytest.param(
            lambda: {"key": zeros(2, HEADS, SIZE), "value": zeros(3, HEADS, SIZE)},
            r"key is bfloat16\[2, 2, 16\].*for 3 tokens",
            marks=emulator_only,
            id="result too small",
        ),
        pytest.param(
            lambda: {"key": zeros(3, HEADS, 2 * SIZE)[..., :SIZE], "value": zeros(3, HEADS, SIZE)},
            "key is .*contiguous",
            id="result with gaps",
        ),
        pytest.param(
            lambda: {"block_table": int32([[6], [0], [0]])},
            "block 6 in column 0; the cache has blocks 0 to 5",
            marks=emulator_only,
            id="block past the end",
        ),
        pytest.param(
            lambda: {"block_table": int32([[0], [-1], [0]])},
            "block -1",
            marks=emulator_only,
            id="block -1",
        ),
        pytest.param(
            lambda: {"context_lens": int32([49, 1, 1])},
            "block table has 3 columns",
            marks=emulator_only,
            id="longer than the table's row",
        ),
    ],
)
def test_load_refuses(changes: Changes, message: str) -> None:
    with pytest.raises(RuntimeError, match=f"npu_paged_cache_load: .*{message}"):
        load(**changes())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        pytest.param(
            lambda: {"slot_indices": torch.zeros(3, dtype=torch.int64, device="npu")},
            "slot_indices is int64.*int32",
            id="int64 slots",
        ),
        pytest.param(
            lambda: {"slot_indices": int32([0, 1, 2]).cpu()},
            "slot_indices is int32.*on cpu.*on the npu",
            id="CPU slots",
        ),
        pytest.param(lambda: {"slot_indices": int32([0, 1])}, "one slot for each row", id="too few slots"),
        pytest.param(
            lambda: {"slot_indices": int32([[0, 1, 2]])},
            "slot_indices is .*1-dimensional",
            id="2-D slots",
        ),
        pytest.param(lambda: {"key": zeros(3, HEADS * SIZE)}, "key is .*3-dimensional", id="flat rows"),
        pytest.param(
            lambda: {"key": zeros(3, HEADS, SIZE, dtype=torch.float16)},
            "key_cache is bfloat16.*float16 as key is",
            id="rows of another dtype",
        ),
        pytest.param(
            lambda: {"value": zeros(3, HEADS, 32)}, "heads and head size have to agree", id="other head size"
        ),
        pytest.param(
            lambda: {"key_cache": zeros(6, HEADS, BLOCK_SIZE, SIZE).transpose(1, 2)},
            "key_cache is .*contiguous",
            id="cache with other strides",
        ),
        pytest.param(
            lambda: {"slot_indices": int32([0, 1, 96])},
            "slot_indices holds 96 for row 2; the cache has slots 0 to 95",
            marks=emulator_only,
            id="slot past the end",
        ),
    ],
)
def test_store_refuses(changes: Changes, message: str) -> None:
    with pytest.raises(RuntimeError, match=f"_npu_reshape_and_cache: .*{message}"):
        store(**changes())
