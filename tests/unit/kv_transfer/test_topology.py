# SPDX-License-Identifier: Apache-2.0
"""Which heads live on which rank, and from which ranks they are read."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_ascend.errors import TopologyError
from vllm_ascend.kv_transfer.topology import Span, heads_on, num_turns, plan_head_reads, turns_of


def valid_tp_sizes(num_kv_heads: int) -> list[int]:
    """Sizes that vLLM allows: divisors of the heads, and multiples of them (copies)."""
    return [size for size in range(1, 33) if num_kv_heads % size == 0 or size % num_kv_heads == 0]


@pytest.mark.parametrize(
    ("tp_size", "num_kv_heads", "expected"),
    [
        pytest.param(1, 4, [(0, 4)], id="one rank stores every head"),
        pytest.param(2, 8, [(0, 4), (4, 8)], id="two ranks store a half each"),
        pytest.param(4, 4, [(0, 1), (1, 2), (2, 3), (3, 4)], id="as many ranks as heads: one head each"),
        pytest.param(
            8, 4, [(i // 2, i // 2 + 1) for i in range(8)], id="twice as many ranks: neighbours copy"
        ),
        pytest.param(4, 1, [(0, 1)] * 4, id="one head: every rank stores it"),
        pytest.param(3, 6, [(0, 2), (2, 4), (4, 6)], id="three ranks of six heads"),
    ],
)
def test_heads_on(tp_size, num_kv_heads, expected):
    held = [heads_on(rank, tp_size, num_kv_heads) for rank in range(tp_size)]
    assert [(span.start, span.stop) for span in held] == expected


@pytest.mark.parametrize(
    ("decode_tp", "decode_rank", "prefill_tp", "turn", "expected"),
    [
        pytest.param(2, 1, 2, 0, [(1, 4, 8)], id="same size: one read from the twin rank"),
        pytest.param(4, 3, 2, 0, [(1, 6, 8)], id="wider decode: a slice of one rank"),
        pytest.param(1, 0, 2, 0, [(0, 0, 4), (1, 4, 8)], id="narrower decode: gather all ranks"),
        pytest.param(2, 1, 4, 0, [(2, 4, 6), (3, 6, 8)], id="half as wide: gather two ranks"),
        pytest.param(4, 1, 16, 0, [(4, 2, 3), (6, 3, 4)], id="copies: the first of each pair on turn 0"),
        pytest.param(4, 1, 16, 1, [(5, 2, 3), (7, 3, 4)], id="copies: the second of each pair on turn 1"),
        pytest.param(16, 5, 8, 0, [(2, 2, 3)], id="decode copies: one head from the rank that has it"),
    ],
)
def test_plan_head_reads(decode_tp, decode_rank, prefill_tp, turn, expected):
    held = [heads_on(rank, prefill_tp, 8) for rank in range(prefill_tp)]
    reads = plan_head_reads(heads_on(decode_rank, decode_tp, 8), held, turn)
    assert [(read.prefill_rank, read.heads.start, read.heads.stop) for read in reads] == expected


@pytest.mark.parametrize(
    ("decode_rank", "expected"),
    [
        pytest.param(0, [(0, 0, 2), (1, 2, 3)], id="three to two: one rank whole, half of the next"),
        pytest.param(1, [(1, 3, 4), (2, 4, 6)], id="three to two: the other half, one rank whole"),
    ],
)
def test_sizes_that_do_not_divide_one_another(decode_rank, expected):
    held = [heads_on(rank, 3, 6) for rank in range(3)]
    reads = plan_head_reads(heads_on(decode_rank, 2, 6), held, turn=0)
    assert [(read.prefill_rank, read.heads.start, read.heads.stop) for read in reads] == expected


def test_a_head_that_nobody_stores_is_refused_by_number():
    with pytest.raises(TopologyError, match="no prefill rank stores KV head 4"):
        plan_head_reads(Span(0, 8), [Span(0, 4)], turn=0)


sizes = st.integers(1, 24).flatmap(
    lambda heads: st.tuples(
        st.just(heads), st.sampled_from(valid_tp_sizes(heads)), st.sampled_from(valid_tp_sizes(heads))
    )
)


@settings(deadline=None)
@given(sizes, st.integers(0, 100))
def test_every_wanted_head_is_read_exactly_once_from_a_rank_that_stores_it(size, turn):
    num_kv_heads, prefill_tp, decode_tp = size
    held = [heads_on(rank, prefill_tp, num_kv_heads) for rank in range(prefill_tp)]
    for decode_rank in range(decode_tp):
        wanted = heads_on(decode_rank, decode_tp, num_kv_heads)
        reads = plan_head_reads(wanted, held, turn)
        heads = [head for read in reads for head in range(read.heads.start, read.heads.stop)]
        assert heads == list(range(wanted.start, wanted.stop))
        assert all(read.heads & held[read.prefill_rank] == read.heads for read in reads)


@settings(deadline=None)
@given(sizes, st.integers(1, 60))
def test_over_any_number_of_requests_copies_are_read_equally_often_give_or_take_one(size, num_requests):
    num_kv_heads, prefill_tp, decode_tp = size
    held = [heads_on(rank, prefill_tp, num_kv_heads) for rank in range(prefill_tp)]
    served = np.zeros((prefill_tp, num_kv_heads), dtype=int)
    for decode_rank in range(decode_tp):
        wanted = heads_on(decode_rank, decode_tp, num_kv_heads)
        for turn in itertools.islice(turns_of(decode_rank, decode_tp, num_kv_heads), num_requests):
            for read in plan_head_reads(wanted, held, turn):
                served[read.prefill_rank, read.heads.start : read.heads.stop] += 1
    for head in range(num_kv_heads):
        reads = [served[rank, head] for rank, span in enumerate(held) if span.start <= head < span.stop]
        assert max(reads) - min(reads) <= 1


@settings(deadline=None)
@given(sizes, st.integers(0, 100))
def test_the_choice_among_copies_repeats_after_all_turns(size, turn):
    num_kv_heads, prefill_tp, decode_tp = size
    held = [heads_on(rank, prefill_tp, num_kv_heads) for rank in range(prefill_tp)]
    wanted = heads_on(0, decode_tp, num_kv_heads)
    assert plan_head_reads(wanted, held, turn) == plan_head_reads(wanted, held, turn + num_turns(held))
