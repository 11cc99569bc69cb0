# SPDX-License-Identifier: Apache-2.0
"""One request's pages of one stack, on their way through staging memory: read a window, place it, next.

The transport reads into a part of the pool while the device places the part before. Nothing is written to the
request's pages but what was read whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    import torch

from vllm_ascend.errors import ReadFailed
from vllm_ascend.kv_transfer.blocks import Runs
from vllm_ascend.kv_transfer.config import Options
from vllm_ascend.kv_transfer.place import placing_of
from vllm_ascend.kv_transfer.plan import PairPlan
from vllm_ascend.kv_transfer.reader import Stopwatch, read_all
from vllm_ascend.kv_transfer.staging import Part, StagedRegroup, StagingPool
from vllm_ascend.kv_transfer.transport import Copies, Region, Session, Transport
from vllm_ascend.kv_transfer.windows import (
    SharedPages,
    Window,
    copies_into,
    prove_filled,
    sources_of,
    windows,
)

Ints = npt.NDArray[np.int64]


@dataclass
class StagedNumbers:
    """What it cost."""

    bytes: int = 0
    descriptors: int = 0
    transfer_ms: float = 0.0
    """Reading, with what the device placed meanwhile."""
    regroup_ms: float = 0.0
    """What the device placed while nothing was read."""


PARTS_PER_THREAD = 2
"""One to read into, one to place from."""


class Staging:
    """A rank's staging memory, and the regroup step of each of its stacks."""

    def __init__(self, pool: StagingPool, regroups: Sequence[StagedRegroup]) -> None:
        self._pool = pool
        self._regroups = regroups

    @property
    def regions(self) -> list[Region]:
        """What the transport must be able to write."""
        return [self._pool.region]

    def read(self, stack: int, plan: PairPlan, runs: Runs) -> StagedRead:
        """The read of `runs` for the rank's stack number `stack`. Raises ReadFailed as `StagedRead` does."""
        return StagedRead(plan, runs, self._pool, self._regroups[stack])


def staging_of(options: Options, stacks: Sequence[Sequence[torch.Tensor]]) -> Staging | None:
    """The staging memory that `options` ask for; None: a regroup in place, or none at all.

    `stacks` are vLLM's views of the layers of each stack. Raises ConfigError if the memory is too small for
    its parts to hold a page, or if Triton is asked for and not there.
    """
    if options.regroup == "operators" or not stacks:
        return None
    placing = placing_of(options.regroup)
    layers = [layer for stack in stacks for layer in stack]
    largest_page_bytes = max(layer[0].numel() * layer.element_size() for layer in layers)
    num_parts = PARTS_PER_THREAD * options.reader_threads
    pool = StagingPool(options.staging_mib * 2**20, num_parts, largest_page_bytes, layers[0].device)
    return Staging(pool, [StagedRegroup(stack, placing(stack)) for stack in stacks])


class StagedRead:
    """Pages that several sources share, of all layers of one stack."""

    def __init__(self, plan: PairPlan, runs: Runs, pool: StagingPool, regroup: StagedRegroup) -> None:
        """`runs` are the tokens wanted, whole pages.

        Raises ReadFailed if one lies outside either cache, or a page here is wanted twice.
        """
        plan.check(runs)
        pages = runs.in_pages(plan.local.page.block_size)
        # The order of pages is free here; this one makes the longest ranges there.
        order = np.argsort(pages.remote(), kind="stable")
        self._remote_pages, self._local_pages = pages.remote()[order], pages.local()[order]
        if len(np.unique(self._local_pages)) < len(self._local_pages):
            raise ReadFailed("two pages were to be read into the same one; nothing was read")
        self._plan = plan
        self._sources = sources_of(plan)
        self._pool = pool
        self._regroup = regroup

    @property
    def prefill_ranks(self) -> set[int]:
        """The ranks that are read."""
        return {source.prefill_rank for source in self._sources}

    def run(self, transport: Transport, sessions: Sequence[Session]) -> StagedNumbers:
        """Read and place all of it; returns when the device is done. Raises ReadFailed."""
        numbers, clock = StagedNumbers(), Stopwatch.started()
        num_layers, num_pages = len(self._plan.local.layers), len(self._local_pages)
        page_bytes, shares = self._plan.local.page.page_bytes, self._plan.shares
        targets: dict[range, torch.Tensor] = {}
        for window in windows(num_layers, num_pages, page_bytes, self._pool.part_bytes):
            with self._pool.take() as part:
                copies = [self._copies(window, part, source) for source in self._sources]
                num_bytes = len(window.layers) * len(window.pages) * page_bytes
                prove_filled(part.address, num_bytes, copies)
                reads = zip((sessions[source.prefill_rank] for source in self._sources), copies, strict=True)
                read_all(transport, [*reads])
                if window.pages not in targets:
                    pages = self._local_pages[window.pages.start : window.pages.stop]
                    targets[window.pages] = self._regroup.target(pages, shares)
                self._regroup.place(part, window, shares, targets[window.pages])
            numbers.bytes += num_bytes
            numbers.descriptors += sum(map(len, copies))
        numbers.transfer_ms = clock.lap_ms()
        self._regroup.finish()
        numbers.regroup_ms = clock.lap_ms()
        return numbers

    def _copies(self, window: Window, part: Part, source: SharedPages) -> Copies:
        return copies_into(window, self._plan.shares, source, self._remote_pages, part.address)
