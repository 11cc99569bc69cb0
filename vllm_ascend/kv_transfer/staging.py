# SPDX-License-Identifier: Apache-2.0
"""A bounded pool of memory that pieces are read into, and the step that puts them into their pages.

    part 0   | read window 0 | place window 0 | read window 2 | ...
    part 1        | read window 1             | place window 1 | ...

The pool has a fixed number of parts. A reader thread takes a part, reads a window into it, hands it to the
device to be placed, and gives it back at once, with the event after which it may be written again. The next
window is on the wire by then, in another part, if one was free: a thread waits for a part only while it has
none, so any number of threads can share the pool and none waits for another for ever.

What windows there are, what is read into them and where it goes then, a `Way` says: `staged.InShares`, heads
of several sources side by side, or `converted.Converted`, rows out of pages that are cut otherwise.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from queue import Empty, SimpleQueue
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
import torch_npu

from vllm_ascend.errors import ConfigError, ReadUnsettled
from vllm_ascend.kv_transfer.place import Placing
from vllm_ascend.kv_transfer.transport import Address, Copies, Region
from vllm_ascend.kv_transfer.windows import Window

Ints = npt.NDArray[np.int64]

_PART_ALIGNMENT_BYTES = 4096
_LOOK_EVERY_S = 0.001


class Part:
    """One part of the pool. Belongs to one thread from `take` to the end of it."""

    def __init__(self, memory: torch.Tensor) -> None:
        self._memory = memory
        self._placed: torch_npu.npu.Event | None = None
        self._settled: Callable[[], bool] = lambda: True

    @property
    def address(self) -> Address:
        return Address(self._memory.data_ptr())

    def pieces(self, window: Window, shares: int, piece_bytes: int) -> torch.Tensor:
        """What a window of it holds: [layers, shares, pages, bytes of a piece], int8."""
        return self.holds((len(window.layers), shares, len(window.pages), piece_bytes))

    def holds(self, shape: Sequence[int], before_bytes: int = 0) -> torch.Tensor:
        """What it holds behind the first `before_bytes`, in this shape, int8."""
        return self._memory[before_bytes : before_bytes + math.prod(shape)].view(*shape)

    def until(self, placed: torch_npu.npu.Event) -> None:
        """It must not be written again before `placed`."""
        self._placed = placed

    def after(self, settled: Callable[[], bool]) -> None:
        """A read into it failed and may still write it until it is `settled`."""
        self._settled = settled

    @property
    def settled(self) -> bool:
        """Whether no failed read can write it any more."""
        return self._settled()

    def wait(self) -> None:
        """Return when it may be written. Blocks the calling thread."""
        if self._placed is not None:
            self._placed.synchronize()
            self._placed = None


class StagingPool:
    """`num_parts` parts of equal size, shared by all reader threads of a rank."""

    def __init__(self, num_bytes: int, num_parts: int, largest_page_bytes: int, device: torch.device) -> None:
        """Allocate about `num_bytes`. Raises ConfigError if a part cannot hold a page of one layer."""
        self._num_bytes, self._num_parts = num_bytes, num_parts
        self.part_bytes = num_bytes // num_parts // _PART_ALIGNMENT_BYTES * _PART_ALIGNMENT_BYTES
        self.check_holds(largest_page_bytes)
        self._memory = torch.empty(num_parts * self.part_bytes, dtype=torch.int8, device=device)
        # Memory may come from work that is not done with it, which a transport does not wait for.
        torch_npu.npu.current_stream(device).synchronize()
        self._free: SimpleQueue[Part] = SimpleQueue()
        for memory in self._memory.split(self.part_bytes):
            self._free.put(Part(memory))

    @property
    def region(self) -> Region:
        """The memory that a transport must be able to write."""
        return Region(Address(self._memory.data_ptr()), self._memory.numel())

    def check_holds(self, page_bytes: int) -> None:
        """Raise ConfigError if a part cannot hold `page_bytes`, which are read of a page of one layer."""
        if self.part_bytes < page_bytes:
            raise ConfigError(
                f"staging memory of {self._num_bytes} bytes has {self._num_parts} parts of {self.part_bytes} "
                f"bytes and a page of one layer has {page_bytes}; raise staging_mib in "
                f"kv_connector_extra_config"
            )

    @contextmanager
    def take(self) -> Iterator[Part]:
        """A part that may be written, for as long as the context lasts. Waits until there is one."""
        part = self.next()
        with self.giving_back(part):
            yield part

    def next(self) -> Part:
        """A part that may be written, the caller's until it is given back. Waits until there is one."""
        while not (part := self._free.get()).settled:
            self._free.put(part)
            time.sleep(_LOOK_EVERY_S)
        part.wait()
        return part

    def next_if_free(self) -> Part | None:
        """The same, or None where `next` would wait for somebody."""
        with suppress(Empty):
            part = self._free.get_nowait()
            if part.settled:
                part.wait()
                return part
            self._free.put(part)
        return None

    @contextmanager
    def giving_back(self, part: Part) -> Iterator[None]:
        """Put `part` back into the pool when the context ends.

        Left by ReadUnsettled, the part is handed out again only when nothing can write it any more.
        """
        try:
            yield
        except ReadUnsettled as error:
            part.after(error.settled)
            raise
        finally:
            self._free.put(part)


