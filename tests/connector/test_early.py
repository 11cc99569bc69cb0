# SPDX-License-Identifier: Apache-2.0
"""Prompts that are read while they are computed: in parts, under a router's name, and never wrong.

The prefill engine is driven as vLLM's scheduler drives one with chunked prefill. What its blocks hold changes
whenever a step computes into them, so that whatever is read too early differs from what is there in the end.
"""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from connector.engines import (
    BLOCK_SIZE,
    PEER_TIMEOUT_S,
    Engine,
    admit,
    engine_config,
    finish,
    model_folder,
    prefilled,
    request,
    running,
)
from connector.faults import FaultyConnector, FaultyTransport, Read
from connector.growing import Prompt, admit_when_ready, allocate_when_ready, early_params, kv_of, overwrite
from connector.topologies import Model

from vllm_ascend.errors import ReadFailed, ReadUnsettled
from vllm_ascend.kv_transfer.transport import Copies, Session

HEADS = 4
LEASE_S = 2.0
TOKENS = 5 * BLOCK_SIZE
USEFUL = TOKENS - 1
"""The last prompt token is decode's to compute."""
THERE, HERE, ELSEWHERE = [3, 4, 9, 2, 7], [6, 1, 2, 8, 5], [12, 11, 15, 16, 13]


class Side:
    """A prefill and a decode engine, and what a router knows of the first."""

    def __init__(self, prefill: Engine, decode: Engine, transports: list[FaultyTransport]) -> None:
        self.prefill, self.decode, self.transports = prefill, decode, transports
        blocks = ([1, 2], [3, 4])[: len(prefill.model.windows)]
        self.learned = prefilled(prefill, "learned", 20, blocks)
        prefill.step()
        wanted, _ = admit(decode, "learned", 20, blocks, self.learned)
        decode.step_until(lambda output: output.finished_recving == {"learned"})
        finish(decode, wanted)
        self.wait_until_freed("learned")

    def prompt(self, num_tokens: int = TOKENS) -> Prompt:
        return Prompt(self.prefill, num_tokens, THERE)

    def params(self, prompt: Prompt) -> dict[str, Any]:
        return early_params(self.learned, prompt.name)

    def wait_until_same(self, num_tokens: int, there: list[int] = THERE) -> None:
        """Step decode until it has the KV of the first `num_tokens`; no load ends meanwhile."""

        def same(output: Any) -> bool:
            assert not output.finished_recving
            return self.is_same(num_tokens, there)

        self.decode.step_until(same, timeout_s=5)

    def is_same(self, num_tokens: int, there: list[int] = THERE) -> bool:
        ours, theirs = self.here(num_tokens), kv_of(self.prefill, there, num_tokens)
        return torch.equal(ours, theirs.view(torch.bfloat16).to(ours.dtype))

    def here(self, num_tokens: int) -> torch.Tensor:
        """What decode has of the prompt, in its own element type."""
        return kv_of(self.decode, HERE, num_tokens).view(getattr(torch, self.decode.model.dtype))

    def wait_for_load(self, request_id: str) -> bool:
        """Whether the load of the request was good, when vLLM hears of it."""
        output = self.decode.step_until(lambda output: bool(output.finished_recving))
        assert output.finished_recving == {request_id}
        return not output.failed_recving

    def wait_until_freed(self, request_id: str, timeout_s: float = 0.5 * LEASE_S) -> None:
        """By default well before a lease could end."""
        self.prefill.step_until(lambda output: output.finished_sending == {request_id}, timeout_s)

    def check_nothing_is_held(self) -> None:
        assert [self.prefill.holds(), self.decode.holds()] == [False, False]


