# SPDX-License-Identifier: Apache-2.0
"""Engines of different sizes behind the router answer as one engine does, and move no more than they must."""

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import httpx
import pytest
from disaggregated.fleet import (
    MODEL,
    Fleet,
    blocks_in_use,
    body,
    complete,
    log_probabilities_of,
    on_fleet,
    recall_fleet,
    same_table_other_order,
    text_of,
    wait_until,
)
from recall import Question, make_question
from servers import Server

pytestmark = on_fleet(recall_fleet)
BLOCK_SIZE = 128


@dataclass(frozen=True)
class Route:
    """A prefill engine, a decode engine, the router before them, and another engine to compare with."""

    prefill: Server
    decode: Server
    front: Server
    ordinary: Server
    first_seed: int
    """Engines are in several routes, and no prompt is: else a prefix of it would be there already."""

    def question(self, seed: int, num_prompt_tokens: int, num_answer_tokens: int = 8) -> Question:
        return make_question(self.first_seed + seed, num_prompt_tokens, num_answer_tokens)


@pytest.fixture(
    params=[
        pytest.param(("two", "one", "four"), id="prefill TP 2, decode TP 1"),
        pytest.param(("four", "two", "one"), id="prefill TP 4, decode TP 2"),
    ]
)
def route(fleet: Fleet, request: pytest.FixtureRequest) -> Route:
    prefill, decode, ordinary = request.param
    front = fleet[f"{prefill}-to-{decode}"]
    seed = 10_000 * (1 + request.param_index)
    return Route(fleet[prefill], fleet[decode], front, fleet[ordinary], seed)


@pytest.mark.parametrize("num_prompt_tokens", [15, 16, 17, 127, 128, 129, 300, 512])
def test_answers_are_right_and_equal_to_one_engines(route: Route, num_prompt_tokens: int):
    question = route.question(1000 + num_prompt_tokens, num_prompt_tokens, num_answer_tokens=16)
    disaggregated = text_of(complete(route.front, question))
    assert question.accepts(disaggregated), f"{disaggregated!r} is not {question.answer!r}"
    assert disaggregated == text_of(complete(route.ordinary, question))


def test_log_probabilities_are_those_of_one_engine(route: Route):
    question = route.question(2000, 333, num_answer_tokens=16)
    ours, reference = (
        log_probabilities_of(complete(server, question, logprobs=0))
        for server in (route.front, route.ordinary)
    )
    # bf16 has 8 bits of mantissa, and two ranks add in another order than one does.
    assert ours == pytest.approx(reference, abs=0.05)


def test_concurrent_requests_do_not_mix(route: Route):
    questions = [route.question(3000 + index, 60 + 37 * index, num_answer_tokens=12) for index in range(12)]
    with ThreadPoolExecutor(len(questions)) as pool:
        answers = list(pool.map(lambda question: text_of(complete(route.front, question)), questions))
    assert [question.accepts(answer) for question, answer in zip(questions, answers, strict=True)] == [
        True
    ] * 12


def test_streamed_answer_is_the_whole_answer(route: Route):
    question = route.question(4000, 200, num_answer_tokens=8)
    text = ""
    with httpx.stream(
        "POST", f"{route.front.url}/v1/completions", json=body(question, stream=True), timeout=60
    ) as lines:
        for line in lines.iter_lines():
            if line.startswith("data: {"):
                text += json.loads(line.removeprefix("data: "))["choices"][0]["text"]
    assert question.accepts(text)


def test_prefix_hit_on_the_decode_side_pulls_only_what_is_missing(route: Route):
    size = BLOCK_SIZE
    question = route.question(5000, 3 * size + 9)
    first = complete(route.front, question)
    second = complete(route.front, same_table_other_order(question, after_tokens=2 * size))
    assert question.accepts(text_of(first))
    assert question.accepts(text_of(second))
    assert first["kv_transfer_params"]["blocks"] == 4
    assert second["kv_transfer_params"]["blocks"] == 2, "two blocks are the same and already there"


def test_full_hit_pulls_nothing_and_prefill_lets_go_at_once(route: Route):
    question = route.question(6000, 2 * BLOCK_SIZE + 1, num_answer_tokens=8)
    complete(route.front, question)
    again = complete(route.front, question)
    assert question.accepts(text_of(again))
    assert again["kv_transfer_params"]["blocks"] == 0
    _wait_until_no_block_is_held(route)


def test_each_request_says_what_it_moved(route: Route):
    question = route.question(7000, 2 * BLOCK_SIZE + 5)
    pulled: dict[str, Any] = complete(route.front, question)["kv_transfer_params"]
    # 2 K/V x 3 blocks x tokens x 4 KV heads x head size x 2 bytes, over all layers of the model
    config = json.loads((MODEL / "config.json").read_text())
    token_bytes = 2 * config["num_hidden_layers"] * 4 * config["head_dim"] * 2
    assert pulled["tokens"] == 2 * BLOCK_SIZE + 4
    assert pulled["blocks"] == 3
    assert pulled["bytes"] == 3 * BLOCK_SIZE * token_bytes


def test_no_block_stays_behind(route: Route):
    complete(route.front, route.question(8000, 400))
    _wait_until_no_block_is_held(route)


def _wait_until_no_block_is_held(route: Route) -> None:
    """Well before the lease of 30 s could end."""

    def held() -> dict[str, float]:
        return {server.name: blocks_in_use(server) for server in (route.prefill, route.decode)}

    wait_until(lambda: not any(held().values()), lambda: f"blocks still held: {held()}", patience_s=5)
