# SPDX-License-Identifier: Apache-2.0
"""Asks prefill engines how far named requests are, and gives names up that nobody will read.

One thread per decode engine. While names are followed it asks each prefill engine every few milliseconds, in
one message, and never more than one at a time; it waits for answers from all at once. News goes into a queue
that the engine's thread empties in each step. Of each name there is a last word: that its prompt is computed,
or why it never will be.
"""

from __future__ import annotations

import contextlib
import math
import threading
import time
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue
from typing import assert_never

import msgspec
import zmq

from vllm_ascend.errors import KVTransferError, PeerUnreachable, ReadFailed, WireError
from vllm_ascend.kv_transfer.door import START_IT, LineWatch
from vllm_ascend.kv_transfer.messages import (
    MAX_ANSWER_BYTES,
    MAX_REQUESTS,
    AskProgress,
    Ended,
    Forgo,
    Gone,
    Growing,
    NamedPrefill,
    Progress,
    Question,
    Refused,
    RemotePrefill,
    Unchanged,
    Unheard,
    Watch,
    decode_answer,
    encode,
)
from vllm_ascend.kv_transfer.trust import OPEN, Trust

_ASK_EVERY_S = 0.01
_IDLE_S = 60.0
"""How long a line to a peer of which no name is followed stays open."""
_FLUSH_MS = 500
"""How long a closing line may take to send what was said last."""


@dataclass(frozen=True)
class Lost:
    """A named request that will never be there."""

    reason: str
    kind: str
    """One of metrics.FAILURES."""

    @classmethod
    def to(cls, error: KVTransferError) -> Lost:
        return cls(str(error), error.kind)


News = Growing | Ended | Lost


@dataclass(frozen=True)
class _Follow:
    named: NamedPrefill


@dataclass(frozen=True)
class _Forgo:
    named: NamedPrefill


@dataclass(frozen=True)
class _Drop:
    named: NamedPrefill


@dataclass(frozen=True)
class _Close:
    pass


@dataclass
class _Followed:
    named: NamedPrefill
    since_s: float
    lease: int = 0
    tokens: int = 0
    is_heard_of: bool = False


@dataclass
class _Peer:
    engine_id: str
    address: str
    socket: zmq.Socket[bytes]
    watch: LineWatch
    idle_since_s: float
    followed: dict[str, _Followed] = field(default_factory=dict)
    asked: tuple[str, ...] = ()
    """The names that the question is about which is not answered yet."""
    asked_at_s: float = 0.0
    ask_at_s: float = 0.0

    def close(self, linger_ms: int) -> None:
        self.watch.close()
        self.socket.close(linger=linger_ms)


