# SPDX-License-Identifier: Apache-2.0
"""The real listener of a prefill engine under 100,000 hostile messages, and under bytes that are no messages.

It answers each or drops it; it never raises, never frees blocks that the sender does not name, and stays
usable. Whoever speaks here is let in; what a stranger can do is less (test_trust.py).
"""

from __future__ import annotations

import random
import socket
import threading
from collections.abc import Iterator
from itertools import islice

import pytest
import zmq
from connector.engines import Engine, engine_config, model_folder, prefilled, running
from connector.hostile import OWN, Frames, hostile_messages

from vllm_ascend.envs import KV_SECRET
from vllm_ascend.kv_transfer.handshake import Channel
from vllm_ascend.kv_transfer.messages import (
    MAX_QUESTION_BYTES,
    AskForEngine,
    decode_answer,
    encode,
)
from vllm_ascend.kv_transfer.messages import Engine as Description
from vllm_ascend.kv_transfer.trust import OPEN, Trust, derive_keys

SEED = 20261122
COUNT = 100_000
PARTS = 20
ON_THE_WAY = 500
HEADS = 4
SECRET = "correct horse battery staple"
VICTIM = "victim-8f41c6"
BLOCKS = [1, 2]


@pytest.fixture(autouse=True)
def _nothing_is_raised(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    raised: list[BaseException | None] = []
    monkeypatch.setattr(threading, "excepthook", lambda arguments: raised.append(arguments.exc_value))
    yield
    assert raised == []


@pytest.fixture(scope="module", params=[pytest.param(None, id="in clear"), pytest.param(SECRET, id="secret")])
def target(request, tmp_path_factory) -> Iterator[tuple[Engine, str, int, Trust]]:
    """A prefill engine that holds a victim's blocks; its id, the port of its listener, and who is let in."""
    with pytest.MonkeyPatch.context() as environment:
        environment.delenv(KV_SECRET.name, raising=False)
        if request.param is not None:
            environment.setenv(KV_SECRET.name, request.param)
        config = engine_config(model_folder(tmp_path_factory.mktemp("model"), HEADS), 1, "kv_producer")
        engine = Engine(config, HEADS)
    with running(engine):
        params = prefilled(engine, VICTIM, 20, BLOCKS)
        trust = OPEN if request.param is None else Trust(derive_keys(request.param))
        yield engine, params["remote_engine_id"], params["remote_port"], trust


def check_usable(engine: Engine, engine_id: str, port: int, trust: Trust) -> set[str]:
    """The listener answers, and the victim's blocks are held. Returns whose blocks were freed."""
    channel = Channel("127.0.0.1", port, 30, trust)
    answer = channel.ask(AskForEngine())
    channel.close()
    assert isinstance(answer, Description)
    assert answer.engine_id == engine_id
    freed = engine.step().finished_sending or set()
    assert freed <= set(OWN)
    return freed


def test_hostile_messages_are_answered_or_dropped(target):
    engine, engine_id, port, trust = target
    # In cipher each message costs more, and the messages are the same once they are open.
    count = COUNT if trust is OPEN else COUNT // 20
    messages = hostile_messages(engine_id, SEED, count)
    freed: set[str] = set()
    for _ in range(PARTS):
        for request_id in OWN:
            prefilled(engine, request_id, 20, BLOCKS)
        with zmq.Context() as context, context.socket(zmq.DEALER) as line:
            line.setsockopt(zmq.LINGER, 0)
            trust.lock_caller(line)
            line.connect(f"tcp://127.0.0.1:{port}")
            answered = speak(line, islice(messages, count // PARTS))
        assert answered == count // PARTS
        freed |= check_usable(*target)
    # Some of them were in order: the test would not see a listener that refuses everything.
    assert freed == set(OWN)


def speak(line: zmq.Socket[bytes], messages: Iterator[Frames]) -> int:
    """Send all messages, read all answers; how many were understood as answers."""
    sent = answered = 0
    while True:
        for frames in islice(messages, ON_THE_WAY - (sent - answered)):
            line.send_multipart([b"", *frames])
            sent += 1
        if sent == answered:
            return answered
        assert line.poll(30_000), f"{sent - answered} messages are not answered"
        _, *frames = line.recv_multipart()
        decode_answer(frames)
        answered += 1


def test_oversized_questions_are_dropped(target):
    _, _, port, trust = target
    version, _ = encode(AskForEngine())
    for size in (MAX_QUESTION_BYTES + 1, 8 * MAX_QUESTION_BYTES):
        with zmq.Context() as context, context.socket(zmq.DEALER) as line:
            line.setsockopt(zmq.LINGER, 0)
            trust.lock_caller(line)
            line.connect(f"tcp://127.0.0.1:{port}")
            line.send_multipart([b"", version, bytes(size)])
            assert not line.poll(300)
        check_usable(*target)


def test_bytes_that_are_no_messages_are_dropped(target):
    _, _, port, _ = target
    source = random.Random(SEED)
    # What ZMQ says first (RFC 23): signature, version 3.1, mechanism.
    greeting = b"\xff" + bytes(8) + b"\x7f\x03\x01" + b"NULL".ljust(20, b"\0") + bytes(32)
    for index in range(300):
        begin = greeting[: source.randrange(len(greeting) + 1)] if index % 2 else b""
        with socket.create_connection(("127.0.0.1", port), timeout=5) as stranger:
            stranger.sendall(begin + source.randbytes(source.randrange(200)))
    check_usable(*target)
