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
def test_answers_are_those_of_one_engine_and_parts_were_read_before_the_end(route, num_prompt_tokens):
    question = make_question(SEED + num_prompt_tokens, num_prompt_tokens, 8)
    answer = complete(route.early, question)
    assert question.accepts(text_of(answer))
    assert text_of(answer) == text_of(complete(route.ordinary, question))
    numbers = answer["kv_transfer_params"]
    assert numbers["tokens"] == num_prompt_tokens - 1
    # All parts but the last are read before prefill ends.
    assert numbers["parts"] > 1 or num_prompt_tokens < 128
    route.wait_until_no_block_is_held()


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
