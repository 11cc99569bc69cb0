# SPDX-License-Identifier: Apache-2.0
"""A bounded pool of memory that pieces are read into, and the step that puts them into their pages.

    part 0   | read window 0 | place window 0 | read window 2 | ...
    part 1                   | read window 1  | place window 1 | ...

The pool has a fixed number of parts. A reader thread takes a part, reads a window into it, hands it to the
device to be placed, and gives it back at once, with the event after which it may be written again. So the
next window is on the wire while the device places the one before. A thread holds one part at a time, so any
number of threads can share the pool and none waits for another for ever.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from queue import SimpleQueue

import numpy as np
import numpy.typing as npt
import torch
import torch_npu

from vllm_ascend.errors import ConfigError, ReadUnsettled
from vllm_ascend.kv_transfer.place import Placing
from vllm_ascend.kv_transfer.transport import Address, Region
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
        shape = (len(window.layers), shares, len(window.pages), piece_bytes)
        return self._memory[: np.prod(shape, dtype=int)].view(shape)

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
        self.part_bytes = num_bytes // num_parts // _PART_ALIGNMENT_BYTES * _PART_ALIGNMENT_BYTES
        if self.part_bytes < largest_page_bytes:
            raise ConfigError(
                f"staging memory of {num_bytes} bytes has {num_parts} parts of {self.part_bytes} bytes and a "
                f"page of one layer has {largest_page_bytes}; raise staging_mib in kv_connector_extra_config"
            )
        self._memory = torch.empty(num_parts * self.part_bytes, dtype=torch.int8, device=device)
        self._free: SimpleQueue[Part] = SimpleQueue()
        for memory in self._memory.split(self.part_bytes):
            self._free.put(Part(memory))

    @property
    def region(self) -> Region:
        """The memory that a transport must be able to write."""
        return Region(Address(self._memory.data_ptr()), self._memory.numel())

    @contextmanager
    def take(self) -> Iterator[Part]:
        """A part that may be written, for as long as the context lasts. Waits until there is one.

        Left by ReadUnsettled, the part is handed out again only when nothing can write it any more.
        """
        while not (part := self._free.get()).settled:
            self._free.put(part)
            time.sleep(_LOOK_EVERY_S)
        try:
            part.wait()
            yield part
        except ReadUnsettled as error:
            part.after(error.settled)
            raise
        finally:
            self._free.put(part)


class StagedRegroup:
    """The regroup step of layers that are alike, from staging memory, on a stream of its own."""

    def __init__(self, kv_caches: Sequence[torch.Tensor], placing: Placing) -> None:
        """`kv_caches` are vLLM's views [num_blocks, heads, block_size, 2 * head_size], all layers alike."""
        self._placing = placing
        self._device = kv_caches[0].device
        self._page_bytes = kv_caches[0][0].numel() * kv_caches[0].element_size()
        self._stream = torch_npu.npu.Stream(device=self._device)

    def target(self, local_pages: Ints, shares: int) -> torch.Tensor:
        """Where `place` is to put the pieces of `local_pages`, in any layer."""
        return self._placing.target(local_pages, shares)

    def place(self, part: Part, window: Window, shares: int, target: torch.Tensor) -> None:
        """Put what was read into `part` where it belongs; `target` was made for the window's pages.

        Returns when the device has been told; `part` knows when it is done.
        """
        pieces = part.pieces(window, shares, self._page_bytes // shares)
        with torch.inference_mode(), torch_npu.npu.stream(self._stream):
            self._placing.place(pieces, window.layers.start, target)
            placed = torch_npu.npu.Event()
            placed.record()
        part.until(placed)

    def finish(self) -> None:
        """Return when all that was told the device is done."""
        self._stream.synchronize()