class Way(Protocol):
    """How some layers of what a request wants go through the pool, window by window."""

    @property
    def prefill_ranks(self) -> set[int]:
        """The ranks that are read."""
        ...

    def windows(self, part_bytes: int) -> Iterator[Window]:
        """All that is wanted, at most `part_bytes` at a time."""
        ...

    def num_bytes(self, window: Window) -> int:
        """What is read of a window, from all ranks."""
        ...

    def copies(self, window: Window, at: Address) -> list[tuple[int, Copies]]:
        """The ranges to read for a window into the part that begins at `at`, each with its prefill rank."""
        ...

    def place(self, part: Part, window: Window) -> None:
        """Put what was read into `part` where it belongs. Returns when the device has been told."""
        ...

    def finish(self) -> None:
        """Return when all that the device was told is done."""
        ...


class PlacingStream:
    """A stream of the device on which parts are placed. For any thread."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch_npu.npu.Stream(device=device)

    @contextmanager
    def current(self) -> Iterator[None]:
        """Work and memory of the context are the stream's: none is reused while work on it needs it."""
        with torch.inference_mode(), torch_npu.npu.stream(self._stream):
            yield

    @contextmanager
    def placing(self, part: Part) -> Iterator[None]:
        """The same, for work that reads `part`, which then knows when it is done."""
        with self.current():
            yield
            placed = torch_npu.npu.Event()
            placed.record()
        part.until(placed)

    def finish(self) -> None:
        """Return when all that was put on the stream is done."""
        self._stream.synchronize()


class StagedRegroup:
    """The regroup step of layers that are alike, from staging memory, on a stream of its own."""

    def __init__(self, kv_caches: Sequence[torch.Tensor], placing: Placing) -> None:
        """`kv_caches` are vLLM's views [num_blocks, heads, block_size, 2 * head_size], all layers alike."""
        self._placing = placing
        self._page_bytes = kv_caches[0][0].numel() * kv_caches[0].element_size()
        self._stream = PlacingStream(kv_caches[0].device)

    def target(self, local_pages: Ints, shares: int) -> torch.Tensor:
        """Where `place` is to put the pieces of `local_pages`, in any layer."""
        with self._stream.current():
            return self._placing.target(local_pages, shares)

    def place(self, part: Part, window: Window, shares: int, target: torch.Tensor) -> None:
        """Put what was read into `part` where it belongs; `target` was made for the window's pages.

        Returns when the device has been told; `part` knows when it is done.
        """
        pieces = part.pieces(window, shares, self._page_bytes // shares)
        with self._stream.placing(part):
            self._placing.place(pieces, window.layers.start, target)

    def finish(self) -> None:
        """Return when all that was told the device is done."""
        self._stream.finish()
