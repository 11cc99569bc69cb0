# SPDX-License-Identifier: Apache-2.0
"""Pieces from staging memory into pages on the device, byte for byte against plain indexing."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import ClassVar

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_ascend.errors import ConfigError, ReadFailed, ReadUnsettled
from vllm_ascend.kv_transfer.place import PerLayer, placing_of
from vllm_ascend.kv_transfer.reader import Begin
from vllm_ascend.kv_transfer.staged import StagedRead
from vllm_ascend.kv_transfer.staging import Part, PlacingStream, StagedRegroup, StagingPool
from vllm_ascend.kv_transfer.transport import Address, Copies, Session
from vllm_ascend.kv_transfer.windows import Window, windows

DEVICE = torch.device("npu", 1)
LAYERS, NUM_BLOCKS = 3, 11


def placed(cache: torch.Tensor, pieces: torch.Tensor, pages: list[int]) -> torch.Tensor:
    """`cache` [layers, page, row, head, bytes], K's rows and then V's, after pieces
    [layers, share, page, row, head of share, bytes] went to `pages`: written head by head."""
    after = cache.clone()
    _, shares, _, _, share_heads, _ = pieces.shape
    for page, where in enumerate(pages):
        for share in range(shares):
            for head in range(share_heads):
                after[:, where, :, share * share_heads + head] = pieces[:, share, page, :, head]
    return after


def regrouped(
    shares: int, share_heads: int, block_size: int, head_bytes: int, pages: list[int], part_pages: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """What a regroup through a pool of two parts makes of a cache, and what it should."""
    heads, num_pages = shares * share_heads, len(pages)
    bits = torch.randint(-128, 128, (LAYERS, NUM_BLOCKS, 2 * block_size, heads, head_bytes), dtype=torch.int8)
    pieces = torch.randint(
        -128, 128, (LAYERS, shares, num_pages, 2 * block_size, share_heads, head_bytes), dtype=torch.int8
    )
    caches = bits.view(LAYERS, NUM_BLOCKS, heads, block_size, 2 * head_bytes).view(torch.bfloat16).to(DEVICE)
    page_bytes = 2 * block_size * heads * head_bytes
    pool = StagingPool(2 * 4096 * -(-part_pages * page_bytes // 4096), 2, page_bytes, DEVICE)
    regroup = StagedRegroup(tuple(caches), PerLayer(tuple(caches)))
    for window in windows(LAYERS, num_pages, page_bytes, pool.part_bytes):
        layers, of_window = slice(window.layers.start, window.layers.stop), window.pages
        with pool.take() as part:
            read = pieces[layers, :, of_window.start : of_window.stop].contiguous().view(torch.int8)
            into = part.pieces(window, shares, page_bytes // shares)
            into.copy_(read.view(into.shape).to(DEVICE))
            torch.npu.current_stream().synchronize()
            local = np.array(pages[of_window.start : of_window.stop], dtype=np.int64)
            regroup.place(part, window, shares, regroup.target(local, shares))
    regroup.finish()
    after = caches.cpu().view(torch.int8).view(bits.shape)
    return after, placed(bits, pieces, pages)


@pytest.fixture(autouse=True)
def _on_its_device() -> None:
    torch.npu.set_device(DEVICE)


@settings(deadline=None, max_examples=60)
@given(
    shares=st.integers(2, 8),
    share_heads=st.integers(1, 3),
    block_size=st.sampled_from([1, 4, 6, 16]),
    head_bytes=st.sampled_from([32, 64, 96]),
    pages=st.lists(st.integers(0, NUM_BLOCKS - 1), min_size=1, unique=True),
    part_pages=st.integers(1, 40),
)
def test_heads_stand_side_by_side_and_nothing_else_changes(
    shares: int, share_heads: int, block_size: int, head_bytes: int, pages: list[int], part_pages: int
):
    after, expected = regrouped(shares, share_heads, block_size, head_bytes, pages, part_pages)
    assert torch.equal(after, expected)


def test_a_part_waits_until_what_it_held_is_placed():
    """The device is busy with something else on the same stream: the part comes back only after it."""
    caches = tuple(torch.zeros(1, 4, 2, 4, 32, dtype=torch.bfloat16, device=DEVICE))
    pool = StagingPool(4096, 1, 1024, DEVICE)
    slow = _Slow(caches)
    regroup = StagedRegroup(caches, slow)
    with pool.take() as part:
        regroup.place(part, Window(range(1), range(1)), 2, regroup.target(np.array([3]), 2))
    with pool.take():
        assert slow.done.query()


def test_a_part_is_one_threads_at_a_time():
    pool = StagingPool(4096, 1, 1024, DEVICE)
    order: list[str] = []
    with pool.take():
        waiting = threading.Thread(target=_take, args=(pool, lambda: order.append("second")))
        waiting.start()
        waiting.join(0.05)
        order.append("first")
    waiting.join(10)
    assert order == ["first", "second"]


def test_a_part_that_a_failed_read_may_still_write_is_not_handed_out():
    pool = StagingPool(8192, 2, 1024, DEVICE)
    over = threading.Event()
    with pytest.raises(ReadUnsettled), pool.take() as left:
        raise ReadUnsettled("nothing came", over.is_set)
    taken = []
    for _ in range(3):
        with pool.take() as part:
            taken.append(part)
    assert left not in taken
    over.set()
    with pool.take() as first, pool.take() as second:
        assert left in (first, second)


def test_a_pool_too_small_for_a_page_is_refused():
    with pytest.raises(ConfigError, match=r"8192 bytes has 2 parts of 4096 bytes .* 4097; raise staging_mib"):
        StagingPool(8192, 2, 4097, DEVICE)


def test_triton_without_its_build_for_cards_is_refused_by_name():
    with pytest.raises(ConfigError, match="triton-ascend, which is not installed; pip install triton-ascend"):
        placing_of("triton")


def test_the_next_window_is_on_the_wire_while_one_is_placed():
    events: list[str] = []
    StagedRead([_WatchedWay(3, events)], StagingPool(8192, 2, 1024, DEVICE)).run(_watched(events), [THERE])
    assert events == [
        *("begin 0", "begin 1", "read 0", "place 0"),
        *("begin 2", "read 1", "place 1", "read 2", "place 2"),
    ]


def test_a_read_goes_on_in_one_part_where_others_have_the_rest():
    events: list[str] = []
    pool = StagingPool(8192, 2, 1024, DEVICE)
    with pool.take():
        StagedRead([_WatchedWay(2, events)], pool).run(_watched(events), [THERE])
    assert events == ["begin 0", "read 0", "place 0", "begin 1", "read 1", "place 1"]


@pytest.mark.parametrize("failing", [0, 1, 2])
def test_after_a_failed_read_every_part_is_back_and_no_read_is_left_alone(failing: int):
    events: list[str] = []
    pool = StagingPool(8192, 2, 1024, DEVICE)
    with pytest.raises(ReadFailed, match="cable"):
        StagedRead([_WatchedWay(3, events)], pool).run(
            _watched(events, {failing: ReadFailed("the cable is cut")}), [THERE]
        )
    begun = {event for event in events if event.startswith("begin")}
    assert {event.replace("read", "begin") for event in events if event.startswith("read")} == begun
    assert [event for event in events if event.startswith("place")] == [f"place {n}" for n in range(failing)]
    with pool.take(), pool.take():
        pass


def test_the_part_of_a_window_that_is_dropped_waits_until_nothing_writes_it():
    over = threading.Event()
    pool = StagingPool(8192, 2, 1024, DEVICE)
    failures = {0: ReadFailed("the cable is cut"), 1: ReadUnsettled("nothing came", over.is_set)}
    with pytest.raises(ReadFailed, match="cable"):
        StagedRead([_WatchedWay(2, [])], pool).run(_watched([], failures), [THERE])
    with pool.take():
        assert pool.next_if_free() is None
        over.set()
        assert pool.next_if_free() is not None


def test_what_was_placed_is_done_when_a_later_read_has_failed():
    """vLLM gives the pages to others then, and nothing may be written to them any more."""
    way, pool = _SlowWay(), StagingPool(8192, 2, 1024, DEVICE)
    with pytest.raises(ReadFailed, match="cable"):
        StagedRead([way], pool).run(_watched([], {1: ReadFailed("the cable is cut")}), [THERE])
    assert way.done.query()


THERE = Session("there")


def _watched(events: list[str], failures: Mapping[int, ReadFailed] = MappingProxyType({})) -> Begin:
    """Reads that only say when they begin and when they are waited for; those in `failures` fail then."""
    numbers = itertools.count()

    def begin(reads: object) -> Callable[[], None]:
        number = next(numbers)
        events.append(f"begin {number}")

        def wait() -> None:
            events.append(f"read {number}")
            if number in failures:
                raise failures[number]

        return wait

    return begin


class _WatchedWay:
    """Windows of 1,024 bytes that only say when they are placed."""

    prefill_ranks: ClassVar[set[int]] = {0}

    def __init__(self, num_windows: int, events: list[str]) -> None:
        self._num_windows = num_windows
        self._events = events

    def windows(self, part_bytes: int) -> Iterator[Window]:
        yield from (Window(range(1), range(page, page + 1)) for page in range(self._num_windows))

    def num_bytes(self, window: Window) -> int:
        return 1024

    def copies(self, window: Window, at: Address) -> list[tuple[int, Copies]]:
        return [(0, Copies(np.array([0]), np.array([at]), np.array([1024])))]

    def place(self, part: Part, window: Window) -> None:
        self._events.append(f"place {window.pages.start}")

    def finish(self) -> None:
        pass


class _SlowWay(_WatchedWay):
    """Two windows, of which each takes a while to place."""

    def __init__(self) -> None:
        super().__init__(2, [])
        self.done = torch.npu.Event()
        self._stream = PlacingStream(DEVICE)
        self._source = torch.ones(2**22, pin_memory=True)
        self._target = torch.zeros(2**22, device=DEVICE)

    def place(self, part: Part, window: Window) -> None:
        with self._stream.placing(part):
            for _ in range(8):
                self._target.copy_(self._source, non_blocking=True)
            self.done.record()

    def finish(self) -> None:
        self._stream.finish()


class _Slow(PerLayer):
    """Goes on for a while after it has placed."""

    def __init__(self, layers: tuple[torch.Tensor, ...]) -> None:
        super().__init__(layers)
        self.done = torch.npu.Event()
        self._source = torch.ones(2**22, pin_memory=True)
        self._target = torch.zeros(2**22, device=DEVICE)

    def place(self, staged: torch.Tensor, first_layer: int, target: torch.Tensor) -> None:
        super().place(staged, first_layer, target)
        for _ in range(8):
            self._target.copy_(self._source, non_blocking=True)
        self.done.record()


def _take(pool: StagingPool, then: Callable[[], None]) -> None:
    with pool.take():
        then()
