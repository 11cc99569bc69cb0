# SPDX-License-Identifier: Apache-2.0
"""Full attention beside sliding windows: every group's bytes arrive, and of a window only what is still seen.

Groups share memory, and a block is in use by one of them. A prompt of 97 tokens lies in 7 blocks, of which
decode wants the tokens 0 to 95. Token 96, which it runs itself, sees from token 57 on with a window of 40: of
the groups with a window, positions 3, 4 and 5 of the block list. Left of that both engines hold vLLM's null
block, 0; position 6 holds the token that decode computes.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from connector.engines import (
    HEAD_SIZE,
    Engine,
    admit,
    engine_config,
    finish,
    model_folder,
    name_of,
    prefilled,
    reader_of,
    running,
)
from connector.topologies import Model
from vllm.config import VllmConfig
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole
from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.worker.utils import add_kv_sharing_layers_to_kv_cache_groups

from vllm_ascend.kv_transfer.connector import MooncakeConnector

HEADS, WINDOW = 4, 40
MODEL = Model(HEADS, windows=(None, WINDOW, WINDOW), group_of_layer=(0, 1, 2, 0, 1, 2))
SHARED = Model(HEADS, read_by_another=(0, 2))
PROMPT = 97
UNTOUCHED = 0x5A5A

REMOTE = ([17, 3, 4, 5, 22, 9, 23], [0, 0, 0, 12, 13, 7, 2], [0, 0, 0, 1, 6, 10, 11])
LOCAL = ([9, 10, 11, 2, 20, 21, 23], [0, 0, 0, 4, 5, 6, 7], [0, 0, 0, 8, 12, 13, 14])

numbers = itertools.count()


@pytest.fixture(
    scope="module",
    params=[
        pytest.param((1, 1), id="prefill TP 1, decode TP 1"),
        pytest.param((2, 1), id="prefill TP 2, decode TP 1: heads are regrouped"),
        pytest.param((1, 2), id="prefill TP 1, decode TP 2: row by row"),
    ],
)
def pair(request, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Engine, Engine]]:
    prefill_tp, decode_tp = request.param
    model = model_folder(Path(tmp_path_factory.mktemp("model")), HEADS)
    prefill = Engine(engine_config(model, prefill_tp, "kv_producer"), MODEL)
    decode = Engine(engine_config(model, decode_tp, "kv_consumer"), MODEL)
    with running(prefill, decode):
        yield prefill, decode


@pytest.fixture
def one_rank_each(tmp_path) -> Iterator[tuple[Engine, Engine]]:
    model = model_folder(tmp_path, HEADS)
    prefill = Engine(engine_config(model, 1, "kv_producer"), MODEL)
    decode = Engine(engine_config(model, 1, "kv_consumer"), MODEL)
    with running(prefill, decode):
        decode.pages(0).fill_(UNTOUCHED)
        yield prefill, decode


@pytest.mark.parametrize(
    ("cached", "pulled"),
    [
        pytest.param(
            0, {9: 17, 10: 3, 11: 4, 2: 5, 20: 22, 21: 9} | {4: 12, 5: 13, 6: 7, 8: 1, 12: 6, 13: 10}
        ),
        pytest.param(32, {11: 4, 2: 5, 20: 22, 21: 9} | {4: 12, 5: 13, 6: 7, 8: 1, 12: 6, 13: 10}),
        pytest.param(64, {20: 22, 21: 9} | {5: 13, 6: 7, 12: 6, 13: 10}),
    ],
    ids=["nothing cached", "a prefix hit before the window", "a prefix hit in the window"],
)
def test_bytes_of_every_group(pair, cached, pulled):
    """`pulled`: by local block, the prefill engine's block whose bytes it gets. No other byte changes."""
    prefill, decode = pair
    number = next(numbers)
    heads_of_decode = HEADS // decode.tp_size
    for rank in range(prefill.tp_size):
        prefill.pages(rank).random_()
    for rank in range(decode.tp_size):
        decode.pages(rank).fill_(UNTOUCHED)
    reference = torch.cat([prefill.pages(rank).cpu() for rank in range(prefill.tp_size)], dim=-2)

    params = prefilled(prefill, f"p{number}", PROMPT, REMOTE)
    wanted, num_external = admit(decode, f"d{number}", PROMPT, LOCAL, params, cached)
    assert num_external == PROMPT - 1 - cached
    output = decode.step_until(lambda output: bool(output.finished_recving))

    assert not output.failed_recving
    for rank in range(decode.tp_size):
        own = reference[..., rank * heads_of_decode : (rank + 1) * heads_of_decode, :]
        expected = torch.full_like(own, UNTOUCHED)
        expected[:, list(pulled)] = own[:, list(pulled.values())]
        assert torch.equal(decode.pages(rank).cpu(), expected), f"decode rank {rank}"
    transfer = finish(decode, wanted)
    assert transfer["blocks"] == len(pulled)
    assert transfer["sources"] == tuple(range(prefill.tp_size))
    freed = prefill.step_until(lambda output: bool(output.finished_sending))
    assert freed.finished_sending == {f"p{number}"}


