# SPDX-License-Identifier: Apache-2.0
"""Which tokens of a prompt may be read while the rest of it is computed.

A part ends where blocks of both sides end, so that no block is read half computed and none twice. What was
asked for under one lease of the prompt's blocks is of no use under another: the load begins anew then.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

from vllm_ascend.kv_transfer.topology import Span


@dataclass(frozen=True)
class Growth:
    """A load, and how much of it was asked for."""

    wanted: Span
    """Tokens of the prompt: from the end of the prefix hit to the last that is of use."""
    block_size: int
    """Tokens per block here."""
    lease: int
    """Under which lease of the blocks was asked."""
    asked: int
    """The first wanted token that was not asked for, under this lease."""

    @classmethod
    def begun(cls, wanted: Span, block_size: int) -> Growth:
        """Nothing was asked for yet: no lease has the number 0."""
        return cls(wanted, block_size, lease=0, asked=wanted.start)

    def readable(self, lease: int, tokens: int, remote_block_size: int) -> Span:
        """What may be asked for now that the prompt's first `tokens` are in memory; empty: nothing."""
        start = self._start(lease)
        in_blocks = tokens // math.lcm(self.block_size, remote_block_size)
        stop = min(in_blocks * math.lcm(self.block_size, remote_block_size), self.wanted.stop)
        return Span(start, max(start, stop))

    def rest(self, lease: int) -> Span:
        """What is left to ask for when the whole prompt is in memory; may be empty."""
        return Span(self._start(lease), self.wanted.stop)

    def after(self, lease: int, part: Span) -> Growth:
        """The load once `part` was asked for under `lease`."""
        return dataclasses.replace(self, lease=lease, asked=part.stop)

    def _start(self, lease: int) -> int:
        return self.asked if lease == self.lease else self.wanted.start
