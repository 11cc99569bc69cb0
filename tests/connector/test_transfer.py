# SPDX-License-Identifier: Apache-2.0
"""Every decode rank gets, byte for byte, its heads of one global reference, and nothing else changes."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from connector.engines import (
    BLOCK_SIZE,
    HEAD_SIZE,
    Engine,
    admit,
    engine_config,
    finish,
    model_folder,
    prefilled,
    running,
    state_bytes,
)
from connector.topologies import LAYERS, TABLE, Model, Pair

UNTOUCHED = 0x5A

# Tokens whose KV is wanted: a prompt has one more, which decode computes itself.
PROMPTS = [
    pytest.param(1, id="one token"),
    pytest.param(BLOCK_SIZE, id="a block"),
    pytest.param(4 * BLOCK_SIZE - 1, id="one token short of four blocks"),
    pytest.param(4 * BLOCK_SIZE + 1, id="one token more than four blocks"),
]

REMOTE_BLOCKS = ((17, 3, 4, 5, 22), (6, 7, 1, 12, 13), (2, 8, 9, 10, 18))
LOCAL_BLOCKS = ((9, 10, 11, 2, 20), (1, 3, 4, 5, 23), (12, 13, 7, 8, 14))
"""For each KV cache group, scattered, with neighbours on one side, on the other, and on both."""


@pytest.fixture(
    scope="module",
    params=TABLE,
    ids=str,
)
def engines(request, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Engine, Engine, Pair]]:
    pair: Pair = request.param
    folder = Path(tmp_path_factory.mktemp("model"))
    # 24 heads of queries: vLLM wants them divisible by every TP size of the table.
    wide = {"num_attention_heads": 24, "hidden_size": 384}
    model = model_folder(folder / "model", pair.model.num_kv_heads, **wide)
    if (draft_heads := pair.model.draft_heads) is not None:
        draft = model_folder(folder / "draft", draft_heads, num_hidden_layers=1, **wide)
    else:
        draft = None
    prefill, decode = (
        Engine(
            engine_config(
                model,
                side.tp_size,
                role,
                # So the table shows that checksums do not depend on layouts and sizes, too. And 32 parts of
                # 32 KiB of staging memory: several windows for a request of many heads.
                {"verify": True, "regroup": side.regroup, "staging_mib": 1, "reader_threads": 16},
                block_size=side.block_size,
                pp_size=len(side.layers_per_stage),
                draft=draft,
                head_major=side.head_major,
            ),
            dataclasses.replace(pair.model, dtype=side.dtype),
            side.pages_per_block,
            side.layers_per_stage,
            tokens_per_state=side.tokens_per_state,
        )
        for side, role in ((pair.prefill, "kv_producer"), (pair.decode, "kv_consumer"))
    )
    with running(prefill, decode):
        yield prefill, decode, pair


@dataclass(frozen=True)
class Wanted:
    """What of one KV cache group must arrive."""

    remote: list[int]
    local: list[int]
    """The request's blocks, as vLLM lists them: 0 where the window has passed."""
    num_blocks: int
    sources: list[int]
    targets: list[int]
    """Slots; of states, blocks."""


