# SPDX-License-Identifier: Apache-2.0
"""Faults that users make, as processes: one sentence, nothing left behind, and the next request works."""

import os
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from disaggregated.fleet import MODEL, blocks_in_use, body, complete, connector, engine_options, text_of
from recall import make_question, vocabulary
from servers import HOST, Server, ServerFailed, engine, free_port, started, wait_all

from vllm_ascend.kv_transfer.messages import prompt_digest

OPTIONS = engine_options(block_size=128)
ASK_FOR_REMOTE_DECODE = {"do_remote_decode": True, "do_remote_prefill": False}


@dataclass(frozen=True)
class Engines:
    """Started together, since starting takes most of the time."""

    decode: Server
    """Fails requests whose KV cannot be loaded."""
    stranger: Server
    """A prefill engine that serves another model."""
    taken_port: Server
    unknown_protocol: Server


@pytest.fixture(scope="module")
def engines(log_dir: Path) -> Iterator[Engines]:
    def serve(name: str, device: int, role: str, options: tuple[str, ...] = (), **config: object) -> Server:
        return engine(
            name,
            MODEL,
            devices=[device],
            log_dir=log_dir,
            kv_transfer_config=connector(role, **config),
            options=OPTIONS + options,
        )

    with socket.socket() as occupant:
        occupant.bind((HOST, 0))
        occupant.listen()
        servers = Engines(
            decode=serve("decode", 0, "kv_consumer", kv_load_failure_policy="fail"),
            stranger=serve("stranger", 1, "kv_producer", ("--served-model-name", "other")),
            taken_port=serve("taken-port", 2, "kv_producer", kv_port=occupant.getsockname()[1]),
            unknown_protocol=serve(
                "unknown-protocol", 3, "kv_consumer", kv_connector_extra_config={"protocol": "smoke"}
            ),
        )
        with started(list(vars(servers).values())):
            wait_all([servers.decode, servers.stranger])
            yield servers


@pytest.mark.parametrize(
    ("which", "sentence"),
    [
        pytest.param("taken_port", "is taken; give each engine of this host a kv_port", id="port taken"),
        pytest.param("unknown_protocol", "must be one of tcp, rdma, ascend, got 'smoke'", id="protocol"),
    ],
)
def test_an_engine_that_cannot_start_says_why_and_leaves_nothing(engines: Engines, which: str, sentence: str):
    server: Server = getattr(engines, which)
    with pytest.raises(ServerFailed, match="ended with exit code"):
        server.wait_ready()
    assert sentence in server.log_path.read_text()
    _wait_until_group_is_gone(server)
    with socket.socket() as probe:
        probe.bind((HOST, server.port))


def test_a_peer_that_nobody_reaches_is_a_clean_error_and_the_next_request_works(engines: Engines):
    question = make_question(1, 300)
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
        complete(engines.decode, question, kv_transfer_params=nowhere)
    assert "did not answer within" in engines.decode.log_path.read_text()
    _works_and_holds_nothing(engines.decode)


def test_an_engine_with_another_model_is_refused_by_name_and_lets_go(engines: Engines):
    question = make_question(2, 300)
    prefilled = engines.stranger.post(
        "/v1/completions",
        body(question, model="other", max_tokens=1, kv_transfer_params=ASK_FOR_REMOTE_DECODE),
    )
    assert blocks_in_use(engines.stranger) == 3
    with pytest.raises(ServerFailed, match="answered 5"):
        complete(engines.decode, question, kv_transfer_params=prefilled["kv_transfer_params"])
    said = engines.decode.log_path.read_text()
    assert "model is 'other' there and" in said
    _works_and_holds_nothing(engines.decode)
    _wait_until(lambda: blocks_in_use(engines.stranger) == 0, "the other engine still holds blocks")


def _works_and_holds_nothing(server: Server) -> None:
    question = make_question(3, 200)
    assert question.accepts(text_of(complete(server, question)))
    _wait_until(lambda: blocks_in_use(server) == 0, f"{server.name} still holds blocks")


def _wait_until_group_is_gone(server: Server) -> None:
    def gone() -> bool:
        try:
            os.killpg(server.pid, 0)
        except ProcessLookupError:
            return True
        return False

    _wait_until(gone, f"{server.name} left processes behind")


def _wait_until(reached, complaint: str, patience_s: float = 10) -> None:
    deadline = time.monotonic() + patience_s
    while not reached():
        assert time.monotonic() < deadline, complaint
        time.sleep(0.1)
