# SPDX-License-Identifier: Apache-2.0
"""One of the requests that bring a prefilled prompt pulls it."""

import pytest

from vllm_ascend.kv_transfer.messages import RemotePrefill
from vllm_ascend.kv_transfer.sharing import Prompt, SharedPrompts


def brought(lease: int = 7, engine_id: str = "prefill") -> tuple[str, int]:
    return RemotePrefill(
        remote_engine_id=engine_id,
        remote_request_id="p",
        remote_host="127.0.0.1",
        remote_port=1,
        remote_block_ids=((1, 2),),
        remote_num_tokens=20,
        remote_block_size=16,
        remote_lease=lease,
        remote_lease_s=30.0,
        remote_prompt_digest=None,
    ).key


def test_the_others_wait_for_the_one_that_pulls_and_need_nothing_then():
    prompts = SharedPrompts()
    for request_id in ("a", "b"):
        prompts.bring(brought(), request_id)
    assert prompts.state(brought()) is Prompt.THERE
    prompts.pull(brought(), "a")
    assert prompts.state(brought()) is Prompt.PULLING
    prompts.pulled(brought(), loaded=True)
    assert prompts.state(brought()) is Prompt.PULLED
    assert prompts.is_wanted(brought())
    prompts.leave(brought(), "b")
    assert not prompts.is_wanted(brought())
    prompts.bring(brought(), "c")
    assert prompts.state(brought()) is Prompt.PULLED


def test_after_a_pull_that_failed_the_next_may_try():
    prompts = SharedPrompts()
    for request_id in ("a", "b"):
        prompts.bring(brought(), request_id)
    prompts.pull(brought(), "a")
    prompts.pulled(brought(), loaded=False)
    assert prompts.state(brought()) is Prompt.THERE
    assert prompts.is_wanted(brought())


@pytest.mark.parametrize("other", [brought(lease=8), brought(engine_id="its successor")])
def test_prompts_are_told_apart_by_engine_and_lease(other: tuple[str, int]):
    prompts = SharedPrompts()
    prompts.bring(brought(), "a")
    prompts.pull(brought(), "a")
    assert prompts.state(other) is Prompt.THERE
    assert not prompts.is_wanted(other)


def test_the_oldest_is_forgotten():
    prompts = SharedPrompts(remembered=2)
    for lease in (1, 2, 3):
        prompts.bring(brought(lease), "a")
        prompts.pull(brought(lease), "a")
        prompts.pulled(brought(lease), loaded=True)
    states = [prompts.state(brought(lease)) for lease in (1, 2, 3)]
    assert states == [Prompt.THERE, Prompt.PULLED, Prompt.PULLED]
