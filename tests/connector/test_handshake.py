# SPDX-License-Identifier: Apache-2.0
"""The listener and its callers on real sockets: strangers, silence, recovery."""

from __future__ import annotations

import random
import socket
import threading
import time

import pytest
import zmq

from vllm_ascend.errors import PeerUnreachable, WireError
from vllm_ascend.kv_transfer.handshake import Channel, Lines, Listener
from vllm_ascend.kv_transfer.keeper import Keeper
from vllm_ascend.kv_transfer.messages import (
    Answer,
    AskForEngine,
    Question,
    Refused,
    Release,
    Released,
    RemotePrefill,
    Renew,
    Renewed,
    decode_answer,
    encode,
)


def released(question: Question) -> Answer:
    return Released()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def say(port: int, frames: list[bytes]) -> list[bytes]:
    """What the listener answers to raw frames from a REQ socket."""
    with zmq.Context() as context, context.socket(zmq.REQ) as stranger:
        stranger.setsockopt(zmq.LINGER, 0)
        stranger.connect(f"tcp://127.0.0.1:{port}")
        stranger.send_multipart(frames)
        assert stranger.poll(2000)
        return stranger.recv_multipart()


def test_a_peer_of_another_version_learns_so_by_name():
    with Listener("127.0.0.1", 0, released) as listener:
        answer = decode_answer(say(listener.port, [b"vllm-ascend-kv/0", b""]))
    assert isinstance(answer, Refused)
    assert "run the same release of vllm-ascend on both sides" in answer.reason


def test_the_listener_survives_noise():
    noise = random.Random(0)
    frames = [
        [noise.randbytes(noise.randrange(40)) for _ in range(noise.randrange(1, 5))] for _ in range(200)
    ]
    version, body = encode(AskForEngine())
    frames += [[version, body[:cut]] for cut in range(len(body))]
    with Listener("127.0.0.1", 0, released) as listener:
        for message in frames:
            assert isinstance(decode_answer(say(listener.port, message)), Refused)
        assert isinstance(Channel("127.0.0.1", listener.port, 2).ask(AskForEngine()), Released)


def test_a_refusal_is_an_error_at_the_caller():
    with Listener("127.0.0.1", 0, lambda _: Refused(reason="not today")) as listener:
        channel = Channel("127.0.0.1", listener.port, timeout_s=2)
        with pytest.raises(WireError, match="refused: not today"):
            channel.ask(AskForEngine())
        channel.close()


def test_silence_ends_and_the_next_question_works():
    port = free_port()
    lines = Lines(timeout_s=1)
    started = time.monotonic()
    with pytest.raises(PeerUnreachable, match=rf"127\.0\.0\.1:{port} did not answer within 1 s; start it"):
        lines.ask("127.0.0.1", port, AskForEngine())
    assert time.monotonic() - started < 5
    with Listener("127.0.0.1", port, released):
        assert lines.ask("127.0.0.1", port, AskForEngine()) == Released()
    lines.close()


def test_an_answer_that_comes_too_late_is_not_taken_for_the_next():
    gate = threading.Event()

    def slowly(question: Question) -> Answer:
        gate.wait(10)
        return Renewed(lost=()) if isinstance(question, Renew) else Released()

    with Listener("127.0.0.1", 0, slowly) as listener:
        channel = Channel("127.0.0.1", listener.port, timeout_s=1)
        with pytest.raises(PeerUnreachable):
            channel.ask(Renew(engine_id="e", request_ids=()))
        gate.set()
        assert channel.ask(Release(engine_id="e", request_ids=())) == Released()
        channel.close()


def test_many_threads_may_ask():
    with Listener("127.0.0.1", 0, released) as listener:
        lines = Lines(timeout_s=5)
        answers: list[Answer] = []
        threads = [
            threading.Thread(
                target=lambda: answers.extend(
                    lines.ask("127.0.0.1", listener.port, AskForEngine()) for _ in range(20)
                )
            )
            for _ in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        lines.close()
    assert answers == [Released()] * 80


def remote(port: int, request_id: str, lease_s: float) -> RemotePrefill:
    return RemotePrefill(
        remote_engine_id="e",
        remote_request_id=request_id,
        remote_host="127.0.0.1",
        remote_port=port,
        remote_block_ids=((1,),),
        remote_num_tokens=1,
        remote_block_size=16,
        remote_lease=0,
        remote_lease_s=lease_s,
        remote_prompt_digest=None,
    )


def test_the_keeper_renews_all_waiting_requests_of_a_peer_in_one_message():
    heard: list[Question] = []
    renewed, released = threading.Event(), threading.Event()

    def listen(question: Question) -> Answer:
        heard.append(question)
        (renewed if isinstance(question, Renew) else released).set()
        return Renewed(lost=()) if isinstance(question, Renew) else Released()

    with Listener("127.0.0.1", 0, listen) as listener:
        keeper = Keeper()
        # A peer that never answers delays nobody.
        keeper.hold(remote(free_port(), "x", lease_s=0.3))
        for request_id in ("a", "b", "c"):
            keeper.hold(remote(listener.port, request_id, lease_s=1.5))
        keeper.drop(remote(listener.port, "b", lease_s=1.5))
        assert renewed.wait(10)
        keeper.drop(remote(listener.port, "a", lease_s=1.5))
        keeper.release(remote(listener.port, "c", lease_s=1.5))
        assert released.wait(10)
        count = len(heard)
        # Two renewals would come in this time, if there were still something to renew.
        time.sleep(1.2)
        keeper.close()
        keeper.close()
    assert heard[0] == Renew(engine_id="e", request_ids=("a", "c"))
    assert heard[-1] == Release(engine_id="e", request_ids=("c",))
    assert len(heard) == count