def start(
    folder: Path,
    prefill_tp: int,
    decode_tp: int,
    model: Model,
    verify: bool = False,
    block_size: int = BLOCK_SIZE,
    dtype: str = "bfloat16",
    head_major: tuple[bool, bool] = (False, False),
) -> Side:
    """`block_size` and `dtype` are those of decode; `head_major`: prefill's pages, and decode's."""
    config = model_folder(folder, HEADS)
    extra = {"lease_s": LEASE_S, "verify": verify}
    there = engine_config(config, prefill_tp, "kv_producer", extra, head_major=head_major[0])
    prefill = Engine(there, model)
    FaultyConnector.transports.clear()
    here = engine_config(
        config, decode_tp, "kv_consumer", extra, block_size=block_size, head_major=head_major[1]
    )
    decode = Engine(here, dataclasses.replace(model, dtype=dtype), connector=FaultyConnector)
    return Side(prefill, decode, list(FaultyConnector.transports))


@pytest.fixture(scope="module")
def side(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Side]:
    """Two ranks' heads are regrouped at one."""
    side = start(tmp_path_factory.mktemp("model"), 2, 1, Model(HEADS))
    with running(side.prefill, side.decode):
        yield side
        side.check_nothing_is_held()


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Side]:
    """Two ranks at decode, with larger blocks and another element type."""
    folder = tmp_path_factory.mktemp("model")
    side = start(folder, 1, 2, Model(HEADS), block_size=2 * BLOCK_SIZE, dtype="float16")
    with running(side.prefill, side.decode):
        yield side
        side.check_nothing_is_held()


def test_parts_are_there_before_the_prompt_is(side):
    prompt = side.prompt()
    prompt.compute(2 * BLOCK_SIZE)
    wanted, num_external = admit_when_ready(side.decode, "d", TOKENS, HERE, side.params(prompt))
    assert num_external == USEFUL
    side.wait_until_same(2 * BLOCK_SIZE)
    # Of these only two blocks are whole.
    prompt.compute(2 * BLOCK_SIZE + 3)
    side.wait_until_same(4 * BLOCK_SIZE)
    prompt.finish()
    assert side.wait_for_load("d")
    assert side.is_same(USEFUL)
    side.wait_until_freed(prompt.request_id)
    numbers = finish(side.decode, wanted)
    assert (numbers["tokens"], numbers["blocks"], numbers["parts"]) == (USEFUL, 5, 3)


def test_a_block_is_read_once_it_is_whole_on_both_sides(wide):
    prompt = wide.prompt()
    prompt.compute(2 * BLOCK_SIZE)
    wanted, _ = admit_when_ready(wide.decode, "d", TOKENS, HERE[:3], wide.params(prompt))
    wide.wait_until_same(2 * BLOCK_SIZE)
    prompt.compute(BLOCK_SIZE)
    prompt.compute(BLOCK_SIZE)
    wide.wait_until_same(4 * BLOCK_SIZE)
    prompt.finish()
    assert wide.wait_for_load("d")
    assert wide.is_same(USEFUL)
    wide.wait_until_freed(prompt.request_id)
    assert finish(wide.decode, wanted)["parts"] == 3


@pytest.mark.parametrize("computed", [0, BLOCK_SIZE - 1])
def test_decode_gives_no_blocks_before_there_is_something_to_read(side, computed):
    prompt = side.prompt()
    if computed:
        prompt.compute(computed)
    wanted = request("d", TOKENS, side.params(prompt))
    side.decode.scheduler.on_new_request(wanted)
    assert asked_for_a_while(side, wanted) == {None}
    prompt.finish()
    assert allocate_when_ready(side.decode, wanted, HERE) == USEFUL
    assert side.wait_for_load("d")
    assert side.is_same(USEFUL)
    side.wait_until_freed(prompt.request_id)
    assert finish(side.decode, wanted)["parts"] == 1


def asked_for_a_while(side: Side, wanted: Any, cached: int = 0) -> set[int | None]:
    """What vLLM is told about the request, over several times that prefill is asked how far it is."""
    told = set()
    end_s = time.monotonic() + 0.1
    while time.monotonic() < end_s:
        side.decode.step()
        told.add(side.decode.scheduler.get_num_new_matched_tokens(wanted, cached)[0])
    return told


