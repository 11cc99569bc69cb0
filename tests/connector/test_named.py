# SPDX-License-Identifier: Apache-2.0
"""What a prefill engine says of requests by the names that a router gave them."""

from __future__ import annotations

import itertools

import pytest
from vllm.sampling_params import SamplingParams
from vllm.v1.core.sched.output import KVConnectorBlockState, SchedulerOutput
from vllm.v1.request import Request

from vllm_ascend.kv_transfer.messages import (
    AskProgress,
    Ended,
    Gone,
    Growing,
    RemotePrefill,
    Unchanged,
    Unheard,
    Watch,
)
from vllm_ascend.kv_transfer.named import Held, NamedRequests

BLOCKS = ([5, 6, 7],)


def described(held: Held) -> RemotePrefill:
    return RemotePrefill(
        remote_engine_id="e",
        remote_request_id=held.request_id,
        remote_host="h",
        remote_port=1,
        remote_block_ids=held.blocks,
        remote_num_tokens=held.tokens,
        remote_block_size=16,
        remote_lease=held.lease,
        remote_lease_s=30.0,
        remote_prompt_digest=held.digest,
    )


def names(grow: bool = True, remembered: int = 8) -> NamedRequests:
    return NamedRequests(itertools.count(1), described, block_size=16, grow=grow, remembered=remembered)


def request(request_id: str = "r", num_tokens: int = 40) -> Request:
    return Request(request_id, list(range(num_tokens)), SamplingParams(max_tokens=1), None)


def schedule(named: NamedRequests, one: Request, num_tokens: int) -> None:
    """A step begins that computes so many tokens."""
    output = SchedulerOutput.make_empty()
    output.num_scheduled_tokens = {one.request_id: num_tokens}
    output.kv_connector_block_state = KVConnectorBlockState({one.request_id}, lambda _: BLOCKS, {})
    named.scheduled(output)
    one.num_computed_tokens += num_tokens
    one.num_in_flight_tokens += num_tokens


def process(named: NamedRequests, one: Request, num_tokens: int) -> None:
    """Its output comes."""
    one.num_in_flight_tokens -= num_tokens
    named.processed()


def told(named: NamedRequests, name: str = "x", lease: int = 0, tokens: int = 0) -> object:
    (answer,) = named.answer(
        AskProgress(engine_id="e", watches=(Watch(name=name, lease=lease, tokens=tokens),))
    ).of
    return answer


def growing(named: NamedRequests) -> tuple[int, int, tuple[tuple[int, ...], ...]]:
    """Lease, tokens and blocks of what is told of x."""
    answer = told(named)
    assert isinstance(answer, Growing)
    assert answer.prompt_tokens == 40
    return answer.so_far.remote_lease, answer.so_far.remote_num_tokens, answer.so_far.remote_block_ids


def test_tokens_are_there_when_the_output_of_their_step_is():
    named, one = names(), request()
    assert told(named) == Unheard()
    named.begin("x", one)
    assert growing(named) == (1, 0, ())
    schedule(named, one, 20)
    schedule(named, one, 20)
    named.processed()
    assert growing(named) == (1, 0, ())
    process(named, one, 20)
    assert growing(named) == (1, 20, ((5, 6),))
    assert told(named, lease=1, tokens=20) == Unchanged()
    process(named, one, 20)
    assert growing(named) == (1, 40, ((5, 6, 7),))


def test_a_preempted_request_has_nothing_and_goes_on_under_another_lease():
    named, one = names(), request()
    named.begin("x", one)
    schedule(named, one, 20)
    process(named, one, 20)
    # A step is under way when it is preempted, and its output comes afterwards.
    schedule(named, one, 10)
    one.num_computed_tokens, one.num_preemptions = 0, 1
    process(named, one, 10)
    assert growing(named) == (2, 0, ())
    schedule(named, one, 30)
    named.processed()
    assert growing(named) == (2, 0, ())
    process(named, one, 30)
    assert growing(named) == (2, 30, ((5, 6),))


def test_tokens_that_a_connector_is_to_load_are_not_there():
    named, one = names(), request()
    named.begin("x", one)
    # vLLM counts them as computed while they are on their way.
    one.num_computed_tokens = 32
    named.processed()
    assert growing(named) == (1, 0, ())


def test_where_blocks_change_hands_nothing_is_told_before_the_end():
    named, one = names(grow=False), request()
    named.begin("x", one)
    schedule(named, one, 20)
    process(named, one, 20)
    assert growing(named) == (1, 0, ())


def test_what_is_computed_is_told_until_its_blocks_are_given_away():
    named, one = names(), request()
    named.begin("x", one)
    lease = named.lease_of("r")
    prefill = described(Held("r", ((5, 6, 7),), 40, None, lease))
    assert named.computed("r", prefill)
    assert told(named, lease=1, tokens=40) == Ended(prefill=prefill)
    named.freed(["r", "another"])
    assert isinstance(told(named), Gone)
    named.freed(["r"])


def test_a_request_that_is_aborted_is_gone():
    named = names()
    named.begin("x", request())
    named.dropped("r")
    named.dropped("r")
    assert told(named) == Gone(reason="request r was aborted")


@pytest.mark.parametrize("when", ["before it comes", "while it is computed"])
def test_what_was_given_up_is_of_no_use_when_it_is_computed(when):
    named = names()
    if when == "before it comes":
        assert named.forgo(["x"]) == []
    named.begin("x", request())
    if when == "while it is computed":
        assert named.forgo(["x"]) == []
    assert told(named) == Gone(reason="decode gave it up")
    assert not named.computed("r", described(Held("r", (), 40, None, 1)))


def test_what_is_given_up_when_it_is_computed_is_named_once():
    named = names()
    named.begin("x", request())
    named.computed("r", described(Held("r", (), 40, None, 1)))
    assert named.forgo(["x", "never heard of"]) == ["r"]
    assert named.forgo(["x"]) == []


def test_the_oldest_that_are_gone_are_forgotten():
    named = names(remembered=2)
    named.forgo(["a", "b", "c"])
    assert [told(named, name) for name in "abc"] == [Unheard(), *[Gone(reason="decode gave it up")] * 2]