def wanted_of(group: int, pair: Pair, num_tokens: int) -> Wanted:
    """Written apart from the code under test, token by token."""
    if group in pair.model.state_groups:
        return wanted_state(group, pair, num_tokens)
    window = pair.model.windows[group] or 10**9
    seen = [token for token in range(num_tokens) if num_tokens - token < window]
    # Whole pages move where they are alike, and otherwise what ends with a page that either side could have.
    step = math.gcd(pair.prefill.page_size, pair.decode.page_size)
    moved = range(seen[0] // step * step, -(-num_tokens // step) * step)

    def listed(blocks: Sequence[int], size: int) -> list[int]:
        needed = blocks[: -(-(num_tokens + 1) // size)]
        return [block if (i + 1) * size > seen[0] else 0 for i, block in enumerate(needed)]

    def slots(blocks: Sequence[int], size: int) -> list[int]:
        return [blocks[token // size] * size + token % size for token in moved]

    there, here = pair.prefill.block_size, pair.decode.block_size
    remote, local = listed(REMOTE_BLOCKS[group], there), listed(LOCAL_BLOCKS[group], here)
    num_blocks = len({token // here for token in seen})
    return Wanted(remote, local, num_blocks, slots(remote, there), slots(local, here))


def wanted_state(group: int, pair: Pair, num_tokens: int) -> Wanted:
    """vLLM keeps the state in the block of the last token, and maybe the one from before it, of no use."""

    def listed(blocks: Sequence[int], size: int) -> list[int]:
        num_blocks = -(-num_tokens // size)
        return [0] * (num_blocks - 2) + list(blocks[:2] if num_blocks > 1 else blocks[1:2])

    remote, local = (
        listed(blocks[group], side.tokens_per_state or side.block_size)
        for blocks, side in ((REMOTE_BLOCKS, pair.prefill), (LOCAL_BLOCKS, pair.decode))
    )
    return Wanted(remote, local, 1, [remote[-1]], [local[-1]])


def part_of_state(pair: Pair, rank: int, tp_size: int, state: torch.Tensor) -> torch.Tensor:
    """The rank's part of one layer's `state` [part, byte]."""
    return state[0 if pair.model.every_rank_has_states else rank % tp_size]


def heads_of(rank: int, tp_size: int, heads: int) -> slice:
    """Written apart from the code under test: vLLM gives each rank equal, consecutive heads, or one copy."""
    if tp_size <= heads:
        per_rank = heads // tp_size
        return slice(rank * per_rank, (rank + 1) * per_rank)
    head = rank // (tp_size // heads)
    return slice(head, head + 1)


def part_of(engine: Engine, rank: int, layer: int, bits: torch.Tensor) -> torch.Tensor:
    """The rank's heads of one layer's `bits` [plane, token, head, dim]."""
    return bits[..., heads_of(rank % engine.tp_size, engine.tp_size, engine.model.heads_of(layer)), :]


def random_bits(pair: Pair, num_tokens: int, num_heads: int) -> torch.Tensor:
    """Bits of one layer [plane, token, head, dim], as the prefill engine keeps them."""
    shape = (1 if pair.model.latent else 2, num_tokens, num_heads, HEAD_SIZE)
    if pair.prefill.dtype == pair.decode.dtype:
        return torch.randint(-(2**15), 2**15, shape, dtype=torch.int16)
    return torch.randn(shape, dtype=getattr(torch, pair.prefill.dtype)).view(torch.int16)


def random_state(pair: Pair) -> torch.Tensor:
    """Bytes of one layer's state [part, byte]."""
    parts = 1 if pair.model.every_rank_has_states else pair.prefill.tp_size
    size = state_bytes(pair.model, pair.prefill.tp_size)
    return torch.randint(-128, 128, (parts, size), dtype=torch.int8)


def write(
    engine: Engine, rank: int, layer: int, pair: Pair, bits: torch.Tensor, places: Sequence[int]
) -> int:
    """Put the rank's part of one layer's `bits`, or state, to `places`; how many bytes it has."""
    if pair.model.keeps_state(layer):
        part = part_of_state(pair, rank, engine.tp_size, bits)
        engine.state(rank, layer)[places] = part.to(engine.state(rank, layer).device)
        return part.numel()
    kv = engine.kv(rank, layer)
    part = part_of(engine, rank, layer, bits)
    kv[:, places] = part
    engine.fill(rank, layer, kv)
    return 2 * part.numel()


def bytes_read(decode: Engine, rank: int, layer: int, pair: Pair, sources: Sequence[int]) -> int:
    """What a decode rank reads of a layer that is converted: whole pages of the prefill ranks' `sources`.

    Head-major those of its own heads, token-major those of all heads that a rank with some of them has.
    """
    heads, page_size, tp_size = pair.model.heads_of(layer), pair.prefill.page_size, pair.prefill.tp_size
    kept = set(range(heads)[heads_of(rank % decode.tp_size, decode.tp_size, heads)])
    held = {range(heads)[heads_of(there, tp_size, heads)] for there in range(tp_size)}
    read = sum(len(of_rank) for of_rank in held if kept & set(of_rank))
    num_tokens = page_size * len({slot // page_size for slot in sources})
    return 2 * num_tokens * (len(kept) if pair.prefill.head_major else read) * HEAD_SIZE * 2


def is_converted(pair: Pair, layer: int) -> bool:
    """Layouts differ, unless token-major pages have one head; or a staged read wants a part of the heads."""
    prefill, decode = pair.prefill, pair.decode
    there, here = (pair.model.heads_on_a_rank(side.tp_size, layer) for side in (prefill, decode))
    if pair.model.latent or pair.model.keeps_state(layer):
        return False
    if prefill.head_major != decode.head_major:
        return (here if prefill.head_major else there) > 1
    return decode.regroup == "staged" and not decode.head_major and here % there != 0


def as_in_decode(pair: Pair, bits: torch.Tensor) -> torch.Tensor:
    there, here = getattr(torch, pair.prefill.dtype), getattr(torch, pair.decode.dtype)
    return bits.contiguous().view(there).to(here).view(torch.int16)


@pytest.mark.parametrize("num_tokens", PROMPTS)
def test_bytes(engines, num_tokens):
    prefill, decode, pair = engines
    model = pair.model
    groups = [wanted_of(group, pair, num_tokens) for group in range(len(model.windows))]
    layers = range(model.num_layers + (model.draft_heads is not None))
    reference = {
        layer: random_state(pair)
        if model.keeps_state(layer)
        else random_bits(pair, len(groups[model.group_of(layer)].sources), model.heads_of(layer))
        for layer in layers
    }
    for rank in range(prefill.num_ranks):
        for layer in prefill.layers(rank):
            write(prefill, rank, layer, pair, reference[layer], groups[model.group_of(layer)].sources)
    for rank in range(decode.num_ranks):
        for layer in decode.layers(rank):
            decode.row(rank, layer).fill_(UNTOUCHED)

    params = prefilled(prefill, f"p-{num_tokens}", num_tokens + 1, tuple(group.remote for group in groups))
    prefill.step()
    local = tuple(group.local for group in groups)
    request, num_external = admit(decode, f"d-{num_tokens}", num_tokens + 1, local, params)
    assert num_external == num_tokens
    output = decode.step_until(lambda output: bool(output.finished_recving))

    assert output.finished_recving == {f"d-{num_tokens}"}
    assert not output.failed_recving
    num_bytes = 0
    for rank in range(decode.num_ranks):
        for layer in decode.layers(rank):
            found = decode.row(rank, layer).cpu()
            # Groups lie over each other: what another group's layer got is in this memory, too.
            decode.row(rank, layer).fill_(UNTOUCHED)
            for other in decode.layers_at(rank, layer):
                bits = reference[other] if model.keeps_state(other) else as_in_decode(pair, reference[other])
                num_written = write(decode, rank, other, pair, bits, groups[model.group_of(other)].targets)
                if other == layer:
                    sources = groups[model.group_of(layer)].sources
                    converted = is_converted(pair, layer)
                    num_bytes += bytes_read(decode, rank, layer, pair, sources) if converted else num_written
            assert torch.equal(found, decode.row(rank, layer).cpu()), f"decode rank {rank}, layer {layer}"

    freed = prefill.step_until(lambda output: bool(output.finished_sending))
    assert freed.finished_sending == {f"p-{num_tokens}"}

    transfer = finish(decode, request)
    assert transfer["bytes"] == num_bytes
    assert (transfer["prompt_tokens"], transfer["tokens"]) == (num_tokens + 1, num_tokens)
    assert transfer["blocks"] == sum(group.num_blocks for group in groups)
    assert set(transfer["sources"]) <= set(range(prefill.num_ranks))


@pytest.mark.parametrize(("prefill_tp", "decode_tp"), [(4, 1), (1, 4), (2, 2)])
def test_head_major_a_descriptor_per_block_and_source(tmp_path, prefill_tp, decode_tp):
    model = model_folder(tmp_path, 4)
    prefill = Engine(engine_config(model, prefill_tp, "kv_producer", head_major=True), 4)
    decode = Engine(engine_config(model, decode_tp, "kv_consumer", head_major=True), 4)
    with running(prefill, decode):
        params = prefilled(prefill, "p", 3 * BLOCK_SIZE + 1, [5, 3, 9, 1])
        request, _ = admit(decode, "d", 3 * BLOCK_SIZE + 1, [2, 7, 4, 8], params)
        decode.step_until(lambda output: output.finished_recving == {"d"})
        transfer = finish(decode, request)
    reads = max(prefill_tp, decode_tp)
    assert transfer["descriptors"] == 3 * reads


def test_a_prefix_hit_that_ends_inside_a_block_there_is_not_read(tmp_path):
    model = model_folder(tmp_path, 2)
    prefill = Engine(engine_config(model, 1, "kv_producer", block_size=64), 2)
    decode = Engine(engine_config(model, 1, "kv_consumer"), 2)
    with running(prefill, decode):
        prefill.pages(0).random_()
        decode.pages(0).view(torch.int8).fill_(UNTOUCHED)
        params = prefilled(prefill, "p", 97, [5, 2])
        _, num_external = admit(decode, "d", 97, [7, 8, 4, 1, 9, 12, 13], params, cached=48)
        assert num_external == 48
        decode.step_until(lambda output: output.finished_recving == {"d"})
        found, there = (
            torch.stack([one.kv(0, layer) for layer in range(LAYERS)]) for one in (decode, prefill)
        )
        expected = torch.full_like(found, UNTOUCHED << 8 | UNTOUCHED)
        # Tokens 48 to 63 are at the end of block 5 there, 64 to 95 at the start of block 2.
        expected[:, :, 1 * 16 : 2 * 16] = there[:, :, 5 * 64 + 48 : 6 * 64]
        expected[:, :, 9 * 16 : 10 * 16] = there[:, :, 2 * 64 : 2 * 64 + 16]
        expected[:, :, 12 * 16 : 13 * 16] = there[:, :, 2 * 64 + 16 : 2 * 64 + 32]
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


def test_numbers_that_the_other_element_type_cannot_hold_are_not_decoded(tmp_path, caplog_vllm):
    model = model_folder(tmp_path, 2)
    prefill = Engine(engine_config(model, 1, "kv_producer"), 2)
    decode = Engine(engine_config(model, 1, "kv_consumer"), Model(2, dtype="float16"))
    with running(prefill, decode):
        prefill.layer(0, 1).view(torch.bfloat16)[3, 1, 5, 1, 7] = 1e5
        params = prefilled(prefill, "p", 33, [5, 3])
        admit(decode, "d", 33, [7, 8], params)
        output = decode.step_until(lambda output: bool(output.finished_recving))
    assert output.failed_recving == {"d"}
    assert "has numbers too large for torch.float16; start both engines with the same" in caplog_vllm.text