def test_what_a_step_computes_is_not_there_before_its_output_is(side):
    prompt = side.prompt()
    prompt.schedule(2 * BLOCK_SIZE)
    prompt.schedule(BLOCK_SIZE)
    wanted = request("d", TOKENS, side.params(prompt))
    side.decode.scheduler.on_new_request(wanted)
    assert asked_for_a_while(side, wanted) == {None}
    # Now the first step has written, and the second has not.
    overwrite(side.prefill, THERE[:2])
    prompt.process(2 * BLOCK_SIZE)
    assert allocate_when_ready(side.decode, wanted, HERE) == USEFUL
    side.wait_until_same(2 * BLOCK_SIZE)
    overwrite(side.prefill, THERE[2:3])
    prompt.process(BLOCK_SIZE)
    prompt.finish()
    assert side.wait_for_load("d")
    assert side.is_same(USEFUL)
    side.wait_until_freed(prompt.request_id)
    finish(side.decode, wanted)


def test_a_prefix_hit_pulls_only_what_is_missing(side):
    prompt = side.prompt()
    prompt.compute(2 * BLOCK_SIZE)
    wanted = request("d", TOKENS, side.params(prompt))
    side.decode.scheduler.on_new_request(wanted)
    assert asked_for_a_while(side, wanted, cached=2 * BLOCK_SIZE) == {None}
    prompt.compute(BLOCK_SIZE)
    assert allocate_when_ready(side.decode, wanted, HERE, cached=2 * BLOCK_SIZE) == USEFUL - 2 * BLOCK_SIZE
    prompt.finish()
    assert side.wait_for_load("d")
    theirs, ours = kv_of(side.prefill, THERE, USEFUL), kv_of(side.decode, HERE, USEFUL)
    assert torch.equal(theirs[:, 2 * BLOCK_SIZE :], ours[:, 2 * BLOCK_SIZE :])
    side.wait_until_freed(prompt.request_id)
    assert finish(side.decode, wanted)["blocks"] == 3


def test_a_full_prefix_hit_frees_prefill_at_once(side):
    prompt = Prompt(side.prefill, 2 * BLOCK_SIZE + 1, THERE)
    wanted, num_external = admit_when_ready(
        side.decode, "d", 2 * BLOCK_SIZE + 1, HERE, side.params(prompt), cached=2 * BLOCK_SIZE
    )
    assert num_external == 0
    assert finish(side.decode, wanted)["parts"] == 0
    wait_for_follower(side)
    prompt.finish()
    side.wait_until_freed(prompt.request_id)


def wait_for_follower(side: Side) -> None:
    """What was said to the prefill engine is heard there."""
    time.sleep(0.05)


def test_nothing_may_be_left_for_the_last_part(side):
    prompt = Prompt(side.prefill, 4 * BLOCK_SIZE + 1, THERE)
    prompt.compute(4 * BLOCK_SIZE)
    wanted, _ = admit_when_ready(side.decode, "d", 4 * BLOCK_SIZE + 1, HERE, side.params(prompt))
    side.wait_until_same(4 * BLOCK_SIZE)
    prompt.finish()
    assert side.wait_for_load("d")
    assert side.is_same(4 * BLOCK_SIZE)
    side.wait_until_freed(prompt.request_id)
    numbers = finish(side.decode, wanted)
    assert (numbers["tokens"], numbers["blocks"], numbers["parts"]) == (4 * BLOCK_SIZE, 4, 2)


@pytest.mark.parametrize("read", [True, False], ids=["after a part was read", "before it was"])
def test_what_was_read_before_a_preemption_does_not_count(side, read):
    prompt = side.prompt()
    prompt.compute(3 * BLOCK_SIZE)
    wanted, _ = admit_when_ready(side.decode, "d", TOKENS, HERE, side.params(prompt))
    if read:
        side.wait_until_same(3 * BLOCK_SIZE)
    prompt.preempt(ELSEWHERE)
    prompt.compute(2 * BLOCK_SIZE)
    side.wait_until_same(2 * BLOCK_SIZE, ELSEWHERE)
    prompt.finish()
    assert side.wait_for_load("d")
    assert side.is_same(USEFUL, ELSEWHERE)
    side.wait_until_freed(prompt.request_id)
    assert finish(side.decode, wanted)["tokens"] == USEFUL


