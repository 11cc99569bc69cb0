# SPDX-License-Identifier: Apache-2.0
"""Strangers at a listener with a secret, and requests that point decode elsewhere."""

from __future__ import annotations

import contextlib
import ipaddress
import logging
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from connector.engines import (
    BLOCK_SIZE,
    Engine,
    admit,
    engine_config,
    finish,
    model_folder,
    prefilled,
    running,
)

from vllm_ascend.envs import KV_SECRET
from vllm_ascend.errors import PeerNotAdmitted, PeerUnreachable
from vllm_ascend.kv_transfer.handshake import Channel, Lines, Listener
from vllm_ascend.kv_transfer.messages import (
    Answer,
    AskForEngine,
    Done,
    DoneNoted,
    Question,
    Release,
    Released,
    Renew,
)
from vllm_ascend.kv_transfer.trust import OPEN, Keys, Trust, derive_keys

SECRET = "correct horse battery staple"
KEYS = derive_keys(SECRET)
OTHER = derive_keys("a secret of somebody else")
TRUST = Trust(KEYS)
HEADS = 4
LEASE_S = 2.0

STRANGERS = [
    pytest.param(OPEN, "broke off the handshake", id="no secret"),
    pytest.param(Trust(OTHER), "broke off the handshake", id="another secret"),
    pytest.param(
        Trust(Keys(listener=KEYS.listener, caller=OTHER.caller)),
        "does not admit this machine",
        id="the listener's public key without the secret",
    ),
]


both_ways = pytest.mark.parametrize(
    "trust", [pytest.param(OPEN, id="in clear"), pytest.param(TRUST, id="with a secret")]
)


def released(question: Question) -> Answer:
    return Released()


@pytest.mark.parametrize(("stranger", "reason"), STRANGERS)
def test_a_stranger_is_not_answered_and_both_sides_say_why(stranger, reason, caplog_vllm):
    heard: list[Question] = []

    def answer(question: Question) -> Answer:
        heard.append(question)
        return Released()

    with Listener("127.0.0.1", 0, answer, TRUST) as listener:
        channel = Channel("127.0.0.1", listener.port, 2, stranger)
        with pytest.raises(PeerUnreachable, match=f"did not answer within 2 s; it {reason}"):
            channel.ask(AskForEngine())
        assert heard == []
        friend = Channel("127.0.0.1", listener.port, 5, TRUST)
        assert friend.ask(AskForEngine()) == Released()
        friend.close()
    if stranger.keys is None or stranger.keys.listener != KEYS.listener:
        assert "did not finish the handshake: it has not the same secret" in only_warning(caplog_vllm)


def test_a_listener_without_a_secret_is_not_taken_for_one_with_it(caplog_vllm):
    with Listener("127.0.0.1", 0, released) as listener:
        channel = Channel("127.0.0.1", listener.port, 2, TRUST)
        with pytest.raises(
            PeerUnreachable, match="it broke off the handshake: the two have not the same secret"
        ):
            channel.ask(AskForEngine())
    assert "it has a secret and this engine none" in caplog_vllm.text


@both_ways
def test_what_is_said_cannot_be_read_on_the_way(trust):
    question = Release(engine_id="the-engine", request_ids=("the-request",))
    with Listener("127.0.0.1", 0, released, trust) as listener, tapped(listener.port) as (port, tape):
        channel = Channel("127.0.0.1", port, 5, trust)
        assert channel.ask(question) == Released()
        channel.close()
    seen = b"".join(part for _, part in tape)
    assert (b"the-engine" in seen) == (b"Released" in seen) == (trust is OPEN)


@both_ways
def test_a_recorded_line_with_a_secret_cannot_be_played_again(trust):
    heard: list[Question] = []

    def answer(question: Question) -> Answer:
        heard.append(question)
        return Released()

    with Listener("127.0.0.1", 0, answer, trust) as listener:
        with tapped(listener.port) as (port, tape):
            channel = Channel("127.0.0.1", port, 5, trust)
            channel.ask(Release(engine_id="the-engine", request_ids=("the-request",)))
            channel.close()
        said_again = played_again(tape, listener.port)
        friend = Channel("127.0.0.1", listener.port, 5, trust)
        friend.ask(AskForEngine())
        friend.close()
    assert (b"Released" in said_again) == (trust is OPEN)
    assert len(heard) == (3 if trust is OPEN else 2)


def test_a_caller_from_elsewhere_is_turned_away(caplog_vllm):
    elsewhere = Trust(networks=(ipaddress.ip_network("10.1.0.0/16"),))
    with Listener("127.0.0.1", 0, released, elsewhere) as listener:
        channel = Channel("127.0.0.1", listener.port, 2)
        with pytest.raises(
            PeerUnreachable, match="it does not admit this machine; list this machine's network"
        ):
            channel.ask(AskForEngine())
    assert "turned 127.0.0.1 away, which is not in peer_networks" in caplog_vllm.text


def test_nobody_outside_the_networks_is_called():
    with silent_server() as (port, callers):
        lines = Lines(0.2, Trust(networks=(ipaddress.ip_network("10.1.0.0/16"),)))
        with pytest.raises(PeerNotAdmitted):
            lines.ask("127.0.0.1", port, AskForEngine())
        lines.close()
        assert callers() == 0


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Engine, Engine]]:
    """Two engines that share a secret and list loopback."""
    model = model_folder(tmp_path_factory.mktemp("model"), HEADS)
    options = {"lease_s": LEASE_S, "peer_networks": ["127.0.0.0/8"]}
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv(KV_SECRET.name, SECRET)
        prefill = Engine(engine_config(model, 2, "kv_producer", options), HEADS)
        decode = Engine(engine_config(model, 1, "kv_consumer", options), HEADS)
    with running(prefill, decode):
        yield prefill, decode


