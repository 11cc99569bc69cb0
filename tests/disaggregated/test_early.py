# SPDX-License-Identifier: Apache-2.0
"""Prompts that a decode engine reads while the prefill engine computes them, block by block."""

from __future__ import annotations

import contextlib
import dataclasses
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import httpx
import pytest
from disaggregated.fleet import (
    Fleet,
    blocks_in_use,
    body,
    complete,
    metric,
    on_fleet,
    recall_fleet,
    text_of,
    wait_until,
)
from recall import make_question
from servers import Server

pytestmark = on_fleet(recall_fleet)
SEED = 90_000


@dataclass(frozen=True)
class Route:
    prefill: Server
    decode: Server
    early: Server
    ordinary: Server
    """The router to the same engines that asks one after the other."""

    def wait_until_no_block_is_held(self) -> None:
        """Well before the lease of 30 s could end."""

        def held() -> dict[str, float]:
            return {server.name: blocks_in_use(server) for server in (self.prefill, self.decode)}

        wait_until(lambda: not any(held().values()), lambda: f"blocks still held: {held()}")


@pytest.fixture
def route(fleet: Fleet) -> Route:
    """The router knows its prefill engine from a first answer."""
    route = Route(fleet["four"], fleet["two"], fleet["four-to-two, early"], fleet["one"])
    complete(route.early, make_question(SEED, 20, 2))
    return route


@pytest.mark.parametrize("num_prompt_tokens", [100, 300, 512])
def test_answers_are_those_of_one_engine(route, num_prompt_tokens):
    question = make_question(SEED + num_prompt_tokens, num_prompt_tokens, 8)
    answer = complete(route.early, question)
    assert question.accepts(text_of(answer))
    assert text_of(answer) == text_of(complete(route.ordinary, question))
    assert answer["kv_transfer_params"]["tokens"] == num_prompt_tokens - 1
    route.wait_until_no_block_is_held()


def test_parts_are_read_before_prefill_ends(route):
    def parts(index: int) -> int:
        """All but the last are read before that."""
        answer = complete(route.early, make_question(SEED + 4000 + index, 512, 2))
        return int(answer["kv_transfer_params"]["parts"])

    # On a busy host prefill may have computed all of these chunks before decode gets to ask for the first.
    assert any(parts(index) > 1 for index in range(20))


def test_concurrent_requests_do_not_mix(route):
    questions = [make_question(SEED + 1000 + index, 90 + 60 * index, 8) for index in range(8)]
    with ThreadPoolExecutor(len(questions)) as pool:
        answers = list(pool.map(lambda question: text_of(complete(route.early, question)), questions))
    assert [question.accepts(answer) for question, answer in zip(questions, answers, strict=True)] == [
        True
    ] * 8
    route.wait_until_no_block_is_held()


def test_several_answers_to_one_prompt(route):
    question = make_question(SEED + 2000, 400, 8)
    choices = complete(route.early, question, n=2, temperature=0.01)["choices"]
    assert [question.accepts(choice["text"]) for choice in choices] == [True, True]
    route.wait_until_no_block_is_held()


def test_a_client_that_leaves_while_prefill_computes_frees_both(route):
    failed = metric(route.decode, "vllm:ascend_kv_failed_total")
    for seed, patience_s in ((SEED + 3000, 0.05), (SEED + 3001, 0.2)):
        question = make_question(seed, 512, 8)
        with contextlib.suppress(httpx.ReadTimeout):
            httpx.post(f"{route.early.url}/v1/completions", json=body(question), timeout=patience_s)
    route.wait_until_no_block_is_held()
    assert metric(route.decode, "vllm:ascend_kv_failed_total") == failed


def test_a_prompt_that_is_too_long_is_refused_and_nobody_waits(route):
    question = dataclasses.replace(make_question(SEED, 20, 2), prompt=" ".join(["1"] * 2000))
    answer = httpx.post(f"{route.early.url}/v1/completions", json=body(question), timeout=60)
    assert answer.status_code == 400
    route.wait_until_no_block_is_held()
