# SPDX-License-Identifier: Apache-2.0
"""One engine generates what transformers generates: chunked prefill, prefix caching, TP 2, windows."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from engine.generate import Answer, Answers
from engine.models import (
    FULL_ATTENTION_MODELS,
    HEAD_MAJOR_RUNS,
    NUM_NEW_TOKENS,
    QUESTIONS,
    RANDOM_MODELS,
    RECALL,
    RUNS,
    VOCAB_SIZE,
    farthest_token_that_matters,
    greedy_tokens,
    log_probabilities,
    prompts_of,
    text_of,
)

COLD, WARM = 0, 1
ROUNDING_SLACK = 1.25
"""How much farther from exact arithmetic than transformers in bfloat16 an engine in bfloat16 may be."""


@pytest.mark.parametrize("name", RANDOM_MODELS)
def test_references_cannot_be_met_by_accident(
    name: str, references: dict[str, list[list[int]]], checkpoints: dict[str, Path]
) -> None:
    tokens = references[name]
    assert all(len(set(output)) > NUM_NEW_TOKENS // 2 for output in tokens)
    assert len({tuple(output) for output in tokens}) == len(tokens)
    one_token_off = prompts_of(name)
    for prompt in one_token_off:
        token = farthest_token_that_matters(name, len(prompt))
        prompt[token] = (prompt[token] + 1) % VOCAB_SIZE
    assert all(a != b for a, b in zip(tokens, greedy_tokens(checkpoints[name], one_token_off), strict=True))


@pytest.mark.parametrize("batch", [pytest.param(COLD, id="cold"), pytest.param(WARM, id="prefixes cached")])
@pytest.mark.parametrize(
    ("size", "name"), RUNS, ids=lambda value: f"TP {value}" if value in (1, 2) else value
)
def test_greedy_tokens_are_those_of_transformers(
    name: str,
    size: int,
    batch: int,
    references: dict[str, list[list[int]]],
    float32_answers: dict[int, Answers],
) -> None:
    assert [answer.tokens for answer in float32_answers[size][name][batch]] == references[name]


@pytest.mark.parametrize("batch", [pytest.param(COLD, id="cold"), pytest.param(WARM, id="prefixes cached")])
@pytest.mark.parametrize("name", HEAD_MAJOR_RUNS)
def test_head_major_pages_give_the_same_tokens(
    name: str,
    batch: int,
    references: dict[str, list[list[int]]],
    head_major_answers: dict[str, list[list[Answer]]],
) -> None:
    answers = head_major_answers[name][batch]
    assert [answer.tokens for answer in answers] == references[name]
    assert batch == COLD or any(answer.num_cached_tokens for answer in answers)


@pytest.mark.parametrize("batch", [pytest.param(COLD, id="cold"), pytest.param(WARM, id="prefixes cached")])
def test_two_pipeline_stages_give_the_same_tokens(
    batch: int, references: dict[str, list[list[int]]], pipeline_answers: list[list[Answer]]
) -> None:
    assert [answer.tokens for answer in pipeline_answers[batch]] == references["llama"]


def test_the_recall_model_recalls(references: dict[str, list[list[int]]]) -> None:
    for question, tokens in zip(QUESTIONS, references[RECALL], strict=True):
        once_round_the_table = (question.num_prompt_tokens - 1) // 2
        assert (
            text_of(tokens).split()[:once_round_the_table] == question.answer.split()[:once_round_the_table]
        )


@pytest.mark.parametrize("size", [1, 2], ids=lambda size: f"TP {size}")
@pytest.mark.parametrize(
    ("name", "cached"),
    [
        pytest.param("llama", [0, 0, 0, 0, 0, 128, 128, 256], id="blocks of 128, the engine's choice"),
        pytest.param("qwen2", [0, 0, 32, 48, 96, 128, 192, 256], id="blocks of 16"),
        pytest.param("qwen3", [0, 0, 32, 32, 96, 128, 192, 256], id="blocks of 32"),
    ],
)
def test_whole_blocks_of_a_known_prompt_come_from_the_cache(
    name: str, cached: list[int], size: int, float32_answers: dict[int, Answers]
) -> None:
    batches = float32_answers[size][name]
    assert [answer.num_cached_tokens for answer in batches[COLD]] == [0] * len(cached)
    assert [answer.num_cached_tokens for answer in batches[WARM]] == cached


@pytest.mark.parametrize("size", [1, 2], ids=lambda size: f"TP {size}")
@pytest.mark.parametrize("name", FULL_ATTENTION_MODELS)
def test_bfloat16_log_probabilities_are_as_exact_as_those_of_transformers(
    name: str, size: int, checkpoints: dict[str, Path], bfloat16_answers: dict[int, Answers]
) -> None:
    (answers,) = bfloat16_answers[size][name]
    tokens = [answer.tokens for answer in answers]
    exact, rounded = (
        log_probabilities(checkpoints[name], prompts_of(name), tokens, dtype)
        for dtype in (torch.float32, torch.bfloat16)
    )
    error = torch.tensor([answer.log_probabilities for answer in answers]) - exact
    allowed = rounded - exact
    assert error.square().mean().sqrt() <= ROUNDING_SLACK * allowed.square().mean().sqrt()
    assert error.abs().max() <= ROUNDING_SLACK * allowed.abs().max()
