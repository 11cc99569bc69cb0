# SPDX-License-Identifier: Apache-2.0
"""Latent attention disaggregated: every rank of either side keeps all latents, and each reads one copy.

The model is a mixture of experts. Two engines are data-parallel ranks, servers of their own that share the
experts; each step of one is a step of the other.
"""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from disaggregated.fleet import (
    MODEL,
    Fleet,
    complete,
    hand_over,
    log_probabilities_of,
    member,
    on_fleet,
    text_of,
)
from recall import make_question
from servers import HOST, Server, free_port

LATENT_MODEL = MODEL.with_name("recall_model_mla")


def latent_fleet(folder: Path) -> list[Server]:
    kv_port, rpc_port = free_port(), free_port()
    replicated = ("--enable-expert-parallel", "--data-parallel-size", "2", "--data-parallel-address", HOST)
    replicated = (*replicated, "--data-parallel-rpc-port", str(rpc_port), "--data-parallel-rank")
    ranks = [
        member(
            f"rank-{rank}",
            folder,
            [rank],
            model=LATENT_MODEL,
            options=(*replicated, str(rank)),
            kv_port=kv_port,
        )
        for rank in range(2)
    ]
    return [*ranks, member("two", folder, [2, 3], block_size=16, model=LATENT_MODEL)]


pytestmark = on_fleet(latent_fleet)

DOWN = pytest.param("two", "rank-0", id="prefill TP 2, decode TP 1, blocks of 16 to 128")
UP = pytest.param("rank-1", "two", id="prefill TP 1, decode TP 2, blocks of 128 to 16")


@pytest.mark.parametrize(("prefill", "decode"), [DOWN, UP])
@pytest.mark.parametrize("num_prompt_tokens", [17, 129, 300, 512])
def test_answers_are_right(fleet: Fleet, prefill: str, decode: str, num_prompt_tokens: int):
    question = make_question(9500 + num_prompt_tokens + ord(prefill[0]), num_prompt_tokens)
    assert question.accepts(text_of(hand_over(fleet[prefill], fleet[decode], question)))


def test_log_probabilities_are_those_of_one_engine(fleet: Fleet):
    question = make_question(9800, 333, num_answer_tokens=16)
    ours = log_probabilities_of(hand_over(fleet["two"], fleet["rank-0"], question, logprobs=0))
    reference = log_probabilities_of(complete(fleet["rank-1"], question, logprobs=0))
    # bf16 has 8 bits of mantissa, and two ranks add in another order than one does.
    assert ours == pytest.approx(reference, abs=0.05)


@pytest.mark.parametrize(
    ("prefill", "decode", "num_prompt_tokens", "rows"),
    [
        pytest.param("two", "rank-0", 261, 272, id="prefill TP 2, decode TP 1"),
        pytest.param("rank-1", "two", 261, 2 * 272, id="prefill TP 1, decode TP 2"),
    ],
)
def test_every_decode_rank_reads_each_row_once(
    fleet: Fleet, prefill: str, decode: str, num_prompt_tokens: int, rows: int
):
    """Of 260 tokens whole pages of 16, the smaller size."""
    question = make_question(9900 + ord(prefill[0]), num_prompt_tokens)
    pulled = hand_over(fleet[prefill], fleet[decode], question)["kv_transfer_params"]
    config = json.loads((LATENT_MODEL / "config.json").read_text())
    row_bytes = 2 * (config["kv_lora_rank"] + config["qk_rope_head_dim"])
    assert pulled["bytes"] == rows * config["num_hidden_layers"] * row_bytes


def test_data_parallel_ranks_with_unequal_numbers_of_tokens_answer_right(fleet: Fleet):
    """Both prefill and decode at the same time, prompts of other lengths than the other rank has."""
    ranks = [fleet["rank-0"], fleet["rank-1"]]
    questions = [make_question(9000 + n, n) for n in range(100, 340, 20)]
    prefills, decodes = ranks * 6, ranks[::-1] * 6
    with ThreadPoolExecutor(len(questions)) as pool:
        answers = list(pool.map(hand_over, prefills, decodes, questions))
    assert [q.accepts(text_of(answer)) for q, answer in zip(questions, answers, strict=True)] == [True] * 12
    assert all(
        answer["kv_transfer_params"]["tokens"] == 99 + 20 * index for index, answer in enumerate(answers)
    )
