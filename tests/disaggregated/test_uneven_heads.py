# SPDX-License-Identifier: Apache-2.0
"""Prefill TP 3 feeds decode TP 2: ranks hold 2 and 3 of 6 KV heads, none a part of another's."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from disaggregated.fleet import MODEL, Fleet, hand_over, member, on_fleet, text_of
from disaggregated.widened import write_widened
from recall import make_question
from servers import Server


def widened_fleet(folder: Path) -> list[Server]:
    model = write_widened(MODEL, folder / "model")
    return [
        member("three", folder, [0, 1, 2], role="kv_producer", block_size=16, model=model),
        member("two", folder, [3, 4], role="kv_consumer", block_size=16, model=model),
    ]


pytestmark = on_fleet(widened_fleet)


@pytest.mark.parametrize("num_prompt_tokens", [17, 129, 300, 512])
def test_answers_are_right(fleet: Fleet, num_prompt_tokens: int):
    question = make_question(9000 + num_prompt_tokens, num_prompt_tokens, num_answer_tokens=16)
    answer = hand_over(fleet["three"], fleet["two"], question)
    assert question.accepts(text_of(answer))
    assert answer["kv_transfer_params"]["sources"] == [0, 1, 2]


def test_requests_that_together_need_more_blocks_than_there_are_wait_and_end_right(fleet: Fleet):
    """Twelve prompts of 60 to 467 tokens are 203 blocks; either engine has 80."""
    questions = [make_question(9700 + index, 60 + 37 * index, num_answer_tokens=12) for index in range(12)]
    prefills, decodes = [fleet["three"]] * 12, [fleet["two"]] * 12
    with ThreadPoolExecutor(len(questions)) as pool:
        answers = [text_of(answer) for answer in pool.map(hand_over, prefills, decodes, questions)]
    assert [question.accepts(answer) for question, answer in zip(questions, answers, strict=True)] == [
        True
    ] * 12
