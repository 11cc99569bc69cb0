# SPDX-License-Identifier: Apache-2.0
"""Meeting peers: each is asked once who it is, and everybody who wants to know waits for that one answer.

Nobody waits in a thread. What is to be done once a peer is known is noted, and begun by whoever brings the
answer; if the peer does not answer, it is told so, and the next one to want the peer asks again.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

from vllm_ascend.errors import KVTransferError

Peer = TypeVar("Peer")


class Peers(Generic[Peer]):
    """The peers that were met. Every method may be called from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._known: dict[Hashable, Peer] = {}
        self._waiting: dict[Hashable, list[Callable[[Peer | KVTransferError], None]]] = {}

    def when_met(self, name: Hashable, then: Callable[[Peer | KVTransferError], None]) -> bool:
        """Call `then` with the peer, or with why it could not be met: now if it is known, else in `meet`.

        Returns whether somebody must `meet` it; until then, later callers only join those who wait.
        """
        with self._lock:
            if name not in self._known:
                is_first = name not in self._waiting
                self._waiting.setdefault(name, []).append(then)
                return is_first
            peer = self._known[name]
        then(peer)
        return False

    def meet(self, name: Hashable, ask: Callable[[], Peer]) -> None:
        """Ask the peer, and tell all who wait for it. `ask` raises KVTransferError if it cannot be met."""
        met: Peer | KVTransferError
        try:
            met = ask()
        except KVTransferError as error:
            met = error
        with self._lock:
            if not isinstance(met, KVTransferError):
                self._known[name] = met
            waiting = self._waiting.pop(name)
        for then in waiting:
            then(met)
