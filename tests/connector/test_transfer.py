# SPDX-License-Identifier: Apache-2.0
"""Every decode rank gets, byte for byte, its heads of one global reference, and nothing else changes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from connector.engines import (
    BLOCK_SIZE,
    HEAD_SIZE,
    LAYERS,
    NUM_BLOCKS,
    Engine,
    admit,
    engine_config,
    finish,
    model_folder,
    prefilled,
    running,
)
from connector.topologies import TABLE, Pair

UNTOUCHED = 0x5A5A

# Tokens whose KV is wanted: a prompt has one more, which decode computes itself.
PROMPTS = [
    pytest.param(1, id="one token"),
    pytest.param(BLOCK_SIZE - 1, id="one token short of a block"),
    pytest.param(BLOCK_SIZE, id="a block"),
    pytest.param(BLOCK_SIZE + 1, id="one token more than a block"),
    pytest.param(4 * BLOCK_SIZE, id="four blocks"),
]

REMOTE_BLOCKS = (17, 3, 4, 5, 22)
LOCAL_BLOCKS = (9, 10, 11, 2, 20)
"""Scattered, with neighbours on one side, on the other, and on both."""


def heads_of(rank: int, tp_size: int, heads: int) -> slice:
    """Written apart from the code under test: vLLM gives each rank equal, consecutive heads, or one copy."""
    if tp_size <= heads:
        per_rank = heads // tp_size
        return slice(rank * per_rank, (rank + 1) * per_rank)
    head = rank // (tp_size // heads)
    return slice(head, head + 1)


@pytest.fixture(
    scope="module",
    params=TABLE,
    ids=str,
)
def pair(request, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Engine, Engine, int]]:
    sizes: Pair = request.param
    heads = sizes.num_kv_heads
    folder = Path(tmp_path_factory.mktemp("model"))
    # 24 heads of queries: vLLM wants them divisible by every TP size of the table.
    model = model_folder(folder, heads, num_attention_heads=24, hidden_size=384)
    prefill = Engine(engine_config(model, sizes.prefill.tp_size, "kv_producer"), heads)
    decode = Engine(engine_config(model, sizes.decode.tp_size, "kv_consumer"), heads)
    with running(prefill, decode):
        yield prefill, decode, heads


@pytest.fixture
def reference(pair: tuple[Engine, Engine, int]) -> torch.Tensor:
    """Random bits [layer, block, K/V, token, head, dim], every prefill rank's slice of them in its cache."""
    prefill, decode, heads = pair
    shape = (LAYERS, NUM_BLOCKS, 2, BLOCK_SIZE, heads, HEAD_SIZE)
    bits = torch.randint(-(2**15), 2**15, shape, dtype=torch.int16)
    for rank in range(prefill.tp_size):
        prefill.pages(rank).copy_(bits[..., heads_of(rank, prefill.tp_size, heads), :])
    for rank in range(decode.tp_size):
        decode.pages(rank).fill_(UNTOUCHED)
    return bits


@pytest.mark.parametrize("num_tokens", PROMPTS)
def test_bytes(pair, reference, num_tokens):
    prefill, decode, heads = pair
    num_prompt_tokens = num_tokens + 1
    num_blocks = -(-num_tokens // BLOCK_SIZE)
    remote, local = list(REMOTE_BLOCKS[:num_blocks]), list(LOCAL_BLOCKS[:num_blocks])
    last = [23] if num_prompt_tokens > num_blocks * BLOCK_SIZE else []

    params = prefilled(prefill, f"p-{num_tokens}", num_prompt_tokens, remote + last)
    wanted, num_external = admit(decode, f"d-{num_tokens}", num_prompt_tokens, local + last, params)
    assert num_external == num_tokens
    output = decode.step_until(lambda output: bool(output.finished_recving))

    assert output.finished_recving == {f"d-{num_tokens}"}
    assert not output.failed_recving
    for rank in range(decode.tp_size):
        own = heads_of(rank, decode.tp_size, heads)
        expected = torch.full_like(reference[..., own, :], UNTOUCHED)
        expected[:, local] = reference[:, remote][..., own, :]
        assert torch.equal(decode.pages(rank).cpu(), expected), f"decode rank {rank}"

    freed = prefill.step_until(lambda output: bool(output.finished_sending))
    assert freed.finished_sending == {f"p-{num_tokens}"}

    transfer = finish(decode, wanted)
    page_bytes = 2 * BLOCK_SIZE * HEAD_SIZE * 2
    copies = max(1, decode.tp_size // heads)
    assert transfer["bytes"] == LAYERS * num_blocks * page_bytes * heads * copies
    assert (transfer["prompt_tokens"], transfer["tokens"]) == (num_prompt_tokens, num_tokens)
    assert transfer["blocks"] == num_blocks
    assert set(transfer["sources"]) <= set(range(prefill.tp_size))


def test_blocks_that_attention_cuts_into_smaller_ones(tmp_path):
    model = model_folder(tmp_path, 4)
    prefill = Engine(engine_config(model, 2, "kv_producer"), 4, pages_per_block=2)
    decode = Engine(engine_config(model, 1, "kv_consumer"), 4, pages_per_block=2)
    with running(prefill, decode):
        for rank in range(2):
            prefill.pages(rank).random_()
        params = prefilled(prefill, "p", 2 * BLOCK_SIZE, [5, 2])
        admit(decode, "d", 2 * BLOCK_SIZE, [7, 8], params)
        decode.step_until(lambda output: output.finished_recving == {"d"})
        sources, pulled = [10, 11, 4, 5], [14, 15, 16, 17]
        for rank in range(2):
            own = decode.pages(0).cpu()[:, pulled, ..., 2 * rank : 2 * rank + 2, :]
            assert torch.equal(own, prefill.pages(rank).cpu()[:, sources])


def test_ranks_with_the_same_heads_are_read_in_turn(tmp_path):
    model = model_folder(tmp_path, 2)
    prefill = Engine(engine_config(model, 8, "kv_producer"), 2)
    decode = Engine(engine_config(model, 1, "kv_consumer"), 2)
    sources = []
    with running(prefill, decode):
        for turn in range(4):
            params = prefilled(prefill, f"p{turn}", BLOCK_SIZE, [1])
            wanted, _ = admit(decode, f"d{turn}", BLOCK_SIZE, [1], params)
            decode.step_until(lambda output: bool(output.finished_recving))
            sources.append(finish(decode, wanted)["sources"])
    # Four copies of each of two heads: ranks 0 to 3 and 4 to 7.
    assert sources == [(0, 4), (1, 5), (2, 6), (3, 7)]
