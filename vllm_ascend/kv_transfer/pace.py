# SPDX-License-Identifier: Apache-2.0
"""How often an engine steps that only holds or awaits blocks."""

import time

_REST_PER_WORK = 2.0


class Pace:
    """How long a step that has nothing to run should pause.

    While blocks are held or awaited vLLM steps without end, and an empty step costs every rank some work.
    Resting twice as long as the last one took leaves the host's cores to those who have something to do:
    the threads that read, or the engine beside this one that reads from it.
    """

    def __init__(self) -> None:
        self._rested_at_s = time.monotonic()

    def next_rest_s(self, longest_s: float) -> float:
        """Seconds to pause now, `longest_s` at the most."""
        worked_s = time.monotonic() - self._rested_at_s
        return min(longest_s, _REST_PER_WORK * worked_s)

    def rested(self) -> None:
        """The pause is over; the next step's work begins."""
        self._rested_at_s = time.monotonic()
