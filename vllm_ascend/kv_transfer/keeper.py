# SPDX-License-Identifier: Apache-2.0
"""Keeps the leases of requests that wait for their KV, and gives up those that need none.

One thread per decode engine. It renews in one message per prefill engine, at a third of the lease, and never
waits for an answer: a peer that is gone delays nobody. A message that is lost costs little, for the lease is
renewed twice more before it ends, and blocks that were not released in words are released by its end.
"""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue
from typing import assert_never

import zmq
from vllm.logger import init_logger

from vllm_ascend.errors import PeerNotAdmitted
from vllm_ascend.kv_transfer.messages import (
    MAX_ANSWER_BYTES,
    MAX_REQUESTS,
    Question,
    Release,
    RemotePrefill,
    Renew,
    encode,
)
from vllm_ascend.kv_transfer.trust import OPEN, Trust

logger = init_logger(f"vllm.{__name__}")

_RENEWALS_PER_LEASE = 3
_IDLE_S = 60.0
"""How long a line to a peer without waiting requests stays open."""
_FLUSH_MS = 500
"""How long a closing line may take to send what was said last."""


@dataclass(frozen=True)
class _Hold:
    remote: RemotePrefill


@dataclass(frozen=True)
class _Drop:
    remote: RemotePrefill


@dataclass(frozen=True)
class _Release:
    remote: RemotePrefill


@dataclass(frozen=True)
class _Close:
    pass


@dataclass
class _Peer:
    engine_id: str
    socket: zmq.Socket[bytes]
    idle_since_s: float
    next_renewal_s: float = float("inf")
    renew_every_s: float = float("inf")
    waiting: set[str] = field(default_factory=set)


class Keeper:
    """Methods are for the engine's thread; they hand over and return at once."""

    def __init__(self, trust: Trust = OPEN) -> None:
        self._trust = trust
        self._commands: SimpleQueue[_Hold | _Drop | _Release | _Close] = SimpleQueue()
        self._peers: dict[tuple[str, int, str], _Peer] = {}
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        # A daemon, so that an engine which fails to start does not hang in it; close() is its usual end.
        self._thread = threading.Thread(target=self._run, name="kv-keeper", daemon=True)
        self._thread.start()

    def hold(self, remote: RemotePrefill) -> None:
        """Renew the lease of this request's blocks from now on."""
        self._commands.put(_Hold(remote))

    def drop(self, remote: RemotePrefill) -> None:
        """Renew no more: the request was read, or is lost."""
        self._commands.put(_Drop(remote))

    def release(self, remote: RemotePrefill) -> None:
        """Renew no more and say that nobody will read the blocks."""
        self._commands.put(_Release(remote))

    def close(self) -> None:
        """Say what is left to say and end. May be called twice."""
        self._commands.put(_Close())
        self._thread.join()

    def _run(self) -> None:
        while self._obey_next():
            self._renew_due(time.monotonic())
        for peer in self._peers.values():
            peer.socket.close(linger=_FLUSH_MS)
        self._context.term()

    def _obey_next(self) -> bool:
        """Wait for a command or for the next renewal. Returns whether to go on."""
        due_s = min((peer.next_renewal_s for peer in self._peers.values()), default=float("inf"))
        wait_s = min(max(0.0, due_s - time.monotonic()), _IDLE_S)
        try:
            command = self._commands.get(timeout=wait_s)
        except Empty:
            return True
        if isinstance(command, _Close):
            return False
        try:
            self._obey(command)
        except (zmq.ZMQError, PeerNotAdmitted) as error:
            # Only an address that is none, or not of a peer, gets here, and it came with the request.
            logger.warning(
                "prefill engine at %s:%d cannot be told to hold request %s: %s",
                command.remote.remote_host,
                command.remote.remote_port,
                command.remote.remote_request_id,
                error,
            )
        return True

    def _obey(self, command: _Hold | _Drop | _Release) -> None:
        match command:
            case _Hold(remote):
                self._begin(remote)
            case _Drop(remote):
                self._end(remote)
            case _Release(remote):
                self._end(remote)
                self._release(remote)
            case _:
                assert_never(command)

    def _begin(self, remote: RemotePrefill) -> None:
        peer = self._peer(remote)
        every_s = remote.remote_lease_s / _RENEWALS_PER_LEASE
        peer.renew_every_s = min(peer.renew_every_s, every_s)
        peer.next_renewal_s = min(peer.next_renewal_s, time.monotonic() + every_s)
        peer.waiting.add(remote.remote_request_id)

    def _end(self, remote: RemotePrefill) -> None:
        peer = self._peer(remote)
        peer.waiting.discard(remote.remote_request_id)
        if not peer.waiting:
            peer.next_renewal_s = peer.renew_every_s = float("inf")
            peer.idle_since_s = time.monotonic()

    def _release(self, remote: RemotePrefill) -> None:
        peer = self._peer(remote)
        self._tell(peer, Release(engine_id=peer.engine_id, request_ids=(remote.remote_request_id,)))

    def _renew_due(self, now_s: float) -> None:
        for key, peer in list(self._peers.items()):
            if peer.waiting and peer.next_renewal_s <= now_s:
                waiting = sorted(peer.waiting)
                for start in range(0, len(waiting), MAX_REQUESTS):
                    some = tuple(waiting[start : start + MAX_REQUESTS])
                    self._tell(peer, Renew(engine_id=peer.engine_id, request_ids=some))
                peer.next_renewal_s = now_s + peer.renew_every_s
            if not peer.waiting and now_s - peer.idle_since_s > _IDLE_S:
                peer.socket.close(linger=_FLUSH_MS)
                del self._peers[key]

    def _peer(self, remote: RemotePrefill) -> _Peer:
        if remote.peer not in self._peers:
            self._trust.check_host(remote.remote_host)
            socket = self._context.socket(zmq.DEALER)
            socket.setsockopt(zmq.LINGER, 0)
            socket.setsockopt(zmq.MAXMSGSIZE, MAX_ANSWER_BYTES)
            self._trust.lock_caller(socket)
            socket.connect(f"tcp://{remote.remote_host}:{remote.remote_port}")
            self._peers[remote.peer] = _Peer(remote.remote_engine_id, socket, idle_since_s=time.monotonic())
        return self._peers[remote.peer]

    def _tell(self, peer: _Peer, question: Question) -> None:
        # Answers say nothing that must be acted on: a reader learns at "done" whether its lease held.
        while peer.socket.poll(0):
            peer.socket.recv_multipart()
        if peer.socket.poll(0, zmq.POLLOUT):
            peer.socket.send_multipart([b"", *encode(question)])
