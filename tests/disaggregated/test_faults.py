# SPDX-License-Identifier: Apache-2.0
"""Faults that users make, as processes: one sentence, nothing left behind, and the next request works."""

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from disaggregated.fleet import (
    MODEL,
    Fleet,
    blocks_in_use,
    complete,
    connector,
    engine_options,
    on_fleet,
    prefilled,
    recall_fleet,
    text_of,
    wait_until,
)
from recall import make_question, vocabulary
from servers import HOST, Server, ServerFailed, engine, free_port, started

from vllm_ascend.kv_transfer.messages import prompt_digest


@pytest.fixture(scope="module")
def cannot_start(log_dir: Path) -> Iterator[dict[str, Server]]:
    """Engines, by what is wrong; started together, since that takes most of the time."""

    def serve(name: str, **config: object) -> Server:
        return engine(
            name,
            MODEL,
            devices=[0],
            log_dir=log_dir,
            kv_transfer_config=connector("kv_both", **config),
            options=engine_options(128),
        )

    with socket.socket() as occupant:
        occupant.bind((HOST, 0))
        occupant.listen()
        servers = [
            serve("port", kv_port=occupant.getsockname()[1]),
            serve("protocol", kv_connector_extra_config={"protocol": "smoke"}),
        ]
        with started(servers):
            yield {server.name: server for server in servers}


@pytest.mark.parametrize(
    ("which", "sentence"),
    [
        pytest.param("port", "is taken; give each engine of this host a kv_port", id="port taken"),
        pytest.param("protocol", "must be one of tcp, rdma, ascend, got 'smoke'", id="protocol"),
    ],
)
def test_an_engine_that_cannot_start_says_why_and_leaves_nothing(
    cannot_start: dict[str, Server], which: str, sentence: str
):
    server = cannot_start[which]
    with pytest.raises(ServerFailed, match="ended with exit code"):
        server.wait_ready()
    assert sentence in server.log_path.read_text()
    _wait_until_group_is_gone(server)
    with socket.socket() as probe:
        probe.bind((HOST, server.port))


@on_fleet(recall_fleet)
def test_a_peer_that_nobody_reaches_is_a_clean_error_and_the_next_request_works(fleet: Fleet):
    question = make_question(50_001, 300)
    nowhere = {
        "do_remote_prefill": True,
        "do_remote_decode": False,
        "remote_engine_id": "gone",
        "remote_request_id": "gone",
        "remote_host": HOST,
        "remote_port": free_port(),
        "remote_block_ids": [[1, 2, 3]],
        "remote_num_tokens": 300,
        "remote_block_size": 128,
        "remote_lease": 0,
        "remote_lease_s": 30.0,
        "remote_prompt_digest": prompt_digest([vocabulary().index(word) for word in question.prompt.split()]),
        "tp_size": 1,
    }
    with pytest.raises(ServerFailed, match="answered 5"):
        complete(fleet["one"], question, kv_transfer_params=nowhere)
    assert "did not answer within" in fleet["one"].log_path.read_text()
    _works_and_holds_nothing(fleet["one"])


@on_fleet(recall_fleet)
def test_an_engine_with_another_model_is_refused_by_name_and_lets_go(fleet: Fleet):
    question = make_question(50_002, 300)
    params = prefilled(fleet["replicated"], question, model="other")
    assert blocks_in_use(fleet["replicated"]) == 3
    with pytest.raises(ServerFailed, match="answered 5"):
        complete(fleet["one"], question, kv_transfer_params=params)
    said = fleet["one"].log_path.read_text()
    assert "model is 'other' there and" in said
    _works_and_holds_nothing(fleet["one"])
    wait_until(lambda: blocks_in_use(fleet["replicated"]) == 0, lambda: "the other engine still holds blocks")


def _works_and_holds_nothing(server: Server) -> None:
    question = make_question(50_003, 200)
    assert question.accepts(text_of(complete(server, question)))
    wait_until(lambda: blocks_in_use(server) == 0, lambda: f"{server.name} still holds blocks")


def _wait_until_group_is_gone(server: Server) -> None:
    def gone() -> bool:
        try:
            os.killpg(server.pid, 0)
        except ProcessLookupError:
            return True
        return False

    wait_until(gone, lambda: f"{server.name} left processes behind")