def test_a_preemption_that_decode_hears_of_only_at_the_end(side):
    prompt = side.prompt()
    prompt.compute(4 * BLOCK_SIZE)
    wanted, _ = admit_when_ready(side.decode, "d", TOKENS, HERE, side.params(prompt))
    side.wait_until_same(4 * BLOCK_SIZE)
    # Between two of decode's steps, and faster than it asks.
    prompt.preempt(ELSEWHERE)
    prompt.finish()
    assert side.wait_for_load("d")
    assert side.is_same(USEFUL, ELSEWHERE)
    side.wait_until_freed(prompt.request_id)
    finish(side.decode, wanted)


def test_decode_may_ask_before_prefill_has_the_request(side):
    wanted = request("d", TOKENS, early_params(side.learned, "a name to come"))
    side.decode.scheduler.on_new_request(wanted)
    assert asked_for_a_while(side, wanted) == {None}
    prompt = Prompt(side.prefill, TOKENS, THERE, "a name to come")
    prompt.compute(2 * BLOCK_SIZE)
    assert allocate_when_ready(side.decode, wanted, HERE) == USEFUL
    prompt.finish()
    assert side.wait_for_load("d")
    assert side.is_same(USEFUL)
    side.wait_until_freed(prompt.request_id)
    finish(side.decode, wanted)


def test_a_name_that_never_comes_is_a_failed_load(side, caplog_vllm):
    began_s = time.monotonic()
    wanted, _ = admit_when_ready(side.decode, "d", TOKENS, HERE, early_params(side.learned, "never"))
    assert time.monotonic() - began_s >= LEASE_S
    assert not side.wait_for_load("d")
    assert "does not know the request that the router calls never after 2 s" in caplog_vllm.text
    assert finish(side.decode, wanted) is None


def test_another_prompt_does_not_get_the_kv(side, caplog_vllm):
    prompt = side.prompt()
    prompt.compute(2 * BLOCK_SIZE)
    another = request("d", TOKENS, side.params(prompt))
    another.prompt_token_ids[7] += 1
    side.decode.scheduler.on_new_request(another)
    assert allocate_when_ready(side.decode, another, HERE) == 0
    assert "computed another prompt; send it one prompt per request" in caplog_vllm.text
    finish(side.decode, another)
    wait_for_follower(side)
    prompt.finish()
    side.wait_until_freed(prompt.request_id)


@pytest.mark.parametrize("moment", ["before it has its blocks", "between two parts", "while a part is read"])
def test_a_request_that_ends_early_frees_both_sides_at_once(side, moment):
    reading, go_on = threading.Event(), threading.Event()

    def is_slow(read: Read, peer: Session, copies: Copies) -> None:
        reading.set()
        go_on.wait(10)
        read(peer, copies)

    prompt = side.prompt()
    if moment == "before it has its blocks":
        wanted = request("d", TOKENS, side.params(prompt))
        side.decode.scheduler.on_new_request(wanted)
        side.decode.step()
        finish(side.decode, wanted)
    else:
        if moment == "while a part is read":
            side.transports[0].faults.append(is_slow)
        prompt.compute(2 * BLOCK_SIZE)
        wanted, _ = admit_when_ready(side.decode, "d", TOKENS, HERE, side.params(prompt))
        if moment == "while a part is read":
            side.decode.step_until(lambda _: reading.is_set())
        else:
            side.wait_until_same(2 * BLOCK_SIZE)
        finish(side.decode, wanted)
        if moment == "while a part is read":
            # Its blocks are not to be used before that is over.
            assert not any(side.decode.step().finished_recving or () for _ in range(5))
            go_on.set()
        side.wait_for_load("d")
    assert not side.decode.holds()
    wait_for_follower(side)
    prompt.finish()
    side.wait_until_freed(prompt.request_id)


