# SPDX-License-Identifier: Apache-2.0
"""Which KV heads live on which rank, and from which ranks a rank reads the heads it wants.

One rule for every pair of sizes. A KV cache group has H heads. Rank r of T stores the heads
[r * H / T, (r + 1) * H / T); where T exceeds H, neighbouring ranks store copies of one head. A rank wants
an interval of heads and reads its intersections with the intervals of the other side's ranks; of ranks
that store the same heads one is picked, a different one each turn, so that no copy serves everybody.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from vllm_ascend.errors import TopologyError


@dataclass(frozen=True, order=True)
class Span:
    """The integers from `start` up to, not including, `stop`: heads, layers or tokens."""

    start: int
    stop: int

    def __len__(self) -> int:
        return max(0, self.stop - self.start)

    def __and__(self, other: Span) -> Span:
        """What both hold; of length 0 when they hold nothing in common."""
        start = max(self.start, other.start)
        return Span(start, max(start, min(self.stop, other.stop)))

    def relative_to(self, origin: int) -> Span:
        """The same integers counted from `origin`."""
        return Span(self.start - origin, self.stop - origin)


@dataclass(frozen=True)
class HeadRead:
    """Fetch `heads`, numbered over the whole model, from the rank `prefill_rank`."""

    prefill_rank: int
    heads: Span


def heads_on(rank: int, tp_size: int, num_kv_heads: int) -> Span:
    """The heads that `rank` of `tp_size` stores. With more ranks than heads, neighbours store copies."""
    start = rank * num_kv_heads // tp_size
    stop = (rank + 1) * num_kv_heads // tp_size
    return Span(start, max(stop, start + 1))


def plan_head_reads(wanted: Span, held_by_rank: Sequence[Span], turn: int) -> tuple[HeadRead, ...]:
    """Cover `wanted` from left to right with as few reads as possible.

    `held_by_rank[r]` are the heads that prefill rank r stores. Of the ranks that reach equally far, `turn`
    picks one: over consecutive turns each serves equally often. Raises TopologyError if some wanted head is
    stored nowhere.
    """
    reads: list[HeadRead] = []
    missing = wanted.start
    while missing < wanted.stop:
        rank, stop = _pick(missing, held_by_rank, turn)
        stop = min(stop, wanted.stop)
        reads.append(HeadRead(rank, Span(missing, stop)))
        missing = stop
    return tuple(reads)


def num_turns(held_by_rank: Sequence[Span]) -> int:
    """After how many turns the choice among copies repeats, for every head at once."""
    return math.lcm(*(sum(held == span for held in held_by_rank) for span in held_by_rank))


def turns_of(rank: int, tp_size: int, num_kv_heads: int) -> itertools.count[int]:
    """The turns at which decode rank `rank` reads, request after request.

    Ranks that want the same heads share the turns out among themselves, so that together they use each once:
    over any number of requests, copies on the prefill side are read equally often, give or take one.
    """
    wanted = heads_on(rank, tp_size, num_kv_heads)
    sharing = [other for other in range(tp_size) if heads_on(other, tp_size, num_kv_heads) == wanted]
    return itertools.count(sharing.index(rank), len(sharing))


def _pick(head: int, held_by_rank: Sequence[Span], turn: int) -> tuple[int, int]:
    holders = [rank for rank, held in enumerate(held_by_rank) if held.start <= head < held.stop]
    if not holders:
        raise TopologyError(f"no prefill rank stores KV head {head}; both engines must serve the same model")
    stop = max(held_by_rank[rank].stop for rank in holders)
    copies = [rank for rank in holders if held_by_rank[rank].stop == stop]
    return copies[turn % len(copies)], stop
