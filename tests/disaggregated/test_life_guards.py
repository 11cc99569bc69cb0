# SPDX-License-Identifier: Apache-2.0
"""What guards a transfer between two engines, and what it shows: policies, secret, checksums, metrics."""

import json
from collections.abc import Iterator
from typing import Any

import pytest
from disaggregated.fleet import MODEL, complete, metric, prefilled, text_of, wait_for
from disaggregated.pair import BLOCK_SIZE, SECRET, Pair, new_question, streaming
from servers import HOST, ServerFailed, free_port

from vllm_ascend.errors import PeerUnreachable
from vllm_ascend.kv_transfer.handshake import Channel
from vllm_ascend.kv_transfer.messages import AskForEngine, Engine, Release, Released
from vllm_ascend.kv_transfer.trust import OPEN, Trust, derive_keys


@pytest.fixture(autouse=True)
def _everything_is_given_back_and_the_next_request_works(pair: Pair) -> Iterator[None]:
    yield
    pair.check_that_it_works_and_holds_nothing()


def unknown_request(params: dict[str, Any]) -> dict[str, Any]:
    return params | {"remote_request_id": "released long ago"}


def nobody_there(params: dict[str, Any]) -> dict[str, Any]:
    return params | {"remote_host": HOST, "remote_port": free_port()}


LOST = [
    pytest.param(unknown_request, "refused", id="prefill has given the blocks away"),
    pytest.param(nobody_there, "unreachable", id="prefill is gone"),
]


def text_streamed(lines: Iterator[str]) -> tuple[str, str]:
    """The text of a streamed answer, and its error if it has one."""
    text, error = "", ""
    for line in lines:
        if line.startswith("data: {"):
            part = json.loads(line.removeprefix("data: "))
            if "error" in part:
                error += part["error"]["message"]
            else:
                text += part["choices"][0]["text"]
    return text, error


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("lose", "kind"), LOST)
def test_recompute_answers_right_without_the_load(pair: Pair, lose: Any, kind: str, stream: bool):
    failures = metric(pair.decode, "vllm:ascend_kv_failures_total", kind=kind)
    question = new_question(100)
    params = prefilled(pair.prefill, question)
    if stream:
        with streaming(pair.decode, question, kv_transfer_params=lose(params)) as lines:
            text, _ = text_streamed(lines)
    else:
        text = text_of(complete(pair.decode, question, kv_transfer_params=lose(params)))
    assert question.accepts(text)
    assert metric(pair.decode, "vllm:ascend_kv_failures_total", kind=kind) == failures + 1
    # The blocks are still held for somebody who comes with the right name.
    assert question.accepts(text_of(complete(pair.decode, question, kv_transfer_params=params)))


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("lose", "kind"), LOST)
def test_fail_is_a_clean_error(pair: Pair, lose: Any, kind: str, stream: bool):
    failures = metric(pair.prefill, "vllm:ascend_kv_failures_total", kind=kind)
    question = new_question(100)
    # The other way round: the engine that fails requests pulls.
    params = prefilled(pair.decode, question)
    if stream:
        with streaming(pair.prefill, question, kv_transfer_params=lose(params)) as lines:
            text, error = text_streamed(lines)
        assert (text, error) == ("", "Internal server error")
    else:
        with pytest.raises(ServerFailed, match="answered 500"):
            complete(pair.prefill, question, kv_transfer_params=lose(params))
    assert metric(pair.prefill, "vllm:ascend_kv_failures_total", kind=kind) == failures + 1
    assert question.accepts(text_of(complete(pair.prefill, question, kv_transfer_params=params)))


# Who is trusted


@pytest.mark.parametrize(
    "trust",
    [
        pytest.param(OPEN, id="no secret"),
        pytest.param(Trust(derive_keys(SECRET[::-1])), id="another secret"),
    ],
)
def test_a_stranger_learns_and_frees_nothing(pair: Pair, trust: Trust):
    question = new_question(100)
    params = prefilled(pair.prefill, question)
    release = Release(engine_id=params["remote_engine_id"], request_ids=(params["remote_request_id"],))
    stranger = Channel(params["remote_host"], params["remote_port"], timeout_s=0.5, trust=trust)
    try:
        for message in (AskForEngine(), release):
            with pytest.raises(PeerUnreachable, match="VLLM_ASCEND_KV_SECRET"):
                stranger.ask(message)
    finally:
        stranger.close()
    assert pair.held()["prefill"] == 7
    answer = complete(pair.decode, question, kv_transfer_params=params)
    assert question.accepts(text_of(answer))
    assert answer["kv_transfer_params"]["tokens"] == 99


def test_who_knows_the_secret_is_answered_and_hears_of_checksums(pair: Pair):
    params = prefilled(pair.prefill, new_question(100))
    friend = Channel(
        params["remote_host"], params["remote_port"], timeout_s=5, trust=Trust(derive_keys(SECRET))
    )
    try:
        engine = friend.ask(AskForEngine())
        assert isinstance(engine, Engine)
        assert (engine.engine_id, engine.verifies) == (params["remote_engine_id"], True)
        release = Release(engine_id=params["remote_engine_id"], request_ids=(params["remote_request_id"],))
        assert friend.ask(release) == Released()
    finally:
        friend.close()


# What is shown


def shown(pair: Pair) -> dict[str, float]:
    at_prefill = ("leases_granted_total", "leases_read_total", "leases_expired_total")
    at_decode = ("loads_total", "failed_total", "declined_total", "blocks_total", "bytes_total")
    at_decode += ("descriptors_total", "queue_seconds_count", "wire_seconds_count", "regroup_seconds_count")
    return {
        name: metric(server, f"vllm:ascend_kv_{name}")
        for server, names in ((pair.prefill, at_prefill), (pair.decode, at_decode))
        for name in names
    }


def test_metrics_move_by_what_was_moved(pair: Pair):
    before = shown(pair)
    questions = [new_question(100), new_question(33)]
    # 100 tokens are 7 blocks of 16, 33 are 3.
    held = [prefilled(pair.prefill, question) for question in questions]
    wait_for(pair.prefill, "vllm:ascend_kv_leases_held", 2)
    wait_for(pair.prefill, "vllm:ascend_kv_blocks_pinned", 10)
    for question, params in zip(questions, held, strict=True):
        complete(pair.decode, question, kv_transfer_params=params)
    wait_for(pair.prefill, "vllm:ascend_kv_leases_held", 0)
    wait_for(pair.prefill, "vllm:ascend_kv_blocks_pinned", 0)
    moved = {name: now - before[name] for name, now in shown(pair).items()}
    descriptors = moved.pop("descriptors_total")
    config = json.loads((MODEL / "config.json").read_text())
    # K and V of 4 KV heads in bf16; the last token of 33, alone in its block, is not pulled.
    block_bytes = 2 * BLOCK_SIZE * 4 * config["head_dim"] * 2 * config["num_hidden_layers"]
    assert moved == {
        "leases_granted_total": 2,
        "leases_read_total": 2,
        "leases_expired_total": 0,
        "loads_total": 2,
        "failed_total": 0,
        "declined_total": 0,
        "blocks_total": 7 + 2,
        "bytes_total": (7 + 2) * block_bytes,
        "queue_seconds_count": 2,
        "wire_seconds_count": 2,
        "regroup_seconds_count": 2,
    }
    # For each layer one, where all blocks are neighbours on both sides, and none for each block.
    assert 2 * config["num_hidden_layers"] <= descriptors <= 9 * config["num_hidden_layers"]