class Follower:
    """Methods are for the engine's thread; they hand over and return at once."""

    def __init__(self, patience_s: float, unheard_s: float, trust: Trust = OPEN) -> None:
        """`patience_s` bounds each question; `unheard_s`, how long a name may be one that nobody knows."""
        self._patience_s = patience_s
        self._unheard_s = unheard_s
        self._trust = trust
        self._commands: SimpleQueue[_Follow | _Forgo | _Drop | _Close] = SimpleQueue()
        self._news: SimpleQueue[tuple[NamedPrefill, News]] = SimpleQueue()
        self._peers: dict[tuple[str, int, str], _Peer] = {}
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        # A daemon, so that an engine which fails to start does not hang in it; close() is its usual end.
        self._thread = threading.Thread(target=self._run, name="kv-follower", daemon=True)
        self._thread.start()

    def follow(self, named: NamedPrefill) -> None:
        """Ask how far the request is until it has ended or is lost."""
        self._commands.put(_Follow(named))

    def drop(self, named: NamedPrefill) -> None:
        """Ask no more."""
        self._commands.put(_Drop(named))

    def forgo(self, named: NamedPrefill) -> None:
        """Ask no more, and say that nobody will read the request."""
        self._commands.put(_Forgo(named))

    def take_news(self) -> list[tuple[NamedPrefill, News]]:
        """What was heard since the last call, in its order."""
        return [self._news.get() for _ in range(self._news.qsize())]

    def close(self) -> None:
        """Say what is left to say and end. May be called twice."""
        self._commands.put(_Close())
        self._thread.join()

    def _run(self) -> None:
        while self._obey_all():
            now_s = time.monotonic()
            for key, peer in list(self._peers.items()):
                self._give_up_waiting(peer, now_s)
                self._ask_if_due(peer, now_s)
                if not peer.followed and not peer.asked and now_s - peer.idle_since_s > _IDLE_S:
                    peer.close(_FLUSH_MS)
                    del self._peers[key]
            self._hear()
        for peer in self._peers.values():
            peer.close(_FLUSH_MS)
        self._context.term()

    def _obey_all(self) -> bool:
        """Obey what was commanded; with nobody to follow, wait for a command. Returns whether to go on."""
        # A question stays one until it is answered, so that its answer is not taken for that to the next.
        is_idle = not any(peer.followed or peer.asked for peer in self._peers.values())
        with contextlib.suppress(Empty):
            command = self._commands.get(is_idle, _IDLE_S)
            while True:
                if isinstance(command, _Close):
                    return False
                self._obey(command)
                command = self._commands.get_nowait()
        return True

    def _obey(self, command: _Follow | _Forgo | _Drop) -> None:
        named = command.named
        try:
            peer = self._peer(named)
        except zmq.ZMQError as error:
            # Only an address that is none gets here, and it came with the request.
            address = f"{named.remote_host}:{named.remote_port}"
            why = PeerUnreachable(f"prefill engine at {address} cannot be connected to ({error}); {START_IT}")
            if isinstance(command, _Follow):
                self._news.put((named, Lost.to(why)))
            return
        match command:
            case _Follow():
                peer.followed[named.transfer_name] = _Followed(named, time.monotonic())
            case _Drop():
                self._end(peer, named.transfer_name)
            case _Forgo():
                self._end(peer, named.transfer_name)
                self._tell(peer, Forgo(engine_id=peer.engine_id, names=(named.transfer_name,)))
            case _:
                assert_never(command)

    def _ask_if_due(self, peer: _Peer, now_s: float) -> None:
        if not peer.followed or peer.asked or now_s < peer.ask_at_s:
            return
        # The first ones go to the end, so that all have their turn.
        some = list(peer.followed.values())[:MAX_REQUESTS]
        for one in some:
            peer.followed[one.named.transfer_name] = peer.followed.pop(one.named.transfer_name)
        watches = tuple(
            Watch(name=one.named.transfer_name, lease=one.lease, tokens=one.tokens) for one in some
        )
        peer.asked = tuple(watch.name for watch in watches)
        peer.asked_at_s, peer.ask_at_s = now_s, now_s + _ASK_EVERY_S
        self._tell(peer, AskProgress(engine_id=peer.engine_id, watches=watches))

    def _hear(self) -> None:
        """Take answers; wait for some, until it is time to ask again."""
        now_s = time.monotonic()
        waits_s = [peer.ask_at_s - now_s for peer in self._peers.values() if peer.followed and not peer.asked]
        if not waits_s and not any(peer.asked for peer in self._peers.values()):
            return
        poller = zmq.Poller()
        by_socket = {peer.socket: peer for peer in self._peers.values()}
        for socket in by_socket:
            poller.register(socket, zmq.POLLIN)
        # Commands come meanwhile: they are looked for as often as peers are asked.
        wait_s = max(0.0, min(waits_s, default=_ASK_EVERY_S))
        for socket, _ in poller.poll(math.ceil(wait_s * 1000)):
            peer = by_socket[socket]
            try:
                while socket.poll(0):
                    _, *frames = socket.recv_multipart()
                    self._take(peer, frames)
            except WireError as error:
                self._lose_all(peer, error)

    def _take(self, peer: _Peer, frames: list[bytes]) -> None:
        answer = decode_answer(frames)
        if isinstance(answer, Refused):
            raise WireError(f"prefill engine at {peer.address} refused: {answer.reason}")
        if not isinstance(answer, Progress) or not peer.asked:
            # To a word of Forgo, or too late.
            return
        asked, peer.asked = peer.asked, ()
        if len(asked) != len(answer.of):
            raise WireError(
                f"prefill engine {peer.engine_id} was asked after {len(asked)} requests and answered for "
                f"{len(answer.of)}; run the same release of vllm-ascend on both sides"
            )
        for name, found in zip(asked, answer.of, strict=True):
            if name in peer.followed:
                self._note(peer, peer.followed[name], found)

    def _note(self, peer: _Peer, one: _Followed, found: Unheard | Unchanged | Growing | Ended | Gone) -> None:
        match found:
            case Unchanged():
                pass
            case Unheard():
                self._be_patient(peer, one)
            case Growing(so_far=so_far):
                one.lease, one.tokens, one.is_heard_of = so_far.remote_lease, so_far.remote_num_tokens, True
                here = msgspec.structs.replace(found, so_far=_at_address_of(one.named, so_far))
                self._news.put((one.named, here))
            case Ended(prefill=prefill):
                self._news.put((one.named, Ended(prefill=_at_address_of(one.named, prefill))))
                self._end(peer, one.named.transfer_name)
            case Gone(reason=reason):
                self._lose(peer, one, ReadFailed(f"prefill engine {peer.engine_id} says that {reason}"))
            case _:
                assert_never(found)

    def _be_patient(self, peer: _Peer, one: _Followed) -> None:
        if one.is_heard_of or time.monotonic() - one.since_s > self._unheard_s:
            for_how_long = "any more" if one.is_heard_of else f"after {self._unheard_s:g} s"
            why = (
                f"prefill engine {peer.engine_id} does not know the request that the router calls "
                f"{one.named.transfer_name} {for_how_long}; send it to both engines under one transfer_name"
            )
            self._lose(peer, one, ReadFailed(why))

    def _give_up_waiting(self, peer: _Peer, now_s: float) -> None:
        if peer.asked and now_s - peer.asked_at_s > self._patience_s:
            why = PeerUnreachable(
                f"prefill engine at {peer.address} did not say within {self._patience_s:g} s how far its "
                f"requests are; {peer.watch.why_silent()}"
            )
            self._lose_all(peer, why)

    def _lose_all(self, peer: _Peer, error: KVTransferError) -> None:
        for one in list(peer.followed.values()):
            self._lose(peer, one, error)
        # An answer that still comes is to no question, and the next one begins on a fresh line.
        peer.close(0)
        peer.asked = ()
        self._peers = {key: other for key, other in self._peers.items() if other is not peer}

    def _lose(self, peer: _Peer, one: _Followed, error: KVTransferError) -> None:
        self._news.put((one.named, Lost.to(error)))
        self._end(peer, one.named.transfer_name)

    def _end(self, peer: _Peer, name: str) -> None:
        peer.followed.pop(name, None)
        if not peer.followed:
            peer.idle_since_s = time.monotonic()

    def _peer(self, named: NamedPrefill) -> _Peer:
        if named.peer not in self._peers:
            socket = self._context.socket(zmq.DEALER)
            socket.setsockopt(zmq.LINGER, 0)
            socket.setsockopt(zmq.MAXMSGSIZE, MAX_ANSWER_BYTES)
            self._trust.lock_caller(socket)
            address = f"{named.remote_host}:{named.remote_port}"
            watch = LineWatch(socket)
            try:
                socket.connect(f"tcp://{address}")
            except zmq.ZMQError:
                watch.close()
                socket.close(linger=0)
                raise
            self._peers[named.peer] = _Peer(named.remote_engine_id, address, socket, watch, time.monotonic())
        return self._peers[named.peer]

    def _tell(self, peer: _Peer, question: Question) -> None:
        # A peer that takes nothing more is one that does not answer.
        if peer.socket.poll(0, zmq.POLLOUT):
            peer.socket.send_multipart([b"", *encode(question)])


def _at_address_of(named: NamedPrefill, prefill: RemotePrefill) -> RemotePrefill:
    """The same, to be spoken to where the request said, and not where its answer does."""
    host, port, engine_id = named.peer
    return msgspec.structs.replace(prefill, remote_host=host, remote_port=port, remote_engine_id=engine_id)