@pytest.mark.parametrize("moment", ["before decode has heard of it", "after a part was read"])
def test_a_prompt_that_is_aborted_is_a_failed_load(side, moment, caplog_vllm):
    prompt = side.prompt()
    if moment == "after a part was read":
        prompt.compute(2 * BLOCK_SIZE)
        wanted, _ = admit_when_ready(side.decode, "d", TOKENS, HERE, side.params(prompt))
        side.wait_until_same(2 * BLOCK_SIZE)
        prompt.abort()
    else:
        prompt.abort()
        wanted, _ = admit_when_ready(side.decode, "d", TOKENS, HERE, side.params(prompt))
    assert not side.wait_for_load("d")
    assert f"says that request {prompt.request_id} was aborted" in caplog_vllm.text
    assert finish(side.decode, wanted) is None


def test_a_part_that_fails_fails_the_load_before_the_prompt_is_there(side):
    def fails(read: Read, peer: Session, copies: Copies) -> None:
        raise ReadFailed("the cable is cut")

    prompt = side.prompt()
    prompt.compute(2 * BLOCK_SIZE)
    wanted, _ = admit_when_ready(side.decode, "d", TOKENS, HERE, side.params(prompt))
    side.wait_until_same(2 * BLOCK_SIZE)
    side.transports[0].faults.append(fails)
    prompt.compute(BLOCK_SIZE)
    assert not side.wait_for_load("d")
    assert finish(side.decode, wanted) is None
    wait_for_follower(side)
    overwrite(side.decode, HERE)
    before = kv_of(side.decode, HERE, TOKENS)
    prompt.finish()
    side.wait_until_freed(prompt.request_id)
    for _ in range(10):
        assert not side.decode.step().finished_recving
    assert torch.equal(kv_of(side.decode, HERE, TOKENS), before)


def test_a_part_that_may_still_be_written_keeps_the_blocks_out_of_use(side):
    ended = threading.Event()

    def is_late(read: Read, peer: Session, copies: Copies) -> None:
        raise ReadUnsettled("the engine gave up waiting", ended.is_set)

    prompt = side.prompt()
    side.transports[0].faults.append(is_late)
    prompt.compute(2 * BLOCK_SIZE)
    wanted, _ = admit_when_ready(side.decode, "d", TOKENS, HERE, side.params(prompt))
    side.decode.step_until(lambda _: not side.transports[0].faults)
    prompt.finish()
    for _ in range(20):
        assert not side.decode.step().finished_recving
    ended.set()
    assert not side.wait_for_load("d")
    finish(side.decode, wanted)
    side.wait_until_freed(prompt.request_id)


def test_of_two_ranks_one_that_fails_stops_the_other(wide):
    def fails(read: Read, peer: Session, copies: Copies) -> None:
        raise ReadFailed("the cable is cut")

    prompt = wide.prompt()
    prompt.compute(2 * BLOCK_SIZE)
    wanted, _ = admit_when_ready(wide.decode, "d", TOKENS, HERE[:3], wide.params(prompt))
    wide.wait_until_same(2 * BLOCK_SIZE)
    wide.transports[1].faults.append(fails)
    prompt.compute(2 * BLOCK_SIZE)
    assert not wide.wait_for_load("d")
    finish(wide.decode, wanted)
    wait_for_follower(wide)
    prompt.finish()
    wide.wait_until_freed(prompt.request_id)


def test_a_lease_that_ends_before_the_last_part_is_read_fails_the_load(side):
    prompt = side.prompt()
    prompt.compute(2 * BLOCK_SIZE)
    wanted, _ = admit_when_ready(side.decode, "d", TOKENS, HERE, side.params(prompt))
    side.wait_until_same(2 * BLOCK_SIZE)
    prompt.finish()
    # Decode stands still, and renews nothing.
    side.wait_until_freed(prompt.request_id, timeout_s=2 * LEASE_S)
    overwrite(side.prefill, THERE)
    assert not side.wait_for_load("d")
    finish(side.decode, wanted)


