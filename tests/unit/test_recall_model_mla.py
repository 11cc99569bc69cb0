# SPDX-License-Identifier: Apache-2.0
"""The recall model with latent attention is right, and cannot be right with the rows of one block wrong.

transformers caches what an engine caches, with one head: latents where other models have keys, and their
rotated part where those have values.
"""

from pathlib import Path

import pytest
import torch
from recall import make_question
from transformers import AutoModelForCausalLM, AutoTokenizer, DeepseekV3ForCausalLM
from unit.handover import Handover, lost, of_another_block, of_another_request

FOLDER = Path(__file__).parents[2] / "examples" / "recall_model_mla"
LAYERS, HEADS = 2, (0,)


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(FOLDER)


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def model(request) -> DeepseekV3ForCausalLM:
    return AutoModelForCausalLM.from_pretrained(FOLDER, dtype=request.param)


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
def handover(tokenizer) -> Handover:
    model = AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32)
    return Handover(model, tokenizer, [make_question(900 + seed, 301, 8) for seed in range(32)])


@pytest.mark.parametrize("layer", range(LAYERS))
@pytest.mark.parametrize("fault", [lost, of_another_request, of_another_block])
def test_one_block_of_one_layer_wrong_breaks_the_answer(handover, layer, fault):
    for block_size in (16, 128):
        still_right = handover.right(layer, HEADS, fault, block_size)
        assert still_right.float().mean() <= 0.1, f"block size {block_size}"


@pytest.mark.parametrize("layer", range(LAYERS))
@pytest.mark.parametrize("fault", [lost, of_another_request])
def test_one_layer_wrong_over_the_whole_prompt_breaks_every_answer(handover, layer, fault):
    assert not handover.right(layer, HEADS, fault).any()
