# SPDX-License-Identifier: Apache-2.0
"""Recurrent state beside attention: when it is of use, what fits, and what is said of what does not.

Layer 0 is attention, layers 1 and 2 keep state. A prompt of 49 tokens lies in 4 blocks, of which decode wants
the tokens 0 to 47, in 3. The state after these is in the third block of its own list. What test_transfer.py
compares for all pairs is not compared here again.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from connector.engines import (
    NUM_BLOCKS,
    Blocks,
    Engine,
    admit,
    cache_config,
    engine_config,
    finish,
    model_folder,
    prefilled,
    request,
    running,
    state_bytes,
)
from connector.topologies import STATEFUL, Model
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.request import Request, RequestStatus

from vllm_ascend.kv_transfer.connector import MooncakeConnector
from vllm_ascend.kv_transfer.messages import prompt_digest

HEADS, PROMPT = 4, 49
REMOTE = ([17, 3, 4, 5], [0, 6, 7])
LOCAL = ([9, 10, 11, 2], [0, 0, 12])
UNTOUCHED = 0x5A
FOR_DECODE = {"do_remote_decode": True, "do_remote_prefill": False}

numbers = itertools.count()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_folder(Path(tmp_path_factory.mktemp("model")), HEADS)


@pytest.fixture(scope="module")
def pair(model) -> Iterator[tuple[Engine, Engine]]:
    prefill, decode = (
        Engine(engine_config(model, 2, role, {"verify": True}), STATEFUL)
        for role in ("kv_producer", "kv_consumer")
    )
    with running(prefill, decode):
        yield prefill, decode


def refused(
    prefill: Engine, decode: Engine, params: dict[str, Any], prompt: int = PROMPT, blocks: Blocks = LOCAL
) -> None:
    """Decode computes the prompt itself, and prefill lets go of its blocks."""
    _, num_external = admit(decode, f"d{next(numbers)}", prompt, blocks, params)
    assert num_external == 0
    freed = prefill.step_until(lambda output: bool(output.finished_sending))
    assert freed.finished_sending


def test_with_a_prefix_hit_the_state_moves_all_the_same(pair):
    prefill, decode = pair
    number = next(numbers)
    for rank in range(2):
        for engine in pair:
            engine.row(rank, 0).fill_(UNTOUCHED)
            engine.row(rank, 1).fill_(UNTOUCHED)
            engine.row(rank, 2).fill_(UNTOUCHED)
        for layer in (1, 2):
            prefill.state(rank, layer)[7] = 10 * rank + layer
        prefill.layer(rank, 0)[4] = 77
    params = prefilled(prefill, f"p{number}", PROMPT, REMOTE)
    prefill.step()
    wanted, num_external = admit(decode, f"d{number}", PROMPT, LOCAL, params, cached=32)
    assert num_external == 16
    output = decode.step_until(lambda output: bool(output.finished_recving))
    assert not output.failed_recving
    size = state_bytes(STATEFUL, 2)
    for rank in range(2):
        # Only the third block of attention, whose tokens no prefix hit covers, and the state.
        assert (decode.layer(rank, 0)[11] == 77).all()
        assert (decode.row(rank, 0)[[9, 10, 2]] == UNTOUCHED).all()
        for layer in (1, 2):
            assert (decode.state(rank, layer)[12] == 10 * rank + layer).all()
            assert (decode.row(rank, layer)[12, size:] == UNTOUCHED).all()
    assert finish(decode, wanted)["blocks"] == 2
    prefill.step_until(lambda output: output.finished_sending == {f"p{number}"})


def test_a_bit_of_a_state_that_flips_is_seen(pair, caplog_vllm):
    prefill, decode = pair
    number = next(numbers)
    params = prefilled(prefill, f"p{number}", PROMPT, REMOTE)
    prefill.step()
    prefill.state(1, 2)[7, -1] ^= 1
    admit(decode, f"d{number}", PROMPT, LOCAL, params)
    output = decode.step_until(lambda output: bool(output.finished_recving))
    assert output.failed_recving == {f"d{number}"}
    assert "its recurrent state is not what the prefill engine computed, in layer model.layers.2." in (
        caplog_vllm.text
    )
    prefill.step_until(lambda output: bool(output.finished_sending))


def hashed(num_tokens: int, **sampling: Any) -> Request:
    init_none_hash(sha256)
    return Request(
        request_id=f"r{next(numbers)}",
        prompt_token_ids=list(range(num_tokens)),
        sampling_params=SamplingParams(
            max_tokens=1, extra_args={"kv_transfer_params": FOR_DECODE}, **sampling
        ),
        pooling_params=None,
        block_hasher=get_request_block_hasher(16, sha256),
    )


@pytest.mark.parametrize("num_tokens", [2, 16, 17, 48, 49])
def test_prefill_is_given_the_prompt_without_its_last_token(pair, num_tokens):
    prefill, _ = pair
    given, shorter = hashed(num_tokens), hashed(num_tokens - 1)
    of_client = given.prompt_token_ids
    prefill.scheduler.on_new_request(given)
    assert given.prompt_token_ids == list(given.all_token_ids) == list(range(num_tokens - 1))
    assert given.num_prompt_tokens == given.num_tokens == num_tokens - 1
    assert given.block_hashes == shorter.block_hashes
    assert of_client == list(range(num_tokens)), "the output processor may hold it"
    given.append_output_token_ids(63)
    assert len(given.block_hashes) == num_tokens // 16


@pytest.mark.parametrize(
    "given",
    [
        pytest.param(partial(hashed, 1), id="a prompt of one token: nothing is pulled"),
        pytest.param(partial(hashed, 20, prompt_logprobs=1), id="its logprobs are wanted, here and there"),
        pytest.param(partial(request, "r", 20, {}), id="no other engine reads it"),
    ],
)
def test_other_prompts_stay_whole(pair, given):
    prefill, _ = pair
    asked = given()
    num_tokens = asked.num_prompt_tokens
    prefill.scheduler.on_new_request(asked)
    assert asked.num_prompt_tokens == asked.num_tokens == num_tokens


def test_without_recurrent_state_a_prompt_stays_whole(model):
    config = engine_config(model, 1, "kv_producer")
    plain = MooncakeConnector(config, KVConnectorRole.SCHEDULER, cache_config(Model(HEADS), 1))
    asked = hashed(20)
    plain.on_new_request(asked)
    plain.shutdown()
    assert asked.num_prompt_tokens == 20


def test_a_prompt_of_one_token_has_nothing_to_move(pair, caplog_vllm):
    prefill, decode = pair
    params = prefilled(prefill, f"p{next(numbers)}", 1, ([17], [7]))
    refused(prefill, decode, params, prompt=1, blocks=([9], [12]))
    assert "is computed here" not in caplog_vllm.text


def test_a_state_that_has_gone_on_is_not_read(pair, caplog_vllm):
    prefill, decode = pair
    done = request(f"p{next(numbers)}", PROMPT, FOR_DECODE)
    prefill.scheduler.on_new_request(done)
    done.num_computed_tokens = PROMPT + 3
    done.status = RequestStatus.FINISHED_LENGTH_CAPPED
    held, params = prefill.scheduler.request_finished_all_groups(done, REMOTE)
    assert held
    assert params["remote_block_ids"] == [REMOTE[0], [0]]
    refused(prefill, decode, params)
    assert "has gone on behind the prompt; ask it for one token (max_tokens 1)" in caplog_vllm.text


@pytest.mark.parametrize("prompt", [PROMPT - 1, PROMPT + 1])
def test_the_state_of_another_prompt_is_not_read(pair, caplog_vllm, prompt):
    prefill, decode = pair
    refused(prefill, decode, prefilled(prefill, f"p{next(numbers)}", PROMPT, REMOTE), prompt)
    assert f"after 48 tokens and this engine needs the one after {prompt - 1}; send both" in caplog_vllm.text


@pytest.mark.parametrize(("prefill_tp", "decode_tp"), [(2, 1), (1, 2), (4, 2)])
def test_unequal_sizes_are_refused_when_engines_meet(model, caplog_vllm, prefill_tp, decode_tp):
    prefill = Engine(engine_config(model, prefill_tp, "kv_producer"), STATEFUL)
    decode = Engine(engine_config(model, decode_tp, "kv_consumer"), STATEFUL)
    with running(prefill, decode):
        for rank in range(decode_tp):
            decode.row(rank, 0).fill_(UNTOUCHED)
        admit(decode, "d", PROMPT, LOCAL, prefilled(prefill, "p", PROMPT, REMOTE))
        output = decode.step_until(lambda output: bool(output.finished_recving))
        assert output.failed_recving == {"d"}
        prefill.step_until(lambda output: output.finished_sending == {"p"})
        assert all((decode.row(rank, 0) == UNTOUCHED).all() for rank in range(decode_tp))
    assert "layer model.layers.1.self_attn.attn keeps recurrent state, which tensor parallel cuts into" in (
        caplog_vllm.text
    )
    assert f"into {prefill_tp} parts in prefill engine" in caplog_vllm.text
    assert (
        f"and into {decode_tp} in this one, and no part can be made of others; start both with the same "
        f"--tensor-parallel-size"
    ) in caplog_vllm.text


@pytest.mark.parametrize(
    ("of_prefill", "sentence"),
    [
        pytest.param(
            dataclasses.replace(STATEFUL, state_heads=4),
            "shapes is ((3, 24), (4, 4, 4)) there and ((3, 24), (8, 4, 4)) here in layer model.layers.1.",
            id="other shapes",
        ),
        pytest.param(
            dataclasses.replace(STATEFUL, state_groups=()),
            "what is kept is 'tokens' there and 'state' here in layer model.layers.1.",
            id="tokens there",
        ),
    ],
)
def test_layers_that_differ_are_named(model, caplog_vllm, of_prefill, sentence):
    prefill = Engine(engine_config(model, 1, "kv_producer"), of_prefill)
    decode = Engine(engine_config(model, 1, "kv_consumer"), STATEFUL)
    with running(prefill, decode):
        params = prefilled(prefill, "p", PROMPT, REMOTE)
        params |= {
            "remote_block_ids": [REMOTE[0], [7]],
            "remote_num_tokens": PROMPT - 1,
            "remote_prompt_digest": prompt_digest(list(range(PROMPT - 1))),
        }
        admit(decode, "d", PROMPT, LOCAL, params)
        output = decode.step_until(lambda output: bool(output.finished_recving))
    assert output.failed_recving == {"d"}
    assert sentence in caplog_vllm.text


def test_a_block_outside_the_cache_is_not_read(pair, caplog_vllm):
    prefill, decode = pair
    number = next(numbers)
    params = prefilled(prefill, f"p{number}", PROMPT, REMOTE)
    params["remote_block_ids"][1] = [NUM_BLOCKS]
    decode.row(0, 1).fill_(UNTOUCHED)
    admit(decode, f"d{number}", PROMPT, LOCAL, params)
    output = decode.step_until(lambda output: bool(output.finished_recving))
    assert output.failed_recving == {f"d{number}"}
    assert (decode.row(0, 1) == UNTOUCHED).all()
    prefill.step_until(lambda output: bool(output.finished_sending))
