# SPDX-License-Identifier: Apache-2.0
"""Data-parallel ranks as servers of their own, which share a mixture's experts: each reads the other's KV."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from disaggregated.fleet import MODEL, connector, engine_options, hand_over, text_of
from recall import make_question
from servers import HOST, Server, engine, free_port, running


@pytest.fixture(scope="module")
def ranks(log_dir: Path) -> Iterator[list[Server]]:
    kv_port, rpc_port = free_port(), free_port()
    servers = [
        engine(
            f"rank-{rank}",
            MODEL.with_name("recall_model_mla"),
            devices=[rank],
            log_dir=log_dir,
            kv_transfer_config=connector("kv_both", kv_port=kv_port),
            options=(
                *engine_options(128),
                *("--enable-expert-parallel", "--data-parallel-size", "2", "--data-parallel-rank", str(rank)),
                *("--data-parallel-address", HOST, "--data-parallel-rpc-port", str(rpc_port)),
            ),
        )
        for rank in range(2)
    ]
    with running(servers):
        yield servers


def test_ranks_with_unequal_numbers_of_tokens_answer_right(ranks: list[Server]):
    """Both prefill and decode at the same time, prompts of other lengths than the other rank has."""
    questions = [make_question(9000 + n, n, num_answer_tokens=8) for n in range(100, 340, 20)]
    prefills, decodes = ranks * 6, ranks[::-1] * 6
    with ThreadPoolExecutor(len(questions)) as pool:
        answers = list(pool.map(hand_over, prefills, decodes, questions))
    assert [q.accepts(text_of(answer)) for q, answer in zip(questions, answers, strict=True)] == [True] * 12
    assert all(
        answer["kv_transfer_params"]["tokens"] == 99 + 20 * index for index, answer in enumerate(answers)
    )
