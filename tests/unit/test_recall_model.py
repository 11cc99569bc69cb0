# SPDX-License-Identifier: Apache-2.0
"""The recall model is right, and cannot be right with one KV head of one block wrong.

Runs it with transformers on the CPU, as one engine hands over to another (handover.py).
"""

from pathlib import Path

import pytest
import torch
from recall import MAX_PROMPT_TOKENS, MIN_PROMPT_TOKENS, make_question
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM
from unit.handover import Handover, lost, of_another_block, of_another_request

FOLDER = Path(__file__).parents[2] / "examples" / "recall_model"
LAYERS, KV_HEADS = 2, 4
EVERY_HEAD = [(layer, head) for layer in range(LAYERS) for head in range(KV_HEADS)]


def of_the_next_head(clean: Tensor, head: int) -> Tensor:
    return clean[:, (head + 1) % KV_HEADS]


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(FOLDER)


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def model(request) -> LlamaForCausalLM:
    return AutoModelForCausalLM.from_pretrained(FOLDER, dtype=request.param)


@pytest.fixture(scope="module")
def model_fp32() -> LlamaForCausalLM:
    return AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32)


@pytest.mark.parametrize(
    ("num_prompt_tokens", "num_answer_tokens", "count"),
    [
        pytest.param(17, 8, 128, id="a block of 16 and one token"),
        pytest.param(128, 8, 128, id="one block of 128"),
        pytest.param(300, 16, 64, id="three blocks of 128, longer answers"),
        pytest.param(512, 8, 64, id="the longest prompts"),
    ],
)
def test_at_least_99_percent_of_unseen_prompts_are_right(
    model, tokenizer, num_prompt_tokens, num_answer_tokens, count
):
    questions = [make_question(seed, num_prompt_tokens, num_answer_tokens) for seed in range(count)]
    assert Handover(model, tokenizer, questions).right().float().mean() >= 0.99


@pytest.fixture(scope="module")
def handover(model_fp32, tokenizer) -> Handover:
    return Handover(model_fp32, tokenizer, [make_question(900 + seed, 301, 8) for seed in range(32)])


@pytest.mark.parametrize(("layer", "head"), EVERY_HEAD)
@pytest.mark.parametrize("fault", [lost, of_another_request, of_another_block, of_the_next_head])
def test_one_head_of_one_block_wrong_breaks_the_answer(handover, layer, head, fault):
    for block_size in (16, 128):
        still_right = handover.right(layer, [head], fault, block_size)
        assert still_right.float().mean() <= 0.1, f"block size {block_size}"


@pytest.mark.parametrize(("layer", "head"), EVERY_HEAD)
@pytest.mark.parametrize("fault", [lost, of_another_request, of_the_next_head])
def test_one_head_wrong_over_the_whole_prompt_breaks_every_answer(handover, layer, head, fault):
    assert not handover.right(layer, [head], fault).any()


@pytest.mark.parametrize("num_prompt_tokens", [17, 18, 127, 128, 129, 512])
def test_a_prompt_has_as_many_tokens_as_asked_for(tokenizer, num_prompt_tokens):
    question = make_question(1, num_prompt_tokens, 8)
    assert len(tokenizer(question.prompt).input_ids) == num_prompt_tokens
    assert tokenizer.unk_token_id not in tokenizer(f"{question.prompt} {question.answer}").input_ids


def test_the_answer_follows_the_table():
    question = make_question(seed=5, num_prompt_tokens=MIN_PROMPT_TOKENS, num_answer_tokens=6)
    words = question.prompt.split()
    number, answer = words[-1], []
    for position in question.pair_positions:
        assert words[position] == f"{number}:"
        number = words[position + 1].removesuffix(",")
        answer.append(number)
    assert question.accepts(" ".join(answer))
    assert not question.accepts(" ".join(answer[:-1]))


@pytest.mark.parametrize(
    ("num_prompt_tokens", "num_answer_tokens", "complaint"),
    [
        pytest.param(MIN_PROMPT_TOKENS - 1, 8, "trained on", id="shorter than any it was trained on"),
        pytest.param(MAX_PROMPT_TOKENS + 1, 8, "trained on", id="longer than any it was trained on"),
        pytest.param(100, 0, "at least 1", id="no answer"),
    ],
)
def test_questions_that_make_no_sense_are_refused(num_prompt_tokens, num_answer_tokens, complaint):
    with pytest.raises(ValueError, match=complaint):
        make_question(1, num_prompt_tokens, num_answer_tokens)
