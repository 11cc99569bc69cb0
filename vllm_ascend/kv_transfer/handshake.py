# SPDX-License-Identifier: Apache-2.0
"""Asking a peer and answering peers: sockets, and nothing about what is said.

A prefill engine has one `Listener`. It binds the address it is told, never all interfaces by itself, and
`door` decides who gets in. A decode rank asks through `Lines`. Every wait has an end, and a socket that
failed once is replaced.
"""

from __future__ import annotations

import errno
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType

import zmq

from vllm_ascend.errors import ConfigError, PeerUnreachable, WireError
from vllm_ascend.kv_transfer.door import START_IT, Doorkeeper, LineWatch
from vllm_ascend.kv_transfer.messages import (
    MAX_ANSWER_BYTES,
    MAX_QUESTION_BYTES,
    Answer,
    Question,
    Refused,
    decode_answer,
    decode_question,
    encode,
)
from vllm_ascend.kv_transfer.trust import OPEN, Trust

_POLL_MS = 100
"""How long the listener may take to notice that it should end."""


class Listener:
    """Answers questions at one address, in a thread of its own, until closed."""

    def __init__(
        self, host: str, port: int, answer: Callable[[Question], Answer], trust: Trust = OPEN
    ) -> None:
        """Bind at once; port 0 takes a free one. `answer` is called in the listener's thread.

        Raises ConfigError if the address cannot be bound.
        """
        self._answer = answer
        self._closing = threading.Event()
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.MAXMSGSIZE, MAX_QUESTION_BYTES)
        self._door = Doorkeeper(self._context, self._socket, trust)
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
        poller = zmq.Poller()
        for socket in (self._socket, *self._door.sockets):
            poller.register(socket, zmq.POLLIN)
        while not self._closing.is_set():
            ready = dict(poller.poll(_POLL_MS))
            if self._socket in ready:
                identity, *frames = self._socket.recv_multipart()
                self._socket.send_multipart([identity, b"", *encode(self._answer_to(frames))])
            if ready.keys() - {self._socket}:
                self._door.attend()

    def _answer_to(self, frames: list[bytes]) -> Answer:
        try:
            # A question begins with the empty frame that a REQ socket puts before it.
            return self._answer(decode_question(frames[1:] if frames[:1] == [b""] else frames))
        except WireError as error:
            return Refused(reason=str(error))


class Lines:
    """Channels to any number of listeners, for any number of threads; each serves one thread at a time."""

    def __init__(self, timeout_s: float, trust: Trust = OPEN) -> None:
        """`timeout_s` bounds each question."""
        self._timeout_s = timeout_s
        self._trust = trust
        self._idle: dict[tuple[str, int], deque[Channel]] = {}

    def ask(self, host: str, port: int, question: Question) -> Answer:
        """The answer of the listener at `host`, `port`.

        Raises PeerUnreachable, WireError, or PeerNotAdmitted if no peer may be at `host`.
        """
        self._trust.check_host(host)
        idle = self._idle.setdefault((host, port), deque())
        try:
            channel = idle.pop()
        except IndexError:
            channel = Channel(host, port, self._timeout_s, self._trust)
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

    def __init__(self, host: str, port: int, timeout_s: float, trust: Trust = OPEN) -> None:
        """Connect when first used. `timeout_s` bounds each question."""
        self.address = f"{host}:{port}"
        self._timeout_s = timeout_s
        self._trust = trust
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context.instance()
        self._line: _Line | None = None

    def ask(self, question: Question) -> Answer:
        """The listener's answer.

        Raises PeerUnreachable if none comes in time, WireError if the peer refuses or is not understood. The
        next question starts on a fresh socket then.
        """
        line, self._line = self._line or self._connect(), None
        try:
            line.socket.send_multipart(encode(question))
            if not line.socket.poll(int(self._timeout_s * 1000)):
                raise self._unreachable(
                    f"did not answer within {self._timeout_s:g} s", line.watch.why_silent()
                )
            answer = decode_answer(line.socket.recv_multipart())
            self._line = line
        except zmq.ZMQError as error:
            raise self._unreachable(f"cannot be asked ({error})", line.watch.why_silent()) from error
        finally:
            if self._line is None:
                line.close()
        if isinstance(answer, Refused):
            raise WireError(f"prefill engine at {self.address} refused: {answer.reason}")
        return answer

    def close(self) -> None:
        """Hang up. May be called twice; a later question connects anew."""
        if self._line is not None:
            self._line.close()
            self._line = None

    def _connect(self) -> _Line:
        socket = self._context.socket(zmq.REQ)
        socket.setsockopt(zmq.LINGER, 0)
        socket.setsockopt(zmq.SNDTIMEO, int(self._timeout_s * 1000))
        socket.setsockopt(zmq.MAXMSGSIZE, MAX_ANSWER_BYTES)
        self._trust.lock_caller(socket)
        line = _Line(socket, LineWatch(socket))
        try:
            socket.connect(f"tcp://{self.address}")
        except zmq.ZMQError as error:
            line.close()
            raise self._unreachable(f"cannot be connected to ({error})", START_IT) from error
        return line

    def _unreachable(self, what: str, why: str) -> PeerUnreachable:
        return PeerUnreachable(f"prefill engine at {self.address} {what}; {why}")


@dataclass(frozen=True)
class _Line:
    socket: zmq.Socket[bytes]
    watch: LineWatch

    def close(self) -> None:
        self.watch.close()
        self.socket.close(linger=0)


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