def test_decode_keeps_the_lease_of_a_prompt_that_has_ended(side):
    prompt = side.prompt()
    wanted = request("d", TOKENS, side.params(prompt))
    side.decode.scheduler.on_new_request(wanted)
    prompt.finish()
    side.decode.step_until(
        lambda _: side.decode.scheduler.get_num_new_matched_tokens(wanted, 0)[0] is not None
    )
    with pytest.raises(AssertionError, match="nothing of the kind"):
        side.wait_until_freed(prompt.request_id, timeout_s=2 * LEASE_S)
    finish(side.decode, wanted)
    side.wait_until_freed(prompt.request_id)


def test_of_requests_that_bring_one_name_the_first_pulls_and_the_others_wait(side):
    prompt = side.prompt()
    other = request("other", TOKENS, side.params(prompt))
    side.decode.scheduler.on_new_request(other)
    prompt.compute(2 * BLOCK_SIZE)
    wanted, _ = admit_when_ready(side.decode, "d", TOKENS, HERE, side.params(prompt))
    assert asked_for_a_while(side, other) == {None}
    prompt.finish()
    assert side.wait_for_load("d")
    assert side.decode.scheduler.get_num_new_matched_tokens(other, 4 * BLOCK_SIZE)[0] == 0
    for one in (wanted, other):
        finish(side.decode, one)
    side.wait_until_freed(prompt.request_id)


def test_after_a_load_that_ended_early_another_of_the_name_is_read_whole(side):
    prompt = side.prompt()
    other = request("other", TOKENS, side.params(prompt))
    side.decode.scheduler.on_new_request(other)
    prompt.compute(2 * BLOCK_SIZE)
    wanted, _ = admit_when_ready(side.decode, "d", TOKENS, ELSEWHERE, side.params(prompt))
    finish(side.decode, wanted)
    assert not side.wait_for_load("d")
    assert allocate_when_ready(side.decode, other, HERE) == USEFUL
    prompt.finish()
    assert side.wait_for_load("other")
    assert side.is_same(USEFUL)
    finish(side.decode, other)
    side.wait_until_freed(prompt.request_id)


def test_a_name_is_for_the_first_request_that_has_it(side, caplog_vllm):
    prompt = side.prompt()
    Prompt(side.prefill, 20, [20, 21], prompt.name).abort()
    assert "has the transfer_name of another one" in caplog_vllm.text
    prompt.finish()
    wanted, _ = admit_when_ready(side.decode, "d", TOKENS, HERE, side.params(prompt))
    assert side.wait_for_load("d")
    assert side.is_same(USEFUL)
    finish(side.decode, wanted)
    side.wait_until_freed(prompt.request_id)


def test_a_prefill_engine_that_ends_takes_its_prompts_with_it(side, tmp_path, caplog_vllm):
    config = engine_config(model_folder(tmp_path, HEADS), 1, "kv_producer")
    mortal = Engine(config, HEADS)
    with running(mortal):
        learned = prefilled(mortal, "learned there", 20, [1, 2])
        prompt = Prompt(mortal, TOKENS, THERE)
        prompt.compute(2 * BLOCK_SIZE)
        params = early_params(learned, prompt.name)
        wanted, _ = admit_when_ready(side.decode, "d", TOKENS, HERE, params)
        there = kv_of(mortal, THERE, 2 * BLOCK_SIZE)
        side.decode.step_until(lambda _: torch.equal(kv_of(side.decode, HERE, 2 * BLOCK_SIZE), there))
    assert not side.wait_for_load("d")
    assert f"did not say within {PEER_TIMEOUT_S} s how far its requests are" in caplog_vllm.text
    assert finish(side.decode, wanted) is None


