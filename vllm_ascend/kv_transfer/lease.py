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


@dataclass
class _Lease:
    seconds: float
    ends_at_s: float
    done: set[str] = field(default_factory=set)
    released: bool = False


class LeaseTable:
    """The leases of one prefill engine. Every method may be called from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Condition()
        self._leases: dict[str, _Lease] = {}
        self._counts: Counter[str] = Counter()
        # Freed requests, with the readers that were done in time and the time at which to forget them.
        self._remembered: dict[str, tuple[frozenset[str], float]] = {}

    def __len__(self) -> int:
        """How many requests' blocks are held."""
        with self._lock:
            return len(self._leases)

    def grant(self, request_id: str, seconds: float, now_s: float) -> None:
        """Hold the blocks of `request_id` until `seconds` after the last renewal."""
        with self._lock:
            self._leases[request_id] = _Lease(seconds, now_s + seconds)
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
            lease.released = lease.released or len(lease.done) >= num_readers
            self._lock.notify_all()
            return True

    def release(self, request_ids: Iterable[str]) -> None:
        """Note that nobody will read these. Unknown ones are ignored: they were freed before."""
        with self._lock:
            for request_id in request_ids:
                lease = self._leases.get(request_id)
                if lease is not None:
                    lease.released = True
            self._lock.notify_all()

    def await_release(self, longest_s: float) -> None:
        """Return when some lease was released, at the latest after `longest_s`; at once if none is held."""
        with self._lock:
            self._lock.wait_for(
                lambda: not self._leases or any(lease.released for lease in self._leases.values()), longest_s
            )

    def take_counts(self) -> dict[str, int]:
        """How many leases were granted, renewed, read and expired since the last call, as metrics name it."""
        with self._lock:
            counts, self._counts = self._counts, Counter()
            return dict(counts)

    def take_freed(self, now_s: float) -> Freed:
        """Remove and return the leases that were released or have ended. The caller frees their blocks."""
        with self._lock:
            read = {request_id for request_id, lease in self._leases.items() if lease.released}
            ended = {request_id for request_id, lease in self._leases.items() if lease.ends_at_s <= now_s}
            for request_id in read | ended:
                lease = self._leases.pop(request_id)
                self._remembered[request_id] = (frozenset(lease.done), now_s + REMEMBERED_S)
            self._counts.update(leases_read=len(read), leases_expired=len(ended - read))
            self._forget(now_s)
        return Freed(frozenset(read), frozenset(ended - read))

    def _forget(self, now_s: float) -> None:
        for request_id in [known for known, (_, at_s) in self._remembered.items() if at_s <= now_s]:
            del self._remembered[request_id]
