# SPDX-License-Identifier: Apache-2.0
"""Two data-parallel ranks of one `vllm serve`: engines of their own, each of which reads the other's KV."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from disaggregated.fleet import MODEL, body, connector, engine_options, text_of
from recall import make_question
from servers import HOST, Server, engine, free_port, running

KV_PORT = free_port()


@pytest.fixture(scope="module")
def ranks(log_dir: Path) -> Iterator[Server]:
    replicated = engine(
        "replicated",
        MODEL,
        devices=[0, 1],
        tp_size=1,
        log_dir=log_dir,
        # Sizes as deployments of earlier releases give them.
        kv_transfer_config=connector(
            "kv_both", kv_port=KV_PORT, kv_connector_extra_config={"prefill": {"tp_size": 1, "dp_size": 2}}
        ),
        # vLLM would start an API server for each rank.
        options=(*engine_options(64), "--data-parallel-size", "2", "--api-server-count", "1"),
    )
    with running([replicated]):
        yield replicated


@pytest.mark.parametrize("rank", [0, 1])
def test_every_data_parallel_rank_hands_out_kv_at_its_own_port_and_reads_the_others(ranks: Server, rank: int):
    question = make_question(30_000 + rank, 200, num_answer_tokens=8)

    def ask(rank: int, **more: Any) -> dict[str, Any]:
        answer = httpx.post(
            f"{ranks.url}/v1/completions",
            json=body(question, **more),
            headers={"X-data-parallel-rank": str(rank)},
            timeout=60,
        )
        parsed: dict[str, Any] = answer.raise_for_status().json()
        return parsed

    wish = {"do_remote_decode": True, "do_remote_prefill": False}
    params = ask(rank, max_tokens=1, kv_transfer_params=wish)["kv_transfer_params"]
    assert (params["remote_host"], params["remote_port"]) == (HOST, KV_PORT + rank)
    assert f"_dp{rank}-" in params["remote_engine_id"]
    answer = ask(1 - rank, kv_transfer_params=params)
    assert question.accepts(text_of(answer))
    assert answer["kv_transfer_params"]["tokens"] == 199
