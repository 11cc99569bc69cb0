# SPDX-License-Identifier: Apache-2.0
"""The life of a request through two engines: whatever way it takes, both sides have all blocks back at once.

No lease ends while these tests run, so only what an engine is told gives blocks back. Each test ends with a
request that must be answered right.
"""

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from http.client import HTTPConnection
from typing import Any

import httpx
import pytest
from disaggregated.fleet import body, complete, hand_over, metric, prefilled, text_of, wait_for, wait_until
from disaggregated.pair import MAX_REQUESTS, Pair, new_question
from recall import Question, make_question, vocabulary
from servers import HOST, Server, ServerFailed

NEARLY_GREEDY = {"temperature": 0.01}
"""vLLM refuses n > 1 at temperature 0."""


@pytest.fixture(autouse=True)
def _everything_is_given_back_and_the_next_request_works(pair: Pair) -> Iterator[None]:
    yield
    pair.check_that_it_works_and_holds_nothing()


def choices_of(answer: dict[str, Any]) -> list[str]:
    return [choice["text"] for choice in sorted(answer["choices"], key=lambda choice: choice["index"])]


@contextmanager
def asking(server: Server, question: Question, **more: Any) -> Iterator[None]:
    """Ask, and leave without having read a word when the context ends."""
    with closing(HTTPConnection(HOST, server.port)) as line:
        sent = json.dumps(body(question, **more))
        line.request("POST", "/v1/completions", sent, {"Content-Type": "application/json"})
        yield


@contextmanager
def busy(decode: Server) -> Iterator[None]:
    """More requests in `decode` than it ends in many seconds, so that the next one is queued."""
    with asking(decode, new_question(17), n=MAX_REQUESTS - 2, max_tokens=470, **NEARLY_GREEDY):
        wait_until(lambda: metric(decode, "vllm:num_requests_running") > 0, lambda: "nothing runs")
        yield
        assert metric(decode, "vllm:num_requests_waiting") > 0, "no longer busy: ask for more"


# Clients that leave


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_leaves_while_prefill_computes_or_holds(pair: Pair, stream: bool):
    granted = metric(pair.prefill, "vllm:ascend_kv_leases_granted_total")
    with asking(pair.front, new_question(400), stream=stream):
        pass
    wait_for(pair.prefill, "vllm:ascend_kv_leases_granted_total", granted + 1)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("by_router", [False, True])
def test_a_client_leaves_while_decode_has_it_queued(pair: Pair, by_router: bool, stream: bool):
    question = new_question(100)
    params = None if by_router else prefilled(pair.prefill, question)
    with busy(pair.decode):
        server = pair.front if by_router else pair.decode
        with asking(server, question, stream=stream, kv_transfer_params=params):
            wait_for(pair.decode, "vllm:num_requests_kv_fetch_by_stage", 1, stage="waiting_to_start")
            assert pair.held()["prefill"] == 7
        wait_until(lambda: pair.held()["prefill"] == 0, lambda: f"still held: {pair.held()}")


@pytest.mark.parametrize("by_router", [False, True])
@pytest.mark.parametrize("stream", [False, True])
def test_a_client_leaves_while_decode_answers(pair: Pair, by_router: bool, stream: bool):
    question = new_question(100)
    server, params = pair.front, None
    if not by_router:
        server, params = pair.decode, prefilled(pair.prefill, question)
    answered = metric(pair.decode, "vllm:generation_tokens_total")
    many = {"n": 8, "max_tokens": 390, "stream": stream, **NEARLY_GREEDY}
    with asking(server, question, kv_transfer_params=params, **many):
        wait_until(lambda: metric(pair.decode, "vllm:num_requests_running") > 0, lambda: "nothing runs")
    wait_for(pair.decode, "vllm:num_requests_running", 0)
    assert metric(pair.decode, "vllm:generation_tokens_total") < answered + 8 * 390


# What decode refuses


