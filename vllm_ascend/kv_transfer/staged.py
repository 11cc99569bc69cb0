# SPDX-License-Identifier: Apache-2.0
"""One request's pages of one stack, on their way through staging memory: read a window, place it, next.

The transport reads into one part of the pool while another is placed. Nothing is written to the request's
pages but what was read whole.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from vllm_ascend.errors import ConfigError, ReadFailed, TopologyError
from vllm_ascend.kv_transfer.blocks import Runs
from vllm_ascend.kv_transfer.config import Options
from vllm_ascend.kv_transfer.convert import paged_tokens, stages_of
from vllm_ascend.kv_transfer.converted import Conversion, Converted
from vllm_ascend.kv_transfer.place import placing_of
from vllm_ascend.kv_transfer.plan import PairPlan
from vllm_ascend.kv_transfer.reader import Begin, Stopwatch
from vllm_ascend.kv_transfer.staging import Part, StagedRegroup, StagingPool, Way
from vllm_ascend.kv_transfer.transport import Address, Copies, Region, Session
from vllm_ascend.kv_transfer.windows import (
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
    """A rank's staging memory, and what goes through it: of each stack, shares to regroup or rows to convert.

    It is allocated at start where `regroup` asks for it, and otherwise when the first engine with the other
    layout is met: most never meet one. `prepare` and `read` are for reader threads.
    """

    def __init__(
        self,
        options: Options,
        stacks: Sequence[Sequence[torch.Tensor]],
        regroups: bool,
        register: Callable[[Sequence[Region]], None],
    ) -> None:
        """`stacks` are vLLM's views of the layers of each stack; `regroups`: whether they can come in shares.

        `register` opens memory to the transport. Raises ConfigError if `options` ask for memory at start and
        it is too small for its parts to hold a page, or if they ask for Triton, which is not there.
        """
        self._options = options
        self._stacks = stacks
        self._register = register
        self._regroups: list[StagedRegroup] = []
        self._conversions: dict[int, Conversion] = {}
        self._lock = threading.Lock()
        self._pool: StagingPool | None = None
        if regroups and options.uses_staging and stacks:
            placing = placing_of(options.regroup)
            self._regroups = [StagedRegroup(stack, placing(stack)) for stack in stacks]
            self._open(max(layer[0].numel() * layer.element_size() for stack in stacks for layer in stack))

    def prepare(self, stack: int, plan: PairPlan) -> None:
        """Have what the rank's stack number `stack` needs to be read by `plan`, which converts.

        Raises TopologyError if there is no memory for it, or too little.
        """
        largest_page_bytes = max(stage.page_bytes for stage in stages_of(plan))
        # Reader threads meet several engines at once.
        with self._lock:
            try:
                self._open(largest_page_bytes)
            except ConfigError as error:
                raise TopologyError(
                    f"its pages must be converted, which takes staging memory: {error}"
                ) from error
            if stack not in self._conversions:
                self._conversions[stack] = Conversion(self._stacks[stack], plan.local.page)

    def takes(self, plan: PairPlan) -> bool:
        """Whether what is read by `plan` goes through staging memory."""
        return plan.converts or (plan.shares > 1 and bool(self._regroups))

    def read(self, stack: int, plan: PairPlan, runs: Runs) -> StagedRead:
        """The read of `runs` for the rank's stack number `stack`, which `plan` was prepared for.

        Raises ReadFailed if one lies outside either cache, or something here is wanted twice.
        """
        assert self._pool is not None
        plan.check(runs)
        if not plan.converts:
            return StagedRead([InShares(plan, runs, self._regroups[stack])], self._pool)
        stages = stages_of(plan)
        tokens = paged_tokens(runs, stages[0].page_size)
        return StagedRead(
            [Converted(stage, tokens, self._conversions[stack]) for stage in stages], self._pool
        )

    def _open(self, largest_page_bytes: int) -> None:
        """Allocate the memory unless it is there. Raises ConfigError if it cannot be had, or is too small."""
        if self._pool is not None:
            self._pool.check_holds(largest_page_bytes)
            return
        num_bytes, device = self._options.staging_mib * 2**20, self._stacks[0][0].device
        num_parts = PARTS_PER_THREAD * self._options.reader_threads
        try:
            pool = StagingPool(num_bytes, num_parts, largest_page_bytes, device)
        except torch.OutOfMemoryError as error:
            raise ConfigError(
                f"there are no {num_bytes} bytes of device memory left for staging; lower staging_mib in "
                f"kv_connector_extra_config or --gpu-memory-utilization"
            ) from error
        self._register([pool.region])
        self._pool = pool


class InShares:
    """Pages that several sources share, in all layers of one stack: a `staging.Way`."""

    def __init__(self, plan: PairPlan, runs: Runs, regroup: StagedRegroup) -> None:
        """`runs` are the tokens wanted, whole pages. Raises ReadFailed if a page here is wanted twice."""
        pages = runs.in_pages(plan.local.page.block_size)
        # The order of pages is free here; this one makes the longest ranges there.
        order = np.argsort(pages.remote(), kind="stable")
        self._remote_pages, self._local_pages = pages.remote()[order], pages.local()[order]
        if len(np.unique(self._local_pages)) < len(self._local_pages):
            raise ReadFailed("two pages were to be read into the same one; nothing was read")
        self._plan = plan
        self._sources = sources_of(plan)
        self._regroup = regroup
        self._targets: dict[range, torch.Tensor] = {}

    @property
    def prefill_ranks(self) -> set[int]:
        return {source.prefill_rank for source in self._sources}

    def windows(self, part_bytes: int) -> Iterator[Window]:
        num_layers, num_pages = len(self._plan.local.layers), len(self._local_pages)
        return windows(num_layers, num_pages, self._plan.local.page.page_bytes, part_bytes)

    def num_bytes(self, window: Window) -> int:
        return len(window.layers) * len(window.pages) * self._plan.local.page.page_bytes

    def copies(self, window: Window, at: Address) -> list[tuple[int, Copies]]:
        return [
            (
                source.prefill_rank,
                copies_into(window, self._plan.shares, source, self._remote_pages, at),
            )
            for source in self._sources
        ]

    def place(self, part: Part, window: Window) -> None:
        if window.pages not in self._targets:
            pages = self._local_pages[window.pages.start : window.pages.stop]
            self._targets[window.pages] = self._regroup.target(pages, self._plan.shares)
        self._regroup.place(part, window, self._plan.shares, self._targets[window.pages])

    def finish(self) -> None:
        self._regroup.finish()


class StagedRead:
    """What goes through staging memory of one request and stack."""

    def __init__(self, ways: Sequence[Way], pool: StagingPool) -> None:
        self._ways = ways
        self._pool = pool

    @property
    def prefill_ranks(self) -> set[int]:
        """The ranks that are read."""
        return set().union(*(way.prefill_ranks for way in self._ways))

    def run(self, begin: Begin, sessions: Sequence[Session]) -> StagedNumbers:
        """Read and place all of it; returns when the device is done. Raises ReadFailed, and also then."""
        numbers, clock = StagedNumbers(), Stopwatch.started()
        under_way: deque[_UnderWay] = deque()
        try:
            for way in self._ways:
                for window in way.windows(self._pool.part_bytes):
                    part = self._pool.next_if_free() if under_way else None
                    if part is None:
                        _end_all(under_way)
                        part = self._pool.next()
                    under_way.append(self._begin(way, window, part, begin, sessions, numbers))
                    if len(under_way) > 1:
                        under_way.popleft().end()
            _end_all(under_way)
        finally:
            for left in under_way:
                left.drop()
            numbers.transfer_ms = clock.lap_ms()
            # After a failure, too: vLLM gives the pages to others, and nothing may be written to them then.
            for way in self._ways:
                way.finish()
        numbers.regroup_ms = clock.lap_ms()
        return numbers

    def _begin(
        self,
        way: Way,
        window: Window,
        part: Part,
        begin: Begin,
        sessions: Sequence[Session],
        numbers: StagedNumbers,
    ) -> _UnderWay:
        with ExitStack() as on_failure:
            on_failure.enter_context(self._pool.giving_back(part))
            ranges, num_bytes = way.copies(window, part.address), way.num_bytes(window)
            prove_filled(part.address, num_bytes, [copies for _, copies in ranges])
            wait = begin([(sessions[rank], copies) for rank, copies in ranges])
            numbers.bytes += num_bytes
            numbers.descriptors += sum(len(copies) for _, copies in ranges)
            return _UnderWay(way, window, part, wait, on_failure.pop_all())


@dataclass(frozen=True)
class _UnderWay:
    """A window that is being read. Its part goes back to the pool when it ends, whatever came of it."""

    way: Way
    window: Window
    part: Part
    wait: Callable[[], None]
    giving_back: ExitStack

    def end(self) -> None:
        """Wait until it is read, and have the device place it. Raises ReadFailed."""
        with self.giving_back:
            self.wait()
            self.way.place(self.part, self.window)

    def drop(self) -> None:
        """Wait until it is read or not, for nothing."""
        with suppress(ReadFailed), self.giving_back:
            self.wait()


def _end_all(under_way: deque[_UnderWay]) -> None:
    while under_way:
        under_way.popleft().end()
