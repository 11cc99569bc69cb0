# SPDX-License-Identifier: Apache-2.0
"""Streams and events: asynchronous means asynchronous, and only a stream's order and events order work.

A gate, a callback that waits for the test, holds a stream back; so no test guesses how long something takes.
"""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

NPU = torch.device("npu")
COUNT = 1 << 16
PATIENCE_S = 60.0
GRACE_S = 0.2


@contextmanager
def held_back(stream: torch.npu.Stream) -> Iterator[threading.Event]:
    """`stream` stays at this point until the event is set; leaving sets it and waits for the stream."""
    gate = threading.Event()
    torch.npu._subscribe_report(stream)
    try:
        torch.npu._launch_host_func(stream, lambda _: gate.wait(PATIENCE_S), None)
        yield gate
    finally:
        gate.set()
        stream.synchronize()
        torch.npu._unsubscribe_report(stream)


def stays_busy(stream: torch.npu.Stream) -> bool:
    """Whether `stream` has work left after a time in which one that nothing holds back would be done."""
    time.sleep(GRACE_S)
    return not stream.query()


def test_an_async_copy_waits_for_its_turn_in_the_stream():
    source = torch.full((COUNT,), 7.0).pin_memory()
    target = torch.zeros(COUNT, device=NPU)
    stream = torch.npu.Stream()
    torch.npu.synchronize()
    with held_back(stream) as gate:
        with torch.npu.stream(stream):
            target.copy_(source, non_blocking=True)
        assert stays_busy(stream)
        # The default stream is not held back, and sees that nothing was written yet.
        assert target.sum().item() == 0.0
        gate.set()
        stream.synchronize()
        assert stream.query()
        assert target.sum().item() == 7.0 * COUNT


def test_an_async_copy_to_the_host_waits_for_its_turn_in_the_stream():
    source = torch.full((COUNT,), 3.0, device=NPU)
    target = torch.zeros(COUNT).pin_memory()
    stream = torch.npu.Stream()
    torch.npu.synchronize()
    with held_back(stream) as gate:
        with torch.npu.stream(stream):
            target.copy_(source, non_blocking=True)
        assert stays_busy(stream)
        assert target.sum().item() == 0.0
        gate.set()
        stream.synchronize()
        assert target.sum().item() == 3.0 * COUNT


def test_an_event_orders_two_streams():
    source = torch.full((COUNT,), 5.0).pin_memory()
    middle = torch.zeros(COUNT, device=NPU)
    target = torch.zeros(COUNT).pin_memory()
    first, second = torch.npu.Stream(), torch.npu.Stream()
    written = torch.npu.Event()
    torch.npu.synchronize()
    with held_back(first) as gate:
        with torch.npu.stream(first):
            middle.copy_(source, non_blocking=True)
            written.record()
        with torch.npu.stream(second):
            second.wait_event(written)
            target.copy_(middle, non_blocking=True)
        assert not written.query()
        assert stays_busy(second)
        gate.set()
        second.synchronize()
        assert written.query()
        assert target.tolist()[::4096] == [5.0] * (COUNT // 4096)


def test_without_an_event_streams_do_not_wait_for_each_other():
    source = torch.full((COUNT,), 5.0).pin_memory()
    middle = torch.zeros(COUNT, device=NPU)
    target = torch.ones(COUNT).pin_memory()
    first, second = torch.npu.Stream(), torch.npu.Stream()
    torch.npu.synchronize()
    with held_back(first):
        with torch.npu.stream(first):
            middle.copy_(source, non_blocking=True)
        with torch.npu.stream(second):
            target.copy_(middle, non_blocking=True)
        second.synchronize()
        assert target.sum().item() == 0.0


def test_a_wait_is_for_the_latest_record_at_that_time():
    first, second, third = torch.npu.Stream(), torch.npu.Stream(), torch.npu.Stream()
    event = torch.npu.Event()
    event.record(first)
    second.wait_event(event)
    with held_back(third):
        event.record(third)
        second.synchronize()
        assert not event.query()
    assert event.query()


def test_an_event_that_was_never_recorded_is_reached():
    event = torch.npu.Event()
    event.synchronize()
    torch.npu.current_stream().wait_event(event)
    torch.npu.synchronize()
    assert event.query()


def test_elapsed_time_is_that_between_the_records():
    start, end = torch.npu.Event(enable_timing=True), torch.npu.Event(enable_timing=True)
    stream = torch.npu.Stream()
    start.record(stream)
    with held_back(stream) as gate:
        end.record(stream)
        threading.Timer(0.05, gate.set).start()
        end.synchronize()
    assert 25.0 < start.elapsed_time(end) < PATIENCE_S * 1000


def test_synchronize_waits_for_every_stream_of_the_device():
    source = torch.full((COUNT,), 2.0).pin_memory()
    target = torch.zeros(COUNT, device=NPU)
    stream = torch.npu.Stream()
    torch.npu.synchronize()
    with held_back(stream) as gate:
        with torch.npu.stream(stream):
            target.copy_(source, non_blocking=True)
        threading.Timer(0.05, gate.set).start()
        torch.npu.synchronize()
        assert stream.query()
        assert target.sum().item() == 2.0 * COUNT


def test_memory_used_on_another_stream_is_not_reused_before_its_event():
    stream = torch.npu.Stream()
    host = torch.zeros(COUNT).pin_memory()
    torch.npu.synchronize()
    with held_back(stream) as gate:
        tensor = torch.full((COUNT,), 9.0, device=NPU)
        address = tensor.data_ptr()
        with torch.npu.stream(stream):
            host.copy_(tensor, non_blocking=True)
        tensor.record_stream(stream)
        del tensor
        assert torch.zeros(COUNT, device=NPU).data_ptr() != address
        gate.set()
        stream.synchronize()
        assert host.sum().item() == 9.0 * COUNT


def test_each_thread_has_its_own_device():
    if torch.npu.device_count() < 2:
        pytest.skip("the machine has one device")
    torch.npu.set_device(0)
    seen: list[int] = []

    def other() -> None:
        torch.npu.set_device(1)
        seen.append(torch.ones(1, device="npu").device.index)

    thread = threading.Thread(target=other)
    thread.start()
    thread.join()
    assert seen == [1]
    assert torch.npu.current_device() == 0


def test_operators_see_the_copies_issued_before_them_on_their_stream():
    stream = torch.npu.Stream()
    source = torch.arange(COUNT, dtype=torch.float32).pin_memory()
    with torch.npu.stream(stream):
        doubled = source.to(NPU, non_blocking=True) * 2
    stream.synchronize()
    assert doubled.cpu().equal(source * 2)