@pytest.mark.parametrize(
    ("question", "change", "status"),
    [
        pytest.param(make_question(1, 512), {}, 400, id="prompt too long"),
        pytest.param(make_question(2, 100), {"n": MAX_REQUESTS + 1, "temperature": 1}, 503, id="queue full"),
        pytest.param(make_question(3, 100), {"temperature": -1}, 400, id="a parameter that is none"),
        pytest.param(make_question(4, 100), {"model": "another"}, 404, id="a model that is not served"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_decode_refuses(pair: Pair, question: Question, change: dict[str, Any], status: int, stream: bool):
    params = prefilled(pair.prefill, question)
    assert pair.held()["prefill"] >= 7
    with pytest.raises(ServerFailed, match=f"answered {status}"):
        complete(pair.decode, question, kv_transfer_params=params, stream=stream, **change)


# Little room


def test_requests_that_find_no_blocks_wait_and_end_right(pair: Pair):
    questions = [new_question(200, 12) for _ in range(8)]
    with ThreadPoolExecutor(len(questions)) as pool:
        answers = list(pool.map(lambda question: complete(pair.front, question), questions))
    assert all(q.accepts(text_of(a)) for q, a in zip(questions, answers, strict=True))
    assert [answer["kv_transfer_params"]["tokens"] for answer in answers] == [199] * 8


def test_requests_that_are_preempted_end_right(pair: Pair):
    preempted = metric(pair.decode, "vllm:num_preemptions_total")

    def ask(question: Question, params: dict[str, Any]) -> bool:
        answer = complete(pair.decode, question, kv_transfer_params=params, max_tokens=190)
        # Later words the model itself is less sure of.
        words = text_of(answer).split()
        return len(words) == 190 and question.accepts(" ".join(words[:48]))

    for _ in range(5):
        # 19 blocks each at first, 31 in the end, of 63: too many for three that run together.
        questions = [new_question(300, 48) for _ in range(3)]
        held = [prefilled(pair.prefill, question) for question in questions]
        with ThreadPoolExecutor(len(questions)) as pool:
            assert list(pool.map(ask, questions, held)) == [True] * 3
        if metric(pair.decode, "vllm:num_preemptions_total") > preempted:
            return
    raise AssertionError("nothing was preempted; ask for longer answers")


# Short ends


@pytest.mark.parametrize(
    ("limits", "reason"),
    [
        pytest.param(lambda word: {"max_tokens": 1}, "length", id="max_tokens 1"),
        pytest.param(lambda word: {"stop": [word]}, "stop", id="stop word"),
        pytest.param(
            lambda word: {"stop_token_ids": [vocabulary().index(word)]}, "stop", id="token that ends"
        ),
    ],
)
@pytest.mark.parametrize("by_router", [False, True])
def test_the_first_token_ends_it(pair: Pair, limits: Any, reason: str, by_router: bool):
    question = new_question(65)
    more = limits(question.answer.split()[0])
    answer = (
        complete(pair.front, question, **more)
        if by_router
        else hand_over(pair.prefill, pair.decode, question, **more)
    )
    assert answer["choices"][0]["finish_reason"] == reason
    assert answer["usage"]["completion_tokens"] == 1
    if "stop" not in more:  # vLLM finds words after the engine has answered, and its last word is lost
        assert answer["kv_transfer_params"]["tokens"] == 64


def test_a_prompt_that_decode_has_already(pair: Pair):
    question = new_question(65)
    pulled = [complete(pair.front, question)["kv_transfer_params"] for _ in range(2)]
    assert [numbers["tokens"] for numbers in pulled] == [64, 0]


# Names and numbers of requests


def test_requests_of_one_name(pair: Pair):
    questions = [new_question(60 + 16 * index) for index in range(4)]

    def ask(question: Question) -> str:
        answer = httpx.post(
            f"{pair.front.url}/v1/completions",
            json=body(question),
            headers={"X-Request-Id": "the-same"},
            timeout=60,
        )
        return text_of(answer.raise_for_status().json())

    with ThreadPoolExecutor(len(questions)) as pool:
        answers = list(pool.map(ask, questions))
    assert all(question.accepts(answer) for question, answer in zip(questions, answers, strict=True))


@pytest.mark.parametrize("by_router", [False, True])
def test_several_answers_to_one_prompt_are_one_load(pair: Pair, by_router: bool):
    question = new_question(100)
    before = [metric(pair.decode, f"vllm:ascend_kv_{name}_total") for name in ("loads", "failed")]
    answer = (
        complete(pair.front, question, n=3, **NEARLY_GREEDY)
        if by_router
        else hand_over(pair.prefill, pair.decode, question, n=3, **NEARLY_GREEDY)
    )
    assert [question.accepts(text) for text in choices_of(answer)] == [True] * 3
    pair.wait_until_free()
    after = [metric(pair.decode, f"vllm:ascend_kv_{name}_total") for name in ("loads", "failed")]
    assert [now - then for now, then in zip(after, before, strict=True)] == [1, 0]


def test_several_prompts_in_one_request(pair: Pair):
    questions = [new_question(100) for _ in range(3)]
    answer = complete(pair.front, questions[0], prompt=[question.prompt for question in questions])
    texts = choices_of(answer)
    assert [q.accepts(text) for q, text in zip(questions, texts, strict=True)] == [True] * 3


def test_the_kv_of_another_prompt_is_not_taken(pair: Pair):
    mine, another = new_question(100), new_question(100)
    answer = complete(pair.decode, mine, kv_transfer_params=prefilled(pair.prefill, another))
    assert mine.accepts(text_of(answer))


def test_an_answer_of_prefill_that_is_handed_over_twice(pair: Pair):
    question = new_question(100)
    params = prefilled(pair.prefill, question)
    for _ in range(2):
        assert question.accepts(text_of(complete(pair.decode, question, kv_transfer_params=params)))