def test_engines_that_share_a_secret_exchange_kv(engines):
    prefill, decode = engines
    prefill.pages(0).random_()
    prefill.pages(1).random_()
    params = prefilled(prefill, "p", 2 * BLOCK_SIZE, [1, 2])
    admit(decode, "d", 2 * BLOCK_SIZE, [3, 4], params)
    output = decode.step_until(lambda output: output.finished_recving == {"d"})
    assert not output.failed_recving
    assert torch.equal(decode.pages(0).cpu()[:, [3, 4], ..., 2:, :], prefill.pages(1).cpu()[:, [1, 2]])
    freed = prefill.step_until(lambda output: bool(output.finished_sending), LEASE_S / 2)
    assert freed.finished_sending == {"p"}


@pytest.mark.parametrize(("stranger", "reason"), STRANGERS)
def test_a_stranger_gets_no_regions_no_done_and_no_lease(engines, stranger, reason):
    prefill, _ = engines
    params = prefilled(prefill, "p", 20, [1, 2])
    engine_id, request_id = params["remote_engine_id"], params["remote_request_id"]
    channel = Channel(params["remote_host"], params["remote_port"], 0.2, stranger)
    for question in (
        AskForEngine(),
        Done(engine_id=engine_id, request_id=request_id, reader="r", num_readers=1),
        Release(engine_id=engine_id, request_ids=(request_id,)),
        Renew(engine_id=engine_id, request_ids=(request_id,)),
    ):
        with pytest.raises(PeerUnreachable):
            channel.ask(question)
    assert not prefill.step().finished_sending
    friend = Channel(params["remote_host"], params["remote_port"], 5, TRUST)
    done = Done(engine_id=engine_id, request_id=request_id, reader="r", num_readers=1)
    assert friend.ask(done) == DoneNoted(held=True)
    assert prefill.step().finished_sending == {"p"}
    friend.close()


def test_a_request_that_points_elsewhere_is_computed_here(engines, caplog_vllm):
    prefill, decode = engines
    params = prefilled(prefill, "p", 20, [1, 2])
    for request_id, host in (("d1", "192.0.2.1"), ("d2", "localhost")):
        wanted, num_external = admit(decode, request_id, 20, [1, 2], {**params, "remote_host": host})
        assert num_external == 0
        assert finish(decode, wanted) is None
        assert f"request {request_id} is computed here: {host} is not an address in peer_networks" in (
            caplog_vllm.text
        )


def test_a_listener_without_a_secret_warns_once(tmp_path, monkeypatch, caplog_vllm):
    monkeypatch.delenv(KV_SECRET.name, raising=False)
    with running(Engine(engine_config(model_folder(tmp_path, HEADS), 2, "kv_producer"), HEADS)):
        said = [record for record in caplog_vllm.records if "has no secret" in record.getMessage()]
    assert len({id(record) for record in said}) == 1


def only_warning(log: pytest.LogCaptureFixture) -> str:
    # pytest may hear one record at two loggers.
    (record,) = {id(heard): heard for heard in log.records if heard.levelno == logging.WARNING}.values()
    return record.getMessage()


@contextmanager
def tapped(port: int) -> Iterator[tuple[int, list[tuple[bool, bytes]]]]:
    """A relay to `port` of this machine for one line, and what it carries: whether from the caller, bytes."""
    tape: list[tuple[bool, bytes]] = []
    with socket.create_server(("127.0.0.1", 0)) as server:

        def relay() -> None:
            near, _ = server.accept()
            far = socket.create_connection(("127.0.0.1", port))
            back = threading.Thread(target=pump, args=(far, near, False))
            back.start()
            pump(near, far, True)
            back.join()
            near.close()
            far.close()

        def pump(source: socket.socket, sink: socket.socket, from_caller: bool) -> None:
            while part := source.recv(65536):
                tape.append((from_caller, part))
                sink.sendall(part)
            sink.shutdown(socket.SHUT_WR)

        thread = threading.Thread(target=relay)
        thread.start()
        yield server.getsockname()[1], tape
        thread.join(5)


def played_again(tape: list[tuple[bool, bytes]], port: int) -> bytes:
    """What a listener says when the caller's part of a tape is played to it in the order of the tape.

    Raises:
        TimeoutError: it said less than on the tape, and did not hang up.
    """
    said, due = b"", 0
    with socket.create_connection(("127.0.0.1", port)) as stranger, contextlib.suppress(ConnectionError):
        stranger.settimeout(5)
        for from_caller, part in tape:
            if from_caller:
                stranger.sendall(part)
                continue
            due += len(part)
            while len(said) < due and (more := stranger.recv(65536)):
                said += more
    return said


@contextmanager
def silent_server() -> Iterator[tuple[int, Callable[[], int]]]:
    """A port of this machine, and how many have connected to it."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.3)

        def callers() -> int:
            try:
                server.accept()[0].close()
            except TimeoutError:
                return 0
            return 1

        yield server.getsockname()[1], callers
