# SPDX-License-Identifier: Apache-2.0
"""Asking a peer and answering peers: sockets, and nothing about what is said.

A prefill engine has one `Listener`. It binds the address it is told, never all interfaces by itself. A decode
rank asks through `Lines`. Every wait has an end, and a socket that failed once is replaced.
"""

from __future__ import annotations

import errno
import threading
from collections import deque
from collections.abc import Callable
from types import TracebackType

import zmq

from vllm_ascend.errors import ConfigError, PeerUnreachable, WireError
from vllm_ascend.kv_transfer.messages import (
    MAX_MESSAGE_BYTES,
    Answer,
    Question,
    Refused,
    decode_answer,
    decode_question,
    encode,
)

_POLL_MS = 100
"""How long the listener may take to notice that it should end."""


class Listener:
    """Answers questions at one address, in a thread of its own, until closed."""

    def __init__(self, host: str, port: int, answer: Callable[[Question], Answer]) -> None:
        """Bind at once; port 0 takes a free one. `answer` is called in the listener's thread.

        Raises ConfigError if the address cannot be bound.
        """
        self._answer = answer
        self._closing = threading.Event()
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.MAXMSGSIZE, MAX_MESSAGE_BYTES)
        try:
            self._socket.bind(f"tcp://{host}:{port}")
        except zmq.ZMQError as error:
            self._context.destroy(linger=0)
            raise ConfigError(_cannot_bind(host, port, error)) from error
        self.host = host
        self.port = int(self._socket.getsockopt_string(zmq.LAST_ENDPOINT).rpartition(":")[2])
        # A daemon, so that an engine which fails to start does not hang in it; close() is its usual end.
        self._thread = threading.Thread(target=self._serve, name="kv-listener", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop answering and free the port. May be called twice."""
        self._closing.set()
        self._thread.join()
        self._context.destroy(linger=0)

    def __enter__(self) -> Listener:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _serve(self) -> None:
        while not self._closing.is_set():
            if self._socket.poll(_POLL_MS):
                identity, *frames = self._socket.recv_multipart()
                self._socket.send_multipart([identity, b"", *encode(self._answer_to(frames))])

    def _answer_to(self, frames: list[bytes]) -> Answer:
        try:
            # A question begins with the empty frame that a REQ socket puts before it.
            return self._answer(decode_question(frames[1:] if frames[:1] == [b""] else frames))
        except WireError as error:
            return Refused(reason=str(error))


class Lines:
    """Channels to any number of listeners, for any number of threads; each serves one thread at a time."""

    def __init__(self, timeout_s: float) -> None:
        """`timeout_s` bounds each question."""
        self._timeout_s = timeout_s
        self._idle: dict[tuple[str, int], deque[Channel]] = {}

    def ask(self, host: str, port: int, question: Question) -> Answer:
        """The answer of the listener at `host`, `port`. Raises PeerUnreachable or WireError."""
        idle = self._idle.setdefault((host, port), deque())
        try:
            channel = idle.pop()
        except IndexError:
            channel = Channel(host, port, self._timeout_s)
        try:
            return channel.ask(question)
        finally:
            idle.append(channel)

    def close(self) -> None:
        """Hang up everywhere. No thread may ask any more. May be called twice."""
        while self._idle:
            _, channels = self._idle.popitem()
            for channel in channels:
                channel.close()


class Channel:
    """A line to one listener, for one thread at a time."""

    def __init__(self, host: str, port: int, timeout_s: float) -> None:
        """Connect when first used. `timeout_s` bounds each question."""
        self.address = f"{host}:{port}"
        self._timeout_s = timeout_s
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context.instance()
        self._socket: zmq.Socket[bytes] | None = None

    def ask(self, question: Question) -> Answer:
        """The listener's answer.

        Raises PeerUnreachable if none comes in time, WireError if the peer refuses or is not understood. The
        next question starts on a fresh socket then.
        """
        socket, self._socket = self._socket or self._connect(), None
        try:
            socket.send_multipart(encode(question))
            if not socket.poll(int(self._timeout_s * 1000)):
                raise self._unreachable(f"did not answer within {self._timeout_s:g} s")
            answer = decode_answer(socket.recv_multipart())
            self._socket = socket
        except zmq.ZMQError as error:
            raise self._unreachable(f"cannot be asked ({error})") from error
        finally:
            if self._socket is None:
                socket.close(linger=0)
        if isinstance(answer, Refused):
            raise WireError(f"prefill engine at {self.address} refused: {answer.reason}")
        return answer

    def close(self) -> None:
        """Hang up. May be called twice; a later question connects anew."""
        if self._socket is not None:
            self._socket.close(linger=0)
            self._socket = None

    def _connect(self) -> zmq.Socket[bytes]:
        socket = self._context.socket(zmq.REQ)
        socket.setsockopt(zmq.LINGER, 0)
        socket.setsockopt(zmq.SNDTIMEO, int(self._timeout_s * 1000))
        socket.setsockopt(zmq.MAXMSGSIZE, MAX_MESSAGE_BYTES)
        try:
            socket.connect(f"tcp://{self.address}")
        except zmq.ZMQError as error:
            socket.close(linger=0)
            raise self._unreachable(f"cannot be connected to ({error})") from error
        return socket

    def _unreachable(self, what: str) -> PeerUnreachable:
        return PeerUnreachable(
            f"prefill engine at {self.address} {what}; start it, or set kv_connector_extra_config.host there "
            f"to an address that this machine reaches"
        )


def _cannot_bind(host: str, port: int, error: zmq.ZMQError) -> str:
    if error.errno == errno.EADDRINUSE:
        return (
            f"port {port} on {host} is taken; give each engine of this host a kv_port of its own in "
            f"--kv-transfer-config, or kv_port 0 for a free one"
        )
    return (
        f"the KV listener cannot bind {host}:{port} ({error}); set kv_connector_extra_config.host, or "
        f"VLLM_HOST_IP, to an address of this machine"
    )
