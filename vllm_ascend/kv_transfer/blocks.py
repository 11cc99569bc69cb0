# SPDX-License-Identifier: Apache-2.0
"""Blocks of tokens: which to pull, and which of them lie next to each other on both sides.

A request's blocks are listed in token order, so block i of the list holds the tokens
[i * block_size, (i + 1) * block_size) on either side, whatever its id. A prefix hit is an interval of
tokens that need not move; what remains is an interval of list positions.

vLLM's scheduler hands out blocks; a kernel may cut each into several smaller ones, which lie next to each
other in memory. Everything below the scheduler counts kernel blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from vllm_ascend.kv_transfer.topology import Span

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class BlockRuns:
    """Blocks that are neighbours on both sides, as three arrays of one length.

    Run i is the blocks remote_start[i] + k and local_start[i] + k for 0 <= k < length[i].
    """

    remote_start: Ints
    local_start: Ints
    length: Ints

    @property
    def num_blocks(self) -> int:
        return int(self.length.sum())

    def local_blocks(self) -> Ints:
        """Every local block, run after run."""
        return self._expand(self.local_start)

    def remote_blocks(self) -> Ints:
        """Every remote block, run after run: the counterparts of `local_blocks`."""
        return self._expand(self.remote_start)

    def _expand(self, start: Ints) -> Ints:
        in_run = np.arange(self.num_blocks, dtype=np.int64) - np.repeat(_before(self.length), self.length)
        return np.repeat(start, self.length) + in_run


def blocks_to_pull(tokens: Span, block_size: int) -> Span:
    """Positions in a request's block list that hold `tokens`. `tokens` starts on a block boundary."""
    # vLLM shows a connector only whole cached blocks, so no block is half local, half remote.
    assert tokens.start % block_size == 0
    return Span(tokens.start // block_size, -(-tokens.stop // block_size))


def kernel_blocks(blocks: Sequence[int], per_block: int) -> Ints:
    """The kernel blocks, in token order, of scheduler blocks that are cut into `per_block` each."""
    first = np.asarray(blocks, dtype=np.int64)[:, None] * per_block
    return (first + np.arange(per_block, dtype=np.int64)).reshape(-1)


def neighbours(remote: Ints, local: Ints, longest: int) -> BlockRuns:
    """Group pairs (remote[i], local[i]), in whatever order, into runs that ascend by one on both sides.

    No run exceeds `longest` blocks.
    """
    assert len(remote) == len(local)
    # vLLM frees a request's blocks last one first, and hands them out so: they are neighbours still.
    order = np.argsort(local, kind="stable")
    remote, local = remote[order], local[order]
    if len(remote) == 0:
        empty = np.empty(0, dtype=np.int64)
        return BlockRuns(empty, empty, empty)
    breaks = (np.diff(remote) != 1) | (np.diff(local) != 1)
    run_of = np.concatenate(([0], np.cumsum(breaks)))
    first_of_run = np.flatnonzero(np.concatenate(([True], breaks)))
    in_run = np.arange(len(remote)) - first_of_run[run_of]
    starts = np.flatnonzero(in_run % longest == 0)
    length = np.diff(np.append(starts, len(remote)))
    return BlockRuns(remote[starts], local[starts], length.astype(np.int64))


def _before(length: Ints) -> Ints:
    """For each run, how many blocks the runs before it have."""
    return np.cumsum(length) - length
