# SPDX-License-Identifier: Apache-2.0
"""How long prefill keeps a finished request's blocks for the decode engine that reads them.

A lease begins when prefill finishes a request. The waiting decode renews it; every reader (one read of one
decode rank) says when it is done and how many readers there are, so prefill needs no knowledge of decode's
sizes. The blocks are free when the last reader is done, when decode says that it will not read, or when the
lease ends.

A reader learns at "done" whether the lease held until then. If not, other requests may have overwritten the
blocks while they were read, and what was read must be dropped.

Two threads meet here: the listener answers peers, the engine grants leases and frees blocks. Times are
seconds on the monotonic clock, given by the caller.
"""

from __future__ import annotations

import itertools
import threading
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

REMEMBERED_S = 60.0
"""How long a freed request is remembered, so that a reader that asks again gets the same answer."""


@dataclass(frozen=True)
class Freed:
    """Requests whose blocks prefill lets go, each reported once."""

    read: frozenset[str]
    """Every reader was done, or decode declined."""
    expired: frozenset[str]
    """The lease ended first."""


NONE_FREED = Freed(frozenset(), frozenset())


@dataclass
class _Lease:
    seconds: float
    ends_at_s: float
    done: set[str] = field(default_factory=set)


class LeaseTable:
    """The leases of one prefill engine. Every method may be called from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Condition()
        self._leases: dict[str, _Lease] = {}
        self._released: set[str] = set()
        # No lease ends before: the engine, which looks in each step, looks through all of them only then.
        self._none_ends_before_s = float("inf")
        self._counts: Counter[str] = Counter()
        # Freed requests, in this order, with the readers that were done in time and when to forget them.
        self._remembered: dict[str, tuple[frozenset[str], float]] = {}

    def __len__(self) -> int:
        """How many requests' blocks are held."""
        with self._lock:
            return len(self._leases)

    def grant(self, request_id: str, seconds: float, now_s: float) -> None:
        """Hold the blocks of `request_id` until `seconds` after the last renewal."""
        with self._lock:
            self._leases[request_id] = _Lease(seconds, now_s + seconds)
            self._none_ends_before_s = min(self._none_ends_before_s, now_s + seconds)
            self._released.discard(request_id)
            self._counts["leases_granted"] += 1
            self._remembered.pop(request_id, None)

    def renew(self, request_ids: Iterable[str], now_s: float) -> list[str]:
        """Let each lease begin anew. Returns those that no longer exist."""
        lost = []
        with self._lock:
            for request_id in request_ids:
                lease = self._leases.get(request_id)
                if lease is None:
                    lost.append(request_id)
                else:
                    lease.ends_at_s = now_s + lease.seconds
                    self._counts["leases_renewed"] += 1
        return lost

    def done(self, request_id: str, reader: str, num_readers: int) -> bool:
        """Note that `reader`, one of `num_readers`, reads no more. Returns whether the lease held until now.

        Saying it again changes nothing and gets the same answer.
        """
        with self._lock:
            lease = self._leases.get(request_id)
            if lease is None:
                in_time, _ = self._remembered.get(request_id, (frozenset(), 0.0))
                return reader in in_time
            # A lease past its end still holds until `take_freed` gives the blocks away.
            lease.done.add(reader)
            if len(lease.done) >= num_readers:
                self._released.add(request_id)
                self._lock.notify_all()
            return True

    def release(self, request_ids: Iterable[str]) -> None:
        """Note that nobody will read these. Unknown ones are ignored: they were freed before."""
        with self._lock:
            self._released.update(request_id for request_id in request_ids if request_id in self._leases)
            self._lock.notify_all()

    def await_release(self, longest_s: float) -> None:
        """Return when some lease was released, at the latest after `longest_s`; at once if none is held."""
        with self._lock:
            self._lock.wait_for(lambda: not self._leases or bool(self._released), longest_s)

    def take_counts(self) -> dict[str, int]:
        """How many leases were granted, renewed, read and expired since the last call, as metrics name it."""
        if not self._counts:
            return {}
        with self._lock:
            counts, self._counts = self._counts, Counter()
            return dict(counts)

    def take_freed(self, now_s: float) -> Freed:
        """Remove and return the leases that were released or have ended. The caller frees their blocks."""
        # Looked at in every step, so without the lock, which the listener may have. What it misses now it
        # sees in the next step.
        if not self._released and now_s < self._none_ends_before_s:
            return NONE_FREED
        with self._lock:
            read, self._released = self._released, set()
            ended = self._ended(now_s) if self._none_ends_before_s <= now_s else set()
            for request_id in read | ended:
                lease = self._leases.pop(request_id)
                self._remembered[request_id] = (frozenset(lease.done), now_s + REMEMBERED_S)
            self._counts.update(leases_read=len(read), leases_expired=len(ended - read))
            self._forget(now_s)
        return Freed(frozenset(read), frozenset(ended - read))

    def _ended(self, now_s: float) -> set[str]:
        ends = {request_id: lease.ends_at_s for request_id, lease in self._leases.items()}
        ended = {request_id for request_id, at_s in ends.items() if at_s <= now_s}
        self._none_ends_before_s = min((at_s for at_s in ends.values() if at_s > now_s), default=float("inf"))
        return ended

    def _forget(self, now_s: float) -> None:
        forgotten = itertools.takewhile(lambda one: one[1][1] <= now_s, self._remembered.items())
        for request_id in [request_id for request_id, _ in forgotten]:
            del self._remembered[request_id]