@pytest.mark.parametrize(
    "change",
    [
        pytest.param({"transfer_name": ""}, id="an empty name"),
        pytest.param({"transfer_name": "x" * 129}, id="a name too long"),
        pytest.param({"remote_engine_id": None}, id="no engine"),
    ],
)
def test_parameters_of_no_use_are_computed_locally(side, change):
    params = early_params(side.learned, "unused") | change
    wanted, num_external = admit(side.decode, "d", TOKENS, HERE, params)
    assert num_external == 0
    assert finish(side.decode, wanted) is None


def test_an_engine_that_was_replaced_is_a_failed_load(side, caplog_vllm):
    params = early_params(side.learned, "there") | {"remote_engine_id": "its predecessor"}
    wanted, _ = admit_when_ready(side.decode, "d", TOKENS, HERE, params)
    assert not side.wait_for_load("d")
    assert "which replaced its predecessor" in caplog_vllm.text
    finish(side.decode, wanted)


@pytest.mark.parametrize("flipped", [False, True])
def test_a_load_in_parts_is_verified_whole(tmp_path, flipped, caplog_vllm):
    side = start(tmp_path, 2, 1, Model(HEADS), verify=True, dtype="float16")
    with running(side.prefill, side.decode):
        prompt = side.prompt()
        prompt.compute(2 * BLOCK_SIZE)
        wanted, _ = admit_when_ready(side.decode, "d", TOKENS, HERE, side.params(prompt))
        # Until it is verified it has the bits that prefill has.
        there = kv_of(side.prefill, THERE, 2 * BLOCK_SIZE)
        side.decode.step_until(lambda _: torch.equal(kv_of(side.decode, HERE, 2 * BLOCK_SIZE), there))
        if flipped:
            side.decode.layer(0, 1)[HERE[1], 0, 3, 2, 1] ^= 1
        prompt.finish()
        side.prefill.step()
        assert side.wait_for_load("d") != flipped
        if flipped:
            assert "is not what the prefill engine computed, in layer" in caplog_vllm.text
        else:
            assert side.is_same(USEFUL)
            numbers = finish(side.decode, wanted)
            assert (numbers["sources"], numbers["tokens"], numbers["parts"]) == ((0, 1), USEFUL, 2)
        side.wait_until_freed(prompt.request_id)


@pytest.mark.parametrize(
    ("there", "here"),
    [
        pytest.param(True, False, id="head-major to token-major"),
        pytest.param(False, True, id="token-major to head-major"),
        pytest.param(True, True, id="head-major"),
    ],
)
def test_parts_of_either_layout_go_into_pages_of_either(tmp_path, there, here):
    side = start(tmp_path, 2, 1, Model(HEADS), head_major=(there, here))
    with running(side.prefill, side.decode):
        prompt = side.prompt()
        prompt.compute(2 * BLOCK_SIZE)
        wanted, _ = admit_when_ready(side.decode, "d", TOKENS, HERE, side.params(prompt))
        side.wait_until_same(2 * BLOCK_SIZE)
        prompt.finish()
        assert side.wait_for_load("d")
        assert side.is_same(USEFUL)
        side.wait_until_freed(prompt.request_id)
        assert finish(side.decode, wanted)["parts"] == 2


def test_windows_are_read_in_one_part_when_the_prompt_is_there(tmp_path):
    model = Model(HEADS, group_of_layer=(0, 1, 1), windows=(None, 24))
    side = start(tmp_path, 1, 1, model)
    with running(side.prefill, side.decode):
        prompt = Prompt(side.prefill, TOKENS, (THERE, ELSEWHERE))
        prompt.schedule(TOKENS - 1)
        prompt.process(TOKENS - 1)
        wanted = request("d", TOKENS, side.params(prompt))
        side.decode.scheduler.on_new_request(wanted)
        assert asked_for_a_while(side, wanted) == {None}
        prompt.schedule(1)
        prompt.process(1)
        prompt.end()
        assert allocate_when_ready(side.decode, wanted, (HERE, [20, 19, 18, 17, 16])) == USEFUL
        assert side.wait_for_load("d")
        assert finish(side.decode, wanted)["parts"] == 1
        side.wait_until_freed(prompt.request_id)
