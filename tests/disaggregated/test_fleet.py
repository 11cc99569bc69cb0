# SPDX-License-Identifier: Apache-2.0
"""Engines of different sizes behind the router answer as one engine does, and move no more than they must."""

import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from disaggregated.fleet import (
    Fleet,
    blocks_in_use,
    body,
    complete,
    same_table_other_order,
    start_fleet,
    text_of,
)
from recall import make_question


@pytest.fixture(
    scope="module",
    params=[
        pytest.param((2, 1, 128), id="prefill TP 2, decode TP 1, blocks of 128"),
        pytest.param((4, 2, 16), id="prefill TP 4, decode TP 2, blocks of 16"),
    ],
)
def fleet(request: pytest.FixtureRequest, log_dir: Path) -> Iterator[Fleet]:
    prefill_tp, decode_tp, block_size = request.param
    yield from start_fleet(log_dir, prefill_tp, decode_tp, block_size)


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


@pytest.mark.parametrize("num_prompt_tokens", [15, 16, 17, 127, 128, 129, 300, 512])
def test_answers_are_right_and_equal_to_one_engines(fleet: Fleet, num_prompt_tokens: int):
    question = make_question(1000 + num_prompt_tokens, num_prompt_tokens, num_answer_tokens=16)
    disaggregated = text_of(complete(fleet.front, question))
    assert question.accepts(disaggregated), f"{disaggregated!r} is not {question.answer!r}"
    assert disaggregated == text_of(complete(fleet.ordinary, question))


def test_log_probabilities_are_those_of_one_engine(fleet: Fleet):
    question = make_question(2000, 333, num_answer_tokens=16)
    ours, reference = (
        complete(server, question, logprobs=0)["choices"][0]["logprobs"]["token_logprobs"]
        for server in (fleet.front, fleet.ordinary)
    )
    # bf16 has 8 bits of mantissa, and two ranks add in another order than one does.
    assert ours == pytest.approx(reference, abs=0.05)


def test_concurrent_requests_do_not_mix(fleet: Fleet):
    questions = [make_question(3000 + index, 60 + 37 * index, num_answer_tokens=12) for index in range(12)]
    with ThreadPoolExecutor(len(questions)) as pool:
        answers = list(pool.map(lambda question: text_of(complete(fleet.front, question)), questions))
    assert [question.accepts(answer) for question, answer in zip(questions, answers, strict=True)] == [
        True
    ] * 12


def test_streamed_answer_is_the_whole_answer(fleet: Fleet):
    question = make_question(4000, 200, num_answer_tokens=8)
    text = ""
    with httpx.stream(
        "POST", f"{fleet.front.url}/v1/completions", json=body(question, stream=True), timeout=60
    ) as lines:
        for line in lines.iter_lines():
            if line.startswith("data: {"):
                text += json.loads(line.removeprefix("data: "))["choices"][0]["text"]
    assert question.accepts(text)


def test_prefix_hit_on_the_decode_side_pulls_only_what_is_missing(fleet: Fleet):
    size = fleet.block_size
    question = make_question(5000, 3 * size + 9, num_answer_tokens=8)
    first = complete(fleet.front, question)
    second = complete(fleet.front, same_table_other_order(question, after_tokens=2 * size))
    assert question.accepts(text_of(first))
    assert question.accepts(text_of(second))
    assert first["kv_transfer_params"]["blocks"] == 4
    assert second["kv_transfer_params"]["blocks"] == 2, "two blocks are the same and already there"


def test_full_hit_pulls_nothing_and_prefill_lets_go_at_once(fleet: Fleet):
    question = make_question(6000, 2 * fleet.block_size + 1, num_answer_tokens=8)
    complete(fleet.front, question)
    again = complete(fleet.front, question)
    assert question.accepts(text_of(again))
    assert again["kv_transfer_params"]["blocks"] == 0
    _wait_until_no_block_is_held(fleet)


def test_each_request_says_what_it_moved(fleet: Fleet):
    question = make_question(7000, 2 * fleet.block_size + 5)
    pulled: dict[str, Any] = complete(fleet.front, question)["kv_transfer_params"]
    # 2 K/V x 3 blocks x tokens x 4 KV heads x head size x 2 bytes, over all layers of the model
    config = json.loads((fleet.model / "config.json").read_text())
    token_bytes = 2 * config["num_hidden_layers"] * 4 * config["head_dim"] * 2
    assert pulled["tokens"] == 2 * fleet.block_size + 4
    assert pulled["blocks"] == 3
    assert pulled["bytes"] == 3 * fleet.block_size * token_bytes


def test_no_block_stays_behind(fleet: Fleet):
    complete(fleet.front, make_question(8000, 400))
    _wait_until_no_block_is_held(fleet)


def _wait_until_no_block_is_held(fleet: Fleet, patience_s: float = 5) -> None:
    """Well before the lease of 30 s could end."""
    deadline = time.monotonic() + patience_s
    while (held := {s.name: blocks_in_use(s) for s in (fleet.prefill, fleet.decode)}) and any(held.values()):
        assert time.monotonic() < deadline, f"blocks still held: {held}"
        time.sleep(0.1)