@pytest.mark.parametrize("group", [0, 1, 2])
def test_a_block_that_cannot_be_read_fails_the_request_and_nothing_is_written(one_rank_each, group):
    prefill, decode = one_rank_each
    params = prefilled(prefill, "p", PROMPT, REMOTE)
    params["remote_block_ids"][group][5] = 24
    admit(decode, "d", PROMPT, LOCAL, params)
    output = decode.step_until(lambda output: bool(output.finished_recving))
    assert output.failed_recving == {"d"}
    assert (decode.pages(0) == UNTOUCHED).all()
    prefill.step_until(lambda output: output.finished_sending == {"p"})


def test_two_groups_are_never_read_into_one_block(one_rank_each, caplog_vllm):
    prefill, decode = one_rank_each
    params = prefilled(prefill, "p", PROMPT, REMOTE)
    full, *windowed = LOCAL
    admit(decode, "d", PROMPT, ([*full[:5], windowed[0][5], full[6]], *windowed), params)
    output = decode.step_until(lambda output: bool(output.finished_recving))
    assert output.failed_recving == {"d"}
    assert "two KV cache groups were to be read into the same blocks" in caplog_vllm.text
    assert (decode.pages(0) == UNTOUCHED).all()


@pytest.mark.parametrize(
    ("remote", "sentence"),
    [
        pytest.param(
            (REMOTE[0], [0, 0, 0, 0, 13, 7, 2], REMOTE[2]),
            "has given away blocks inside the sliding window; ask it for one token",
            id="the window has moved on",
        ),
        pytest.param(REMOTE[:1], "has 1 KV cache groups and this engine 3", id="one group"),
    ],
)
def test_blocks_of_no_use_are_released_and_the_prompt_computed_here(
    one_rank_each, caplog_vllm, remote, sentence
):
    prefill, decode = one_rank_each
    params = prefilled(prefill, "p", PROMPT, REMOTE)
    params["remote_block_ids"] = [list(blocks) for blocks in remote]
    _, num_external = admit(decode, "d", PROMPT, LOCAL, params)
    assert num_external == 0
    assert sentence in caplog_vllm.text
    prefill.step_until(lambda output: output.finished_sending == {"p"}, timeout_s=5)


def test_engines_with_different_windows_name_them(tmp_path, caplog_vllm):
    model = model_folder(tmp_path, HEADS)
    prefill = Engine(engine_config(model, 1, "kv_producer"), MODEL)
    decode = Engine(
        engine_config(model, 1, "kv_consumer"), dataclasses.replace(MODEL, windows=(None, 24, 24))
    )
    with running(prefill, decode):
        params = prefilled(prefill, "p", PROMPT, REMOTE)
        admit(decode, "d", PROMPT, LOCAL, params)
        output = decode.step_until(lambda output: bool(output.finished_recving))
        assert output.failed_recving == {"d"}
        assert "windows is (None, 40, 40) there and (None, 24, 24) here" in caplog_vllm.text


class ListingConnector(MooncakeConnector):
    """Is told of layers that read another one's cache as vLLM's model runner lists them, for itself."""

    def __init__(self, config: VllmConfig, role: KVConnectorRole, caches: KVCacheConfig) -> None:
        owners = [name for group in caches.kv_cache_groups for name in group.layer_names]
        readers = {reader_of(layer): name_of(layer) for layer in SHARED.read_by_another}
        if set(readers.values()) <= set(owners):
            add_kv_sharing_layers_to_kv_cache_groups(readers, caches.kv_cache_groups)
        super().__init__(config, role, caches)


@pytest.mark.parametrize(
    ("prefill_lists", "decode_lists"),
    [
        pytest.param(MooncakeConnector, MooncakeConnector, id="as vLLM tells connectors: not listed"),
        pytest.param(ListingConnector, ListingConnector, id="listed"),
        pytest.param(MooncakeConnector, ListingConnector, id="listed on one side"),
    ],
)
@pytest.mark.parametrize("prefill_tp", [1, 2])
def test_a_layer_that_reads_the_cache_of_another_has_nothing_to_move(
    tmp_path, prefill_tp, prefill_lists, decode_lists
):
    model = model_folder(tmp_path, HEADS)
    prefill = Engine(engine_config(model, prefill_tp, "kv_producer"), SHARED, connector=prefill_lists)
    decode = Engine(engine_config(model, 1, "kv_consumer"), SHARED, connector=decode_lists)
    with running(prefill, decode):
        for rank in range(prefill_tp):
            prefill.pages(rank).random_()
        decode.pages(0).fill_(UNTOUCHED)
        reference = torch.cat([prefill.pages(rank).cpu() for rank in range(prefill_tp)], dim=-2)
        wanted, _ = admit(decode, "d", 33, [9, 4, 5], prefilled(prefill, "p", 33, [17, 3, 8]))
        output = decode.step_until(lambda output: bool(output.finished_recving))
        assert not output.failed_recving
        expected = torch.full_like(reference, UNTOUCHED)
        expected[:, [9, 4]] = reference[:, [17, 3]]
        assert torch.equal(decode.pages(0).cpu(), expected)
        # Three layers have a cache: 32 tokens of K and V.
        assert finish(decode, wanted)["bytes"] == 3 * 32 * 2 * HEADS * HEAD_SIZE * 2
