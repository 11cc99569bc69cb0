# SPDX-License-Identifier: Apache-2.0
"""Latent attention disaggregated: every rank of either side keeps all latents, and each reads one copy."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from disaggregated.fleet import MODEL, Fleet, complete, start_fleet, text_of
from recall import make_question

LATENT_MODEL = MODEL.with_name("recall_model_mla")


@pytest.fixture(
    scope="module",
    params=[
        pytest.param((2, 1, 128), id="prefill TP 2, decode TP 1, blocks of 128"),
        pytest.param((1, 2, 16), id="prefill TP 1, decode TP 2, blocks of 16"),
    ],
)
def pair(request: pytest.FixtureRequest) -> tuple[int, int, int]:
    sizes: tuple[int, int, int] = request.param
    return sizes


@pytest.fixture(scope="module")
def fleet(pair: tuple[int, int, int], log_dir: Path) -> Iterator[Fleet]:
    yield from start_fleet(log_dir, *pair, model=LATENT_MODEL)


@pytest.mark.parametrize("num_prompt_tokens", [17, 129, 300, 512])
def test_answers_are_right_and_equal_to_one_engines(fleet: Fleet, num_prompt_tokens: int):
    question = make_question(9500 + num_prompt_tokens, num_prompt_tokens, num_answer_tokens=8)
    answer = complete(fleet.front, question)
    assert question.accepts(text_of(answer))
    assert text_of(answer) == text_of(complete(fleet.ordinary, question))


def test_every_decode_rank_reads_each_row_once(fleet: Fleet, pair: tuple[int, int, int]):
    _, decode_tp, block_size = pair
    question = make_question(9900, 2 * block_size + 5)
    pulled = complete(fleet.front, question)["kv_transfer_params"]
    config = json.loads((fleet.model / "config.json").read_text())
    row_bytes = 2 * (config["kv_lora_rank"] + config["qk_rope_head_dim"])
    assert pulled["blocks"] == 3
    assert pulled["bytes"] == decode_tp * 3 * block_size * config["num_hidden_layers"] * row_bytes
