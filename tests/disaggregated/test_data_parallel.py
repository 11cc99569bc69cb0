# SPDX-License-Identifier: Apache-2.0
"""Two data-parallel ranks of one `vllm serve`: engines of their own, each of which reads the other's KV."""

from typing import Any

import httpx
from disaggregated.fleet import Fleet, body, on_fleet, recall_fleet, text_of
from recall import Question, make_question
from servers import HOST, Server

pytestmark = on_fleet(recall_fleet)


def test_every_data_parallel_rank_hands_out_kv_at_its_own_port_and_reads_the_others(fleet: Fleet):
    ports = []
    for rank in (0, 1):
        question = make_question(30_000 + rank, 200)
        wish = {"do_remote_decode": True, "do_remote_prefill": False}
        params = ask(fleet["replicated"], rank, question, max_tokens=1, kv_transfer_params=wish)[
            "kv_transfer_params"
        ]
        assert params["remote_host"] == HOST
        assert f"_dp{rank}-" in params["remote_engine_id"]
        ports.append(params["remote_port"])
        answer = ask(fleet["replicated"], 1 - rank, question, kv_transfer_params=params)
        assert question.accepts(text_of(answer))
        assert answer["kv_transfer_params"]["tokens"] == 199
    assert ports[1] == ports[0] + 1


def ask(server: Server, rank: int, question: Question, **more: Any) -> dict[str, Any]:
    """The answer of one data-parallel rank."""
    answer = httpx.post(
        f"{server.url}/v1/completions",
        json=body(question, model="other", **more),
        headers={"X-data-parallel-rank": str(rank)},
        timeout=60,
    )
    parsed: dict[str, Any] = answer.raise_for_status().json()
    return parsed
