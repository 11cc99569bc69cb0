# SPDX-License-Identifier: Apache-2.0
"""Prefill TP 3 feeds decode TP 2: ranks hold 2 and 3 of 6 KV heads, none a part of another's."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from disaggregated.fleet import MODEL, Fleet, complete, start_fleet, text_of
from disaggregated.widened import write_widened
from recall import make_question


@pytest.fixture(scope="module")
def fleet(log_dir: Path) -> Iterator[Fleet]:
    yield from start_fleet(log_dir, 3, 2, block_size=16, model=write_widened(MODEL, log_dir / "widened"))


@pytest.mark.parametrize("num_prompt_tokens", [17, 129, 300, 512])
def test_answers_are_right_and_equal_to_one_engines(fleet: Fleet, num_prompt_tokens: int):
    question = make_question(9000 + num_prompt_tokens, num_prompt_tokens, num_answer_tokens=16)
    answer = complete(fleet.front, question)
    assert question.accepts(text_of(answer))
    assert text_of(answer) == text_of(complete(fleet.ordinary, question))
    assert answer["kv_transfer_params"]["sources"] == [0, 1, 2]
