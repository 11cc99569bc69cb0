# SPDX-License-Identifier: Apache-2.0
"""What happens before the first message of a line: who is let in, and why a line did not come about.

ZMQ asks a handler about everyone who opens a line to a listener (ZAP, RFC 27), and tells of handshakes on a
monitor. `Doorkeeper` answers the first and reads the second, in the listener's own thread. `LineWatch` is the
caller's side of the monitor: it makes a sentence of why nobody answered.
"""

from __future__ import annotations

import logging
import time

import zmq
from zmq.utils import z85
from zmq.utils.monitor import parse_monitor_message

from vllm_ascend.kv_transfer.trust import Trust

logger = logging.getLogger(f"vllm.{__name__}")

_ZAP_ENDPOINT = "inproc://zeromq.zap.01"
_ZAP_VERSION = b"1.0"
_WARN_EVERY_S = 60.0
_BROKEN_OFF = zmq.Event.HANDSHAKE_FAILED_NO_DETAIL | zmq.Event.HANDSHAKE_FAILED_PROTOCOL
_ENDINGS = _BROKEN_OFF | zmq.Event.HANDSHAKE_FAILED_AUTH | zmq.Event.HANDSHAKE_SUCCEEDED


START_IT = "start it, or set kv_connector_extra_config.host there to an address that this machine reaches"
"""What to do about a peer that nobody can be heard at."""


class Doorkeeper:
    """Lets callers in or not, for the one listening socket of a context. For one thread."""

    def __init__(
        self, context: zmq.Context[zmq.Socket[bytes]], socket: zmq.Socket[bytes], trust: Trust
    ) -> None:
        """Lock `socket`, which is not yet bound."""
        self._trust = trust
        self._zap = context.socket(zmq.REP)
        self._zap.setsockopt(zmq.LINGER, 0)
        self._zap.bind(_ZAP_ENDPOINT)
        trust.lock_listener(socket)
        self._monitor = socket.get_monitor_socket(_BROKEN_OFF)
        self._warn_at_s = dict.fromkeys(("stranger", "elsewhere"), 0.0)

    @property
    def sockets(self) -> tuple[zmq.Socket[bytes], ...]:
        """What to poll for reading; `attend` when any is ready."""
        return self._zap, self._monitor

    def attend(self) -> None:
        """Answer who asks to be let in, and say who was turned away."""
        while self._zap.poll(0):
            self._answer(self._zap.recv_multipart())
        while self._monitor.poll(0):
            self._monitor.recv_multipart()
            self._warn("stranger", self._broken_off())

    def _answer(self, frames: list[bytes]) -> None:
        _, request_id, _, address, _, mechanism, *credentials = frames
        text = address.decode(errors="replace")
        if not self._trust.admits(text):
            self._warn(
                "elsewhere",
                f"the KV listener turned {text} away, which is not in peer_networks; list its network in "
                f"kv_connector_extra_config if it is an engine of yours",
            )
            status, user = b"400", b""
        else:
            known = self._is_caller(mechanism, credentials)
            status, user = (b"200", b"peer") if known else (b"400", b"")
        self._zap.send_multipart([_ZAP_VERSION, request_id, status, b"", user, b""])

    def _is_caller(self, mechanism: bytes, credentials: list[bytes]) -> bool:
        keys = self._trust.keys
        if keys is None:
            return mechanism == b"NULL"
        return mechanism == b"CURVE" and [z85.encode(key) for key in credentials] == [keys.caller.public]

    def _broken_off(self) -> str:
        other = "has a secret and this engine none" if self._trust.keys is None else "has not the same secret"
        return (
            f"a caller of the KV listener did not finish the handshake: it {other}, is no vllm-ascend "
            f"engine, or hung up; set the same VLLM_ASCEND_KV_SECRET for engines that are to exchange KV"
        )

    def _warn(self, kind: str, sentence: str) -> None:
        # A caller tries again several times a second; one line a minute tells as much.
        now_s = time.monotonic()
        if now_s >= self._warn_at_s[kind]:
            self._warn_at_s[kind] = now_s + _WARN_EVERY_S
            logger.warning("%s", sentence)


class LineWatch:
    """Notes how the handshakes of a calling socket end. For the socket's thread."""

    def __init__(self, socket: zmq.Socket[bytes]) -> None:
        """Watch `socket`, which is not yet connected."""
        self._socket = socket
        self._monitor = socket.get_monitor_socket(_ENDINGS)
        self._ending: zmq.Event | None = None

    def why_silent(self) -> str:
        """Why no answer came, and what to change: the rest of a sentence that begins with the peer."""
        while self._monitor.poll(0):
            self._ending = zmq.Event(parse_monitor_message(self._monitor.recv_multipart())["event"])
        if self._ending is None:
            return START_IT
        if self._ending == zmq.Event.HANDSHAKE_SUCCEEDED:
            return "it took the line, so it hangs or is stopped; restart it"
        if self._ending == zmq.Event.HANDSHAKE_FAILED_AUTH:
            return "it does not admit this machine; list this machine's network in peer_networks there"
        return (
            "it broke off the handshake: the two have not the same secret, or it is no vllm-ascend engine; "
            "set the same VLLM_ASCEND_KV_SECRET for both"
        )

    def close(self) -> None:
        """Stop watching, before the socket is closed. May be called twice."""
        if not self._monitor.closed:
            self._socket.disable_monitor()
            self._monitor.close(linger=0)
