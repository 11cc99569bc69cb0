# SPDX-License-Identifier: Apache-2.0
"""The parts of one load at one rank: read in their order, by one reader at a time, told of once.

Two threads meet here: the engine's brings parts, a reader takes them. A reader that finds none goes to other
loads, so none is held while prefill computes; the next part begins another one.
"""

from __future__ import annotations

import threading
from collections import deque
from dataclasses import dataclass
from typing import Generic, TypeVar

Part = TypeVar("Part")


@dataclass(frozen=True)
class Stopped:
    """No part will come any more."""

    reason: str
    kind: str | None
    """As `GiveUp.kind`."""


class Parts(Generic[Part]):
    """Every method may be called from any thread; `take` and `end`, by the reader that `add` asked for."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._waiting: deque[Part] = deque()
        self._has_reader = False
        self._stopped: Stopped | None = None
        self._is_over = False

    def add(self, part: Part) -> bool:
        """Let `part` be read behind those before it. Returns whether a reader must begin to take.

        Of a load that is over it is dropped.
        """
        with self._lock:
            if self._is_over:
                return False
            self._waiting.append(part)
            must_begin, self._has_reader = not self._has_reader, True
            return must_begin

    def stop(self, stopped: Stopped) -> bool:
        """Read no other part. Returns whether the load is over now, for the caller to tell of.

        If not, its reader learns of it when it is done with its part, or it was over before.
        """
        with self._lock:
            if self._is_over:
                return False
            self._stopped = stopped
            self._is_over = not self._has_reader
            return self._is_over

    def take(self) -> Part | Stopped | None:
        """What is next; None: nothing for now, and the reader must go."""
        with self._lock:
            if self._stopped is not None:
                return self._stopped
            if self._waiting:
                return self._waiting.popleft()
            self._has_reader = False
            return None

    def end(self) -> None:
        """The load is over: its reader tells what came of it, and other parts are dropped."""
        with self._lock:
            self._is_over = True
            self._waiting.clear()
