# SPDX-License-Identifier: Apache-2.0
"""A request's tokens: in which slots they are, and which of them lie next to each other on both sides.

A request's blocks are listed in token order, so block i of the list holds the tokens
[i * block_size, (i + 1) * block_size), whatever its id. What is to be pulled is an interval of tokens; a
prefix hit is one that need not move.

Each KV cache group has such a list. Where its layers have a sliding window, the blocks left of it are given
away, and the list has vLLM's null block in their place. Where they keep recurrent state, one block of the
list holds all of it, after the last token; it moves whole.

vLLM's scheduler hands out blocks; a kernel may cut each into several pages, which lie next to each other in
memory. A token's slot (its block's id times the block size, plus its place in the block) says where it is
for either: it is token slot % page_size of page slot // page_size. So two engines may cut their caches each
in its own way: what they have in common is tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from vllm_ascend.kv_transfer.topology import Span

Ints = npt.NDArray[np.int64]

NULL_BLOCK = 0
"""vLLM's null block, which never holds anything: in a request's list, a block left of the window."""


@dataclass(frozen=True)
class Keeps:
    """What of a request's tokens the layers of a KV cache group keep."""

    window: int | None = None
    """Tokens of their sliding window; None: they keep every token."""
    tokens_per_state: int | None = None
    """They keep only their state after the last one, in a block for so many; None: they keep tokens."""

    @property
    def is_state(self) -> bool:
        return self.tokens_per_state is not None


@dataclass(frozen=True)
class Blocks:
    """A request's blocks in one engine, in token order."""

    ids: Sequence[int]
    block_size: int
    """Tokens per block of vLLM's scheduler."""
    page_size: int
    """Tokens per block of attention; divides `block_size`."""

    @property
    def num_tokens(self) -> int:
        """How many tokens there is room for."""
        return len(self.ids) * self.block_size

    def slots(self, tokens: Ints) -> Ints:
        """Where `tokens`, counted from the request's first, are."""
        ids = np.asarray(self.ids, dtype=np.int64)
        slots: Ints = ids[tokens // self.block_size] * self.block_size + tokens % self.block_size
        return slots


@dataclass(frozen=True)
class Runs:
    """Tokens, or pages, that are neighbours on both sides, as three arrays of one length.

    Run i is remote_start[i] + k and local_start[i] + k for 0 <= k < length[i].
    """

    remote_start: Ints
    local_start: Ints
    length: Ints

    def __len__(self) -> int:
        return len(self.length)

    @property
    def total(self) -> int:
        """How many tokens, or pages, all runs have together."""
        return int(self.length.sum())

    def local(self) -> Ints:
        """Every local token or page, run after run."""
        return self._expand(self.local_start)

    def remote(self) -> Ints:
        """Every remote one, run after run: the counterparts of `local`."""
        return self._expand(self.remote_start)

    def one_by_one(self) -> Runs:
        """The same tokens or pages, each a run of its own."""
        return Runs(self.remote(), self.local(), np.ones(self.total, dtype=np.int64))

    def in_pages(self, page_size: int) -> Runs:
        """Runs of tokens as runs of pages. They must be whole pages of one size on both sides."""
        return Runs(self.remote_start // page_size, self.local_start // page_size, self.length // page_size)

    def _expand(self, start: Ints) -> Ints:
        in_run = np.arange(self.total, dtype=np.int64) - np.repeat(_before(self.length), self.length)
        return np.repeat(start, self.length) + in_run


def tokens_from(first: int, count: int) -> Span:
    """`count` tokens, from the request's token `first` on."""
    return Span(first, first + count)


def tokens_seen(tokens: Span, window: int | None) -> Span:
    """Of `tokens`, those that the token after them sees, through a sliding window of `window` tokens."""
    # The next token is in its own window.
    return tokens if window is None else Span(max(tokens.start, tokens.stop - window + 1), tokens.stop)


def state_block(blocks: Sequence[int], num_tokens: int, tokens_per_state: int) -> int:
    """Of a request's `blocks` in token order, the one that holds its state after `num_tokens`, at least 1.

    It is that of the last token, whether vLLM lists a block for each `tokens_per_state` tokens or, where that
    is more than a request may have, one in all. The null block if the list has none there.
    """
    at = (num_tokens - 1) // tokens_per_state
    return blocks[at] if at < len(blocks) else NULL_BLOCK


def positions_of(tokens: Span, block_size: int) -> Span:
    """Positions in a request's block list that hold `tokens`."""
    return Span(tokens.start // block_size, -(-tokens.stop // block_size))


def runs_of(tokens: Span, remote: Blocks, local: Blocks, longest: int) -> Runs:
    """The slots of `tokens` on both sides, as runs of tokens.

    Where the pages of both sides have one size, runs are whole pages, as many as lie next to each other and
    at most `longest`. Otherwise a run ends with either side's page, since behind the K of a page comes its V.
    The last run goes on to the next token at which pages of both sides could end: a multiple of the greatest
    common divisor of their sizes, so that it needs no token which either side has no room for. The first one
    begins at such a token, too.
    """
    common = math.gcd(remote.page_size, local.page_size)
    start, stop = tokens.start // common * common, -(-tokens.stop // common) * common
    ends = [np.arange(0, stop, size, dtype=np.int64) for size in (remote.page_size, local.page_size)]
    cuts = np.unique(np.concatenate(([start], *ends)))
    cuts = cuts[cuts >= start]
    if remote.page_size == local.page_size:
        return neighbours(remote.slots(cuts), local.slots(cuts), common, longest)
    return Runs(remote.slots(cuts), local.slots(cuts), np.diff(np.append(cuts, stop)))


def neighbours(remote: Ints, local: Ints, size: int, longest: int) -> Runs:
    """Group pieces of `size`, from remote[i] and local[i] on, in whatever order, into runs.

    No run exceeds `longest` pieces.
    """
    assert len(remote) == len(local)
    if len(remote) == 0:
        empty = np.empty(0, dtype=np.int64)
        return Runs(empty, empty, empty)
    # vLLM frees a request's blocks last one first, and hands them out so: they are neighbours still.
    order = np.argsort(local, kind="stable")
    remote, local = remote[order], local[order]
    breaks = (np.diff(remote) != size) | (np.diff(local) != size)
    run_of = np.concatenate(([0], np.cumsum(breaks)))
    first_of_run = np.flatnonzero(np.concatenate(([True], breaks)))
    in_run = np.arange(len(remote)) - first_of_run[run_of]
    starts = np.flatnonzero(in_run % longest == 0)
    pieces = np.diff(np.append(starts, len(remote))).astype(np.int64)
    return Runs(remote[starts], local[starts], pieces * size)


def _before(length: Ints) -> Ints:
    """For each run, how many tokens or pages the runs before it have."""
    return np.cumsum(length) - length
