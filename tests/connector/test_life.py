# SPDX-License-Identifier: Apache-2.0
"""What becomes of a request's blocks on both sides, whatever way it takes and whoever dies on it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from connector.engines import (
    BLOCK_SIZE,
    NUM_BLOCKS,
    PEER_TIMEOUT_S,
    Engine,
    admit,
    engine_config,
    finish,
    finished,
    model_folder,
    prefilled,
    request,
    running,
)
from connector.footprint import footprint, grown_since
from vllm.lora.request import LoRARequest
from vllm.multimodal.inputs import MultiModalFeatureSpec, PlaceholderRange
from vllm.v1.request import Request, RequestStatus

from vllm_ascend.kv_transfer.handshake import Channel
from vllm_ascend.kv_transfer.messages import Done, DoneNoted, Release, Released

HEADS = 4
LEASE_S = 2.0


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Engine, Engine]]:
    """Everything that the tests do together leaves nothing behind."""
    model = model_folder(Path(tmp_path_factory.mktemp("model")), HEADS)

    def start() -> tuple[Engine, Engine]:
        prefill = Engine(engine_config(model, 2, "kv_producer", {"lease_s": LEASE_S}), HEADS)
        return prefill, Engine(engine_config(model, 1, "kv_consumer"), HEADS)

    # What a process takes once and for all, it takes for the first load.
    first = start()
    with running(*first):
        load(*first, "first")
    before = footprint()
    engines = start()
    with running(*engines):
        yield engines
        assert [engine.holds() for engine in engines] == [False, False]
    assert grown_since(before) == {}


def load(prefill: Engine, decode: Engine, name: str) -> None:
    """One request from prefill to its end at decode."""
    wanted, _ = admit(decode, name, 20, [1, 2], prefilled(prefill, f"{name} there", 20, [1, 2]))
    decode.step_until(lambda output: output.finished_recving == {name})
    assert finish(decode, wanted) is not None
    assert freed_of(prefill) == {f"{name} there"}


def freed_of(prefill: Engine, timeout_s: float = 0.5 * LEASE_S) -> set[str]:
    """What prefill frees next, by default well before a lease could end."""
    return prefill.step_until(lambda output: bool(output.finished_sending), timeout_s).finished_sending


def test_a_prefix_hit_pulls_only_what_is_missing(engines):
    prefill, decode = engines
    prefill.pages(0).random_()
    prefill.pages(1).random_()
    decode.pages(0).fill_(7)
    params = prefilled(prefill, "p", 4 * BLOCK_SIZE, [1, 2, 3, 4])
    wanted, num_external = admit(decode, "d", 4 * BLOCK_SIZE, [11, 12, 13, 14], params, cached=2 * BLOCK_SIZE)
    assert num_external == 2 * BLOCK_SIZE - 1
    decode.step_until(lambda output: output.finished_recving == {"d"})
    pages = decode.pages(0).cpu()
    assert (pages[:, [11, 12]] == 7).all()
    assert torch.equal(pages[:, [13, 14], ..., :2, :], prefill.pages(0).cpu()[:, [3, 4]])
    assert torch.equal(pages[:, [13, 14], ..., 2:, :], prefill.pages(1).cpu()[:, [3, 4]])
    assert freed_of(prefill) == {"p"}
    assert finish(decode, wanted)["blocks"] == 2


@pytest.mark.parametrize(
    ("num_tokens", "cached"),
    [
        pytest.param(2 * BLOCK_SIZE + 1, 2 * BLOCK_SIZE, id="all but the last token is cached"),
        pytest.param(1, 0, id="a prompt of one token"),
    ],
)
def test_a_full_hit_pulls_nothing_and_prefill_frees_at_once(engines, num_tokens, cached):
    prefill, decode = engines
    params = prefilled(prefill, "p", num_tokens, [1, 2, 3])
    wanted, num_external = admit(decode, "d", num_tokens, [1, 2, 3], params, cached)
    assert num_external == 0
    assert not decode.step().finished_recving
    assert freed_of(prefill) == {"p"}
    numbers = finish(decode, wanted)
    assert (numbers["tokens"], numbers["blocks"], numbers["bytes"]) == (0, 0, 0)


def test_a_request_that_ends_before_it_is_scheduled_frees_prefill_at_once(engines):
    prefill, decode = engines
    params = prefilled(prefill, "p", 20, [1, 2])
    wanted = request("d", 20, params)
    decode.scheduler.on_new_request(wanted)
    assert finish(decode, wanted) is None
    assert freed_of(prefill) == {"p"}


def test_a_request_that_ends_while_it_is_read_is_still_reported_and_freed(engines):
    prefill, decode = engines
    params = prefilled(prefill, "p", 20, [1, 2])
    wanted, _ = admit(decode, "d", 20, [1, 2], params)
    assert finish(decode, wanted) is None
    decode.step_until(lambda output: output.finished_recving == {"d"})
    assert freed_of(prefill) == {"p"}


def test_a_request_that_is_aborted_while_it_prefills_holds_nothing(engines):
    prefill, _ = engines
    aborted = request("p", 20, {"do_remote_decode": True, "do_remote_prefill": False})
    aborted.status = RequestStatus.FINISHED_ABORTED
    assert prefill.scheduler.request_finished_all_groups(aborted, ([1, 2],)) == (False, None)


def test_a_prompt_whose_first_token_ends_the_answer_is_handed_over_like_another(engines):
    prefill, decode = engines
    stopped = request("p", 20, {"do_remote_decode": True, "do_remote_prefill": False})
    stopped.num_computed_tokens = 20
    stopped.status = RequestStatus.FINISHED_STOPPED
    held, params = prefill.scheduler.request_finished_all_groups(stopped, ([1, 2],))
    assert held
    wanted, num_external = admit(decode, "d", 20, [1, 2], params)
    assert num_external == 19
    decode.step_until(lambda output: output.finished_recving == {"d"})
    assert finish(decode, wanted)["tokens"] == 19
    assert freed_of(prefill) == {"p"}


def test_decode_keeps_a_waiting_request_beyond_its_first_lease(engines):
    prefill, decode = engines
    params = prefilled(prefill, "p", 20, [1, 2])
    wanted = request("d", 20, params)
    decode.scheduler.on_new_request(wanted)
    with pytest.raises(AssertionError, match="nothing of the kind"):
        freed_of(prefill, timeout_s=2 * LEASE_S)
    finish(decode, wanted)
    assert freed_of(prefill) == {"p"}


def test_a_lease_that_nobody_renews_ends(engines):
    prefill, _ = engines
    prefilled(prefill, "p", 20, [1, 2])
    assert freed_of(prefill, timeout_s=2 * LEASE_S) == {"p"}


def test_what_was_read_after_the_lease_ended_is_a_failed_load(engines):
    prefill, decode = engines
    params = prefilled(prefill, "p", 20, [1, 2])
    assert freed_of(prefill, timeout_s=2 * LEASE_S) == {"p"}
    wanted, _ = admit(decode, "d", 20, [1, 2], params)
    output = decode.step_until(lambda output: bool(output.finished_recving))
    assert (output.finished_recving, output.failed_recving) == ({"d"}, {"d"})
    assert finish(decode, wanted) is None


def asked(decode: Engine, wanted: Request, cached: int = 0) -> int | None:
    """What vLLM is told of a request that it wants to schedule."""
    tokens: int | None = decode.scheduler.get_num_new_matched_tokens(wanted, cached)[0]
    return tokens


def test_an_answer_that_a_router_uses_twice_is_read_once(engines):
    prefill, decode = engines
    params = prefilled(prefill, "p", 20, [1, 2])
    admit(decode, "d1", 20, [1, 2], params)
    output = decode.step_until(lambda output: bool(output.finished_recving))
    assert (output.finished_recving, output.failed_recving) == ({"d1"}, set())
    assert freed_of(prefill) == {"p"}
    again, num_external = admit(decode, "d2", 20, [1, 2], params)
    assert num_external == 0
    assert finish(decode, again)["tokens"] == 0


def test_of_requests_that_bring_one_answer_the_first_pulls_and_the_others_wait(engines):
    prefill, decode = engines
    params = prefilled(prefill, "p", 20, [1, 2])
    others = [request(f"{index}_d", 20, params) for index in (1, 2)]
    for other in others:
        decode.scheduler.on_new_request(other)
    admit(decode, "0_d", 20, [1, 2], params)
    assert [asked(decode, other) for other in others] == [None, None]
    # Not even the end of one of them gives away what is being read.
    finish(decode, others[1])
    output = decode.step_until(lambda output: bool(output.finished_recving))
    assert (output.finished_recving, output.failed_recving) == ({"0_d"}, set())
    assert asked(decode, others[0], cached=BLOCK_SIZE) == 0
    assert freed_of(prefill) == {"p"}
    finish(decode, others[0])


def test_of_requests_that_bring_one_answer_the_last_gives_it_away(engines):
    prefill, decode = engines
    # A name of its own: what an earlier test released may be on its way yet.
    params = prefilled(prefill, "brought twice", 20, [1, 2])
    wanted = [request(f"{index}_d", 20, params) for index in range(2)]
    for one in wanted:
        decode.scheduler.on_new_request(one)
    finish(decode, wanted[0])
    with pytest.raises(AssertionError, match="nothing of the kind"):
        freed_of(prefill)
    finish(decode, wanted[1])
    assert freed_of(prefill) == {"brought twice"}


def test_another_prompt_does_not_get_the_kv(engines, caplog_vllm):
    prefill, decode = engines
    params = prefilled(prefill, "p", 20, [1, 2])
    another = request("d", 20, params)
    another.prompt_token_ids[7] += 1
    decode.scheduler.on_new_request(another)
    assert asked(decode, another) == 0
    assert "computed another prompt; send it one prompt per request" in caplog_vllm.text
    assert freed_of(prefill) == {"p"}


def picture(identifier: str, offset: int) -> MultiModalFeatureSpec:
    """Of four tokens from `offset` on."""
    return MultiModalFeatureSpec(None, "image", identifier, PlaceholderRange(offset, 4))


@pytest.mark.parametrize(
    ("pictures", "adapter", "num_external"),
    [
        pytest.param([("of a cat", 2)], "poems", 19, id="the same"),
        pytest.param([("of a dog", 2)], "poems", 0, id="another picture"),
        pytest.param([("of a cat", 3)], "poems", 0, id="the picture elsewhere"),
        pytest.param([], "poems", 0, id="no picture"),
        pytest.param([("of a cat", 2)], "prose", 0, id="another adapter"),
        pytest.param([("of a cat", 2)], None, 0, id="no adapter"),
    ],
)
def test_what_lies_behind_the_same_tokens_must_be_the_same(engines, pictures, adapter, num_external):
    prefill, decode = engines

    def bring(params: dict[str, Any], pictures: list[tuple[str, int]], adapter: str | None) -> Request:
        brings = request("r", 20, params)
        brings.mm_features = [picture(*one) for one in pictures]
        brings.lora_request = adapter and LoRARequest(adapter, 1, "unused")
        return brings

    done = bring({"do_remote_decode": True}, [("of a cat", 2)], "poems")
    params = finished(prefill, done, [1, 2])
    wanted = bring(params, pictures, adapter)
    decode.scheduler.on_new_request(wanted)
    assert asked(decode, wanted) == num_external
    if num_external:
        finish(decode, wanted)
    assert freed_of(prefill) == {"r"}


def test_a_prompt_that_goes_on_gets_the_kv_of_its_beginning(engines):
    prefill, decode = engines
    params = prefilled(prefill, "p", 20, [1, 2])
    wanted, num_external = admit(decode, "d", 40, [1, 2, 3], params)
    assert num_external == 20
    decode.step_until(lambda output: output.finished_recving == {"d"})
    assert freed_of(prefill) == {"p"}
    finish(decode, wanted)


def test_double_and_late_and_foreign_words_are_harmless(engines):
    prefill, _ = engines
    params = prefilled(prefill, "p", 20, [1, 2])
    channel = Channel(params["remote_host"], params["remote_port"], timeout_s=1)
    done = Done(engine_id=params["remote_engine_id"], request_id="p", reader="decode/0", num_readers=1)
    stranger = Done(engine_id=params["remote_engine_id"], request_id="x", reader="decode/0", num_readers=1)
    assert channel.ask(stranger) == DoneNoted(held=False)
    assert channel.ask(Release(engine_id=params["remote_engine_id"], request_ids=("x",))) == Released()
    assert [channel.ask(done), channel.ask(done)] == [DoneNoted(held=True)] * 2
    assert freed_of(prefill) == {"p"}
    assert channel.ask(done) == DoneNoted(held=True)
    assert not prefill.step().finished_sending
    channel.close()


def test_requests_at_the_same_time_do_not_mix(engines):
    prefill, decode = engines
    prefill.pages(0).random_()
    prefill.pages(1).random_()
    # Block 0 is vLLM's null block, which no request gets.
    remote = (1 + torch.randperm(NUM_BLOCKS - 1)[:21]).tolist()
    local = (1 + torch.randperm(NUM_BLOCKS - 1)[:21]).tolist()
    ids = [f"{i}" for i in range(7)]
    parts = {request_id: slice(3 * i, 3 * i + 3) for i, request_id in enumerate(ids)}
    for request_id, part in parts.items():
        params = prefilled(prefill, f"p{request_id}", 3 * BLOCK_SIZE, remote[part])
        admit(decode, request_id, 3 * BLOCK_SIZE, local[part], params)
    finished: set[str] = set()
    decode.step_until(lambda output: finished.update(output.finished_recving or ()) or finished == set(ids))
    assert torch.equal(decode.pages(0).cpu()[:, local, ..., :2, :], prefill.pages(0).cpu()[:, remote])
    assert torch.equal(decode.pages(0).cpu()[:, local, ..., 2:, :], prefill.pages(1).cpu()[:, remote])
    freed: set[str] = set()
    prefill.step_until(lambda output: freed.update(output.finished_sending or ()) or len(freed) == 7)


@pytest.mark.parametrize(
    "change",
    [
        pytest.param({"remote_block_ids": [["one"]]}, id="block ids that are no numbers"),
        pytest.param({"remote_port": "80"}, id="a port as text"),
        pytest.param({"remote_host": "a b"}, id="a host with a space"),
        pytest.param({"remote_num_tokens": None}, id="no number of tokens"),
        pytest.param({"remote_lease_s": -1}, id="a lease that has ended"),
    ],
)
def test_parameters_of_no_use_are_computed_locally(engines, change):
    prefill, decode = engines
    params = prefilled(prefill, "p", 20, [1, 2])
    wanted, num_external = admit(decode, "d", 20, [1, 2], {**params, **change})
    assert num_external == 0
    assert finish(decode, wanted) is None
    assert freed_of(prefill, timeout_s=2 * LEASE_S) == {"p"}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        pytest.param({"remote_block_ids": [[1, NUM_BLOCKS]]}, "asked of prefill rank", id="block too high"),
        pytest.param({"remote_port": 9}, f"did not answer within {PEER_TIMEOUT_S} s", id="nobody listens"),
        pytest.param({"remote_host": "0:0:0"}, "start it, or set", id="an address that is none"),
        pytest.param({"remote_engine_id": "older"}, "which replaced older", id="another engine listens"),
        pytest.param({"remote_request_id": "older"}, "ended before the read did", id="an unknown request"),
    ],
)
def test_what_cannot_be_read_is_a_failed_load_with_its_reason(engines, change, reason, caplog_vllm):
    prefill, decode = engines
    params = prefilled(prefill, "p", 20, [1, 2])
    admit(decode, "d", 20, [1, 2], {**params, **change})
    output = decode.step_until(lambda output: bool(output.finished_recving))
    assert (output.finished_recving, output.failed_recving) == ({"d"}, {"d"})
    assert reason in caplog_vllm.text
    assert freed_of(prefill, timeout_s=2 * LEASE_S) == {"p"}


def test_descriptors_and_threads_do_not_grow_with_requests(engines):
    prefill, decode = engines

    def one_of_every_kind(turn: int) -> None:
        load(prefill, decode, f"loaded {turn}")
        for name, change in (
            ("unread", {"remote_block_ids": [[1, NUM_BLOCKS]]}),
            ("gone", {"remote_port": 9}),
        ):
            params = prefilled(prefill, f"{name} {turn} there", 20, [1, 2])
            admit(decode, f"{name} {turn}", 20, [1, 2], {**params, **change})
            output = decode.step_until(lambda output: bool(output.finished_recving))
            assert output.failed_recving == {f"{name} {turn}"}
            assert freed_of(prefill, 2 * LEASE_S) == {f"{name} {turn} there"}
        left = request(f"left {turn}", 20, prefilled(prefill, f"left {turn} there", 20, [1, 2]))
        decode.scheduler.on_new_request(left)
        finish(decode, left)
        assert freed_of(prefill) == {f"left {turn} there"}

    # Until each of the reader's threads has had its turn, and has a line of its own to each peer.
    for turn in range(3):
        one_of_every_kind(turn)
    before = footprint()
    for turn in range(3, 6):
        one_of_every_kind(turn)
    assert grown_since(before) == {}
    assert not prefill.holds()
    assert not decode.holds()
