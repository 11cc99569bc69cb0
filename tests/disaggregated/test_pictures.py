# SPDX-License-Identifier: Apache-2.0
"""Pictures in chat requests to `vllm serve`, of one engine and through two: their KV moves like any other."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from disaggregated.fleet import MODEL_NAME, connector, engine_options
from engine import see
from engine.pictures import DISAGGREGATED, QUESTIONS, SAME_WORDS, chat_of, environment
from engine.sensing import BLOCK_SIZE, NUM_NEW_TOKENS
from servers import Server, engine, router, running

EMULATOR = ("--devices", "8", "--memory", "1GiB", "--allow-fp32")
ASKED = (*SAME_WORDS, 6)
"""The last has words before, between and after two pictures."""


@dataclass(frozen=True)
class Seeing:
    prefill: Server
    front: Server
    expected: list[dict[str, Any]]
    """What transformers answers to each of QUESTIONS."""


@pytest.fixture(scope="module")
def seeing(tmp_path_factory: pytest.TempPathFactory, log_dir: Path) -> Iterator[Seeing]:
    """The router before a prefill engine with two ranks and a decode engine with one."""
    folder = tmp_path_factory.mktemp("seeing")
    expected = see.run(folder, "transformers", [DISAGGREGATED])[DISAGGREGATED]["expected"]

    def serve(name: str, devices: list[int], role: str) -> Server:
        options = (*engine_options(BLOCK_SIZE), "--dtype", "float32", "--max-model-len", "384")
        options = (*options, "--limit-mm-per-prompt", '{"image": 2, "video": 0}')
        server = engine(
            name,
            folder / DISAGGREGATED,
            devices=devices,
            log_dir=log_dir,
            kv_transfer_config=connector(role),
            emulator=EMULATOR,
            options=options,
        )
        server.environment |= environment()
        return server

    prefill = serve("seeing-prefill", [0, 1], "kv_producer")
    decode = serve("seeing-decode", [2], "kv_consumer")
    front = router([prefill], [decode], log_dir, name="seeing-router")
    with running([prefill, decode, front]):
        yield Seeing(prefill, front, expected)


def ask(server: Server, question: int) -> dict[str, Any]:
    return server.post(
        "/v1/chat/completions",
        {
            "model": MODEL_NAME,
            "messages": chat_of(QUESTIONS[question]),
            "max_tokens": NUM_NEW_TOKENS,
            "temperature": 0,
            "ignore_eos": True,
            "return_token_ids": True,
        },
    )


@pytest.mark.parametrize("question", ASKED)
def test_two_engines_answer_as_transformers_does(question: int, seeing: Seeing) -> None:
    answer = ask(seeing.front, question)
    assert answer["choices"][0]["token_ids"] == seeing.expected[question]["tokens"]
    # All of the prompt but its last token came from the prefill engine.
    num_tokens = seeing.expected[question]["num_prompt_tokens"]
    assert answer["kv_transfer_params"]["blocks"] == -(-(num_tokens - 1) // BLOCK_SIZE)


def test_one_engine_answers_as_transformers_does(seeing: Seeing) -> None:
    answers = [ask(seeing.prefill, question) for question in SAME_WORDS]
    given = [answer["choices"][0]["token_ids"] for answer in answers]
    assert given == [seeing.expected[question]["tokens"] for question in SAME_WORDS]
