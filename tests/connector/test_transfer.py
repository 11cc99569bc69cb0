# SPDX-License-Identifier: Apache-2.0
"""Every decode rank gets, byte for byte, its heads of one global reference, and nothing else changes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
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
    pytest.param(BLOCK_SIZE, id="a block"),
    pytest.param(4 * BLOCK_SIZE - 1, id="one token short of four blocks"),
    pytest.param(4 * BLOCK_SIZE + 1, id="one token more than four blocks"),
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


def part_of(engine: Engine, rank: int, num_kv_heads: int, bits: torch.Tensor) -> torch.Tensor:
    """The rank's layers and heads of `bits` [layer, K/V, slot, head, dim]."""
    layers, heads = engine.layers(rank), heads_of(rank % engine.tp_size, engine.tp_size, num_kv_heads)
    return bits[layers.start : layers.stop, ..., heads, :]


@pytest.fixture(
    scope="module",
    params=TABLE,
    ids=str,
)
def engines(request, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Engine, Engine, Pair]]:
    sizes: Pair = request.param
    heads = sizes.num_kv_heads
    folder = Path(tmp_path_factory.mktemp("model"))
    # 24 heads of queries: vLLM wants them divisible by every TP size of the table.
    model = model_folder(folder, heads, num_attention_heads=24, hidden_size=384)
    prefill, decode = (
        Engine(
            engine_config(
                model, side.tp_size, role, block_size=side.block_size, pp_size=len(side.layers_per_stage)
            ),
            heads,
            side.pages_per_block,
            side.layers_per_stage,
        )
        for side, role in ((sizes.prefill, "kv_producer"), (sizes.decode, "kv_consumer"))
    )
    with running(prefill, decode):
        yield prefill, decode, sizes


@pytest.fixture
def reference(engines: tuple[Engine, Engine, Pair]) -> torch.Tensor:
    """Random bits [layer, K/V, slot, head, dim], every prefill rank's slice of them in its cache."""
    prefill, decode, sizes = engines
    shape = (LAYERS, 2, NUM_BLOCKS * sizes.prefill.block_size, sizes.num_kv_heads, HEAD_SIZE)
    bits = torch.randint(-(2**15), 2**15, shape, dtype=torch.int16)
    for rank in range(prefill.num_ranks):
        prefill.fill(rank, part_of(prefill, rank, sizes.num_kv_heads, bits))
    for rank in range(decode.num_ranks):
        decode.pages(rank).fill_(UNTOUCHED)
    return bits


def slots_of(num_tokens: int, blocks: Sequence[int], block_size: int) -> list[int]:
    return [blocks[token // block_size] * block_size + token % block_size for token in range(num_tokens)]


@pytest.mark.parametrize("num_tokens", PROMPTS)
def test_bytes(engines, reference, num_tokens):
    prefill, decode, sizes = engines
    heads = sizes.num_kv_heads
    num_prompt_tokens = num_tokens + 1
    remote, local = (
        blocks[: -(-num_prompt_tokens // side.block_size)]
        for blocks, side in ((REMOTE_BLOCKS, sizes.prefill), (LOCAL_BLOCKS, sizes.decode))
    )
    # Whole pages move where they are alike, and otherwise what ends with a page that either side could have.
    step = math.gcd(sizes.prefill.page_size, sizes.decode.page_size)
    num_pulled = -(-num_tokens // step) * step

    params = prefilled(prefill, f"p-{num_tokens}", num_prompt_tokens, remote)
    wanted, num_external = admit(decode, f"d-{num_tokens}", num_prompt_tokens, local, params)
    assert num_external == num_tokens
    output = decode.step_until(lambda output: bool(output.finished_recving))

    assert output.finished_recving == {f"d-{num_tokens}"}
    assert not output.failed_recving
    sources = slots_of(num_pulled, remote, sizes.prefill.block_size)
    targets = slots_of(num_pulled, local, sizes.decode.block_size)
    for rank in range(decode.num_ranks):
        found = decode.kv(rank)
        expected = torch.full_like(found, UNTOUCHED)
        expected[:, :, targets] = part_of(decode, rank, heads, reference[:, :, sources])
        assert torch.equal(found, expected), f"decode rank {rank}"

    freed = prefill.step_until(lambda output: bool(output.finished_sending))
    assert freed.finished_sending == {f"p-{num_tokens}"}

    transfer = finish(decode, wanted)
    copies = max(1, decode.tp_size // heads)
    assert transfer["bytes"] == LAYERS * 2 * num_pulled * HEAD_SIZE * 2 * heads * copies
    assert (transfer["prompt_tokens"], transfer["tokens"]) == (num_prompt_tokens, num_tokens)
    assert transfer["blocks"] == -(-num_tokens // sizes.decode.block_size)
    assert set(transfer["sources"]) <= set(range(prefill.num_ranks))


def test_a_prefix_hit_that_ends_inside_a_block_there_is_not_read(tmp_path):
    model = model_folder(tmp_path, 2)
    prefill = Engine(engine_config(model, 1, "kv_producer", block_size=64), 2)
    decode = Engine(engine_config(model, 1, "kv_consumer"), 2)
    with running(prefill, decode):
        prefill.pages(0).random_()
        decode.pages(0).fill_(UNTOUCHED)
        params = prefilled(prefill, "p", 97, [5, 2])
        _, num_external = admit(decode, "d", 97, [7, 8, 4, 1, 9, 12, 13], params, cached=48)
        assert num_external == 48
        decode.step_until(lambda output: output.finished_recving == {"d"})
        found = decode.kv(0)
        expected = torch.full_like(found, UNTOUCHED)
        # Tokens 48 to 63 are at the end of block 5 there, 64 to 95 at the start of block 2.
        expected[:, :, 1 * 16 : 2 * 16] = prefill.kv(0)[:, :, 5 * 64 + 48 : 6 * 64]
        expected[:, :, 9 * 16 : 10 * 16] = prefill.kv(0)[:, :, 2 * 64 : 2 * 64 + 16]
        expected[:, :, 12 * 16 : 13 * 16] = prefill.kv(0)[:, :, 2 * 64 + 16 : 2 * 64 + 32]
        assert torch.equal(found, expected)


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
