# SPDX-License-Identifier: Apache-2.0
"""Models that see or hear give the greedy tokens and log-probabilities of transformers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from engine import hearing, pictures, see
from engine.families import LOG_PROBABILITY_TOLERANCE
from engine.hearing import HEARING
from engine.pictures import QUESTIONS, SEEING
from engine.sensing import BLOCK_SIZE

MIN_DISTINCT_TOKENS = 4
Answers = list[dict[str, Any]]


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What `see` writes; one process starts all engines in turn."""
    return see.run(tmp_path_factory.mktemp("pictures"), "engines", [*SEEING, *HEARING])


@pytest.mark.parametrize("name", [*SEEING, *HEARING])
def test_references_wander_and_depend_on_what_is_seen_or_heard(name: str, answers: dict[str, Any]) -> None:
    tokens = [answer["tokens"] for answer in answers[name]["expected"]]
    assert all(len(set(output)) >= MIN_DISTINCT_TOKENS for output in tokens)
    one, other = hearing.SAME_WORDS if name in HEARING else pictures.SAME_WORDS
    assert tokens[one][:4] != tokens[other][:4]


@pytest.mark.parametrize("name", [*SEEING, *HEARING])
@pytest.mark.parametrize("time", range(see.TIMES))
def test_tokens_and_log_probabilities_are_those_of_transformers(
    name: str, time: int, answers: dict[str, Any]
) -> None:
    expected: Answers = answers[name]["expected"]
    given: Answers = answers[name]["given"][time]
    assert [answer["tokens"] for answer in given] == [answer["tokens"] for answer in expected]
    apart = [
        (torch.tensor(g["log_probabilities"]) - torch.tensor(e["log_probabilities"])).abs().max()
        for g, e in zip(given, expected, strict=True)
    ]
    assert max(apart) <= LOG_PROBABILITY_TOLERANCE


@pytest.mark.parametrize("name", SEEING)
def test_prefixes_with_pictures_are_cached_by_what_the_pictures_show(
    name: str, answers: dict[str, Any]
) -> None:
    """Asked again, all whole blocks before a prompt's last token are there, for either of two pictures."""
    first, again = answers[name]["given"]
    lengths = [answer["num_prompt_tokens"] for answer in answers[name]["expected"]]
    assert len(lengths) == len(QUESTIONS)
    # The last question begins with a picture with which an earlier one began.
    assert [answer["num_cached_tokens"] for answer in first] == [0] * (len(QUESTIONS) - 1) + [BLOCK_SIZE]
    whole_blocks = [(length - 1) // BLOCK_SIZE * BLOCK_SIZE for length in lengths]
    assert [answer["num_cached_tokens"] for answer in again] == whole_blocks
