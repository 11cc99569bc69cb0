# SPDX-License-Identifier: Apache-2.0
"""What is done to pages after a read: heads of several sources into one block, elements of another type.

After a read from S sources a run of blocks holds S shares, each of them whole pages of fewer heads (see
`plan`). Attention wants every head of a token side by side. The pages of all shares are loaded as packed rows
[block, share, token, head, dim], transposed to [block, token, share, head, dim] and stored back, with
torch_npu's own paged operators. A run is loaded whole before any of it is stored. Only bits move, so element
types that the operators do not take are shown to them as ones that they do.

Elements of another type, of the same size, arrive as bits of that type and are converted where they lie.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from queue import SimpleQueue

import numpy as np
import numpy.typing as npt
import torch
import torch_npu

from vllm_ascend.attention.cache_layout import HALVES, PageLayout, layer_rows, operator_block, split_pages
from vllm_ascend.errors import ReadFailed

Ints = npt.NDArray[np.int64]

LONGEST_RUN = 64
"""Blocks of a run that is read in shares: bounds the memory that a regroup needs beside the cache."""

_STREAMS = 2
"""How many requests regroup at once; each takes memory beside the cache."""


class Regroup:
    """Work on the layers of one stack, on streams of its own. All but `fence` is for reader threads.

    Requests take turns after each part of LONGEST_RUN blocks: a long one does not hold up a short one.
    """

    def __init__(self, kv_caches: Sequence[torch.Tensor]) -> None:
        """`kv_caches` are vLLM's views [num_blocks, heads, block_size, content], all layers alike."""
        self._kv_caches = kv_caches
        self._layers = [_movable(kv_cache) for kv_cache in kv_caches]
        self._device = kv_caches[0].device
        self._streams: SimpleQueue[torch_npu.npu.Stream] = SimpleQueue()
        for _ in range(_STREAMS):
            self._streams.put(torch_npu.npu.Stream(device=self._device))
        self._fenced: dict[torch.Stream, torch_npu.npu.Stream] = {}

    def enter_thread(self) -> None:
        """Make the cache's device current in the calling thread, which would otherwise open device 0."""
        torch_npu.npu.set_device(self._device)

    def fence(self) -> Fence:
        """A point after all work that the calling thread has put on its stream."""
        # torch_npu makes an object for the current stream whenever it is asked for it, which takes longer
        # than all else that an engine's thread does for a pull.
        current = torch.accelerator.current_stream()
        if current not in self._fenced:
            self._fenced[current] = torch_npu.npu.current_stream()
        event = torch_npu.npu.Event()
        event.record(self._fenced[current])
        return Fence(event)

    def run(self, local_blocks: Ints, positions: Ints, run_lengths: Ints) -> None:
        """Regroup `local_blocks`, whose shares landed at `positions` [num_blocks, shares], in place.

        `run_lengths` says how many consecutive entries of both are one run. Returns when the device is done.
        """
        for part in _whole_runs(run_lengths):
            with self._stream() as stream:
                self._regroup(local_blocks[part], positions[part])
                stream.synchronize()

    def convert(self, page: PageLayout, slots: Ints, cache_dtype: str) -> None:
        """Make the tokens in `slots`, which were read as elements of `cache_dtype`, elements of this cache.

        Returns when the device is done. Raises ReadFailed if a number is too large for this cache.
        """
        with self._stream():
            rows = torch.from_numpy(page.rows(slots).reshape(-1)).to(self._device)
            fits = torch.ones((), dtype=torch.bool, device=self._device)
            for kv_cache in self._kv_caches:
                here = layer_rows(kv_cache, page)
                there = here.view(getattr(torch, cache_dtype)).index_select(0, rows)
                converted = there.to(here.dtype)
                fits &= (converted.isfinite() == there.isfinite()).all()
                here.index_copy_(0, rows, converted)
            if not fits.item():
                raise ReadFailed(
                    f"KV was computed in {cache_dtype} and has numbers too large for {kv_cache.dtype}; "
                    f"start both engines with the same --kv-cache-dtype"
                )

    @contextmanager
    def _stream(self) -> Iterator[torch_npu.npu.Stream]:
        """A stream that nobody else uses meanwhile, made current. Waits until there is one."""
        stream = self._streams.get()
        try:
            with torch.inference_mode(), torch_npu.npu.stream(stream):
                yield stream
        finally:
            self._streams.put(stream)

    def _regroup(self, local_blocks: Ints, positions: Ints) -> None:
        num_blocks, shares = positions.shape
        _, heads, block_size, content = self._layers[0].shape
        share_heads, head_size = heads // shares, content // HALVES
        num_rows = num_blocks * shares * block_size
        table = self._int32(operator_block(positions.reshape(1, -1)))
        lengths = self._int32(np.array([num_rows]))
        slots = self._int32(_slots(local_blocks, block_size))
        by_share = self._layers[0].new_empty(HALVES, num_blocks, shares, block_size, share_heads, head_size)
        by_token = self._layers[0].new_empty(HALVES, num_blocks, block_size, shares, share_heads, head_size)
        shares_k, shares_v = by_share.view(HALVES, num_rows, share_heads, head_size)
        key, value = by_token.view(HALVES, num_blocks * block_size, heads, head_size)
        for layer in self._layers:
            pages_k, pages_v = split_pages(layer, shares)
            torch.ops.atb.npu_paged_cache_load.out(
                pages_k, pages_v, table, lengths, key=shares_k, value=shares_v
            )
            by_token.copy_(by_share.transpose(2, 3))
            key_cache, value_cache = split_pages(layer)
            torch_npu._npu_reshape_and_cache(key, value, key_cache, value_cache, slots)

    def _int32(self, values: Ints) -> torch.Tensor:
        return torch.from_numpy(values.astype(np.int32)).to(self._device)


class Fence:
    """Work of a stream that something must wait for."""

    def __init__(self, event: torch_npu.npu.Event) -> None:
        self._event = event

    def wait(self) -> None:
        """Return when the work is done. Blocks the calling thread, not the device."""
        self._event.synchronize()


def _movable(kv_cache: torch.Tensor) -> torch.Tensor:
    match kv_cache.element_size():
        case 1:
            return kv_cache.view(torch.int8)
        case 2:
            return kv_cache
        case _:
            return kv_cache.view(torch.float16)


def _slots(local_blocks: Ints, block_size: int) -> Ints:
    """Slots of every token of the blocks, in the caches of `split_pages`."""
    slots: Ints = np.add.outer(operator_block(local_blocks) * block_size, np.arange(block_size))
    return slots.reshape(-1)


def _whole_runs(run_lengths: Ints) -> Iterator[slice]:
    """Slices of about LONGEST_RUN blocks that cut no run."""
    start = stop = 0
    for length in run_lengths.tolist():
        if stop + length - start > LONGEST_RUN and stop > start:
            yield slice(start, stop)
            start = stop
        stop += length
    if stop > start:
        yield slice(start, stop)
