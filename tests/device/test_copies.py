# SPDX-License-Identifier: Apache-2.0
"""Copies between host and devices: any strides, any dtypes, and the order of the streams."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

NPU = torch.device("npu")

NUM_LARGE = 1 << 22
"""Elements of a copy that takes much longer than putting it on a stream: 16 MiB of fp32."""

LAYOUTS = {
    "dense": lambda whole: whole,
    "columns": lambda whole: whole[:, 1:3],
    "every second": lambda whole: whole[:, ::2],
    "transposed": lambda whole: whole.t(),
    "a row for all": lambda whole: whole[0].expand(4, 8),
}


@pytest.mark.parametrize("non_blocking", [False, True], ids=["blocking", "non-blocking"])
@pytest.mark.parametrize("target_dtype", [torch.float32, torch.bfloat16, torch.int64], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_every_direction(layout, target_dtype: torch.dtype, non_blocking: bool) -> None:
    host = torch.arange(32, dtype=torch.float32).view(4, 8)
    expected = layout(host).to(target_dtype)
    for source in (host, host.pin_memory(), host.to(NPU)):
        for target in (
            torch.zeros(expected.shape, dtype=target_dtype),
            torch.zeros(expected.shape, dtype=target_dtype).pin_memory(),
            torch.zeros(expected.shape, dtype=target_dtype, device=NPU),
        ):
            assert target.copy_(layout(source), non_blocking=non_blocking) is target
            torch.npu.synchronize()
            assert torch.equal(target.cpu(), expected)


@pytest.mark.parametrize("layout", list(LAYOUTS.values())[:4], ids=list(LAYOUTS.keys())[:4])
def test_into_part_of_a_tensor(layout) -> None:
    for where in ("cpu", "npu"):
        whole = torch.zeros(4, 8, device=where)
        part = layout(whole)
        part.copy_(torch.ones(part.shape, device=NPU))
        assert whole.sum().item() == part.numel()
        assert layout(whole).sum().item() == part.numel()


def test_broadcast() -> None:
    target = torch.zeros(3, 4, device=NPU)
    target.copy_(torch.arange(4))
    assert target.tolist() == [[0, 1, 2, 3]] * 3
    with pytest.raises(RuntimeError, match=r"must match the size|expand|broadcast"):
        target.copy_(torch.ones(5, device=NPU))


def test_to_keeps_what_needs_no_change() -> None:
    here = torch.ones(3, device=NPU)
    assert here.to(NPU) is here
    assert here.to(NPU, copy=True).data_ptr() != here.data_ptr()
    assert here.to("cpu", torch.bfloat16).dtype is torch.bfloat16
    assert here.cpu().device.type == "cpu"


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_between_devices(layout) -> None:
    if torch.npu.device_count() < 2:
        pytest.skip("needs two devices")
    first = torch.arange(32, dtype=torch.float32, device="npu:0").view(4, 8)
    second = layout(first).to("npu:1")
    assert second.device == torch.device("npu:1")
    assert torch.equal(second.cpu(), layout(first.cpu()))
    second.mul_(2)
    back = torch.empty(second.shape, dtype=torch.bfloat16, device="npu:0").copy_(second, non_blocking=True)
    assert torch.equal(back.cpu(), layout(first.cpu()).mul(2).bfloat16())


def test_pinned_copy_returns_before_it_is_done() -> None:
    stream = torch.npu.Stream()
    device = torch.ones(NUM_LARGE, device=NPU)
    pinned = torch.empty(NUM_LARGE).pin_memory()
    torch.npu.synchronize()
    with torch.npu.stream(stream):
        for _ in range(4):
            pinned.copy_(device, non_blocking=True)
            device.copy_(pinned, non_blocking=True)
        assert not stream.query()
    stream.synchronize()
    assert stream.query()
    assert pinned.sum().item() == NUM_LARGE


def test_pageable_memory_may_change_after_the_call() -> None:
    """A copy that reads the caller's memory later would see what is written here."""
    stream = torch.npu.Stream()
    busy = torch.ones(NUM_LARGE, device=NPU)
    target = torch.zeros(1000, device=NPU)
    torch.npu.synchronize()
    with torch.npu.stream(stream):
        torch.empty_like(busy).copy_(busy, non_blocking=True)
        host = torch.full((1000,), 5.0)
        target.copy_(host, non_blocking=True)
        host.fill_(-1)
    stream.synchronize()
    assert target.unique().tolist() == [5]


@pytest.mark.parametrize("strided", [False, True], ids=["dense", "strided"])
def test_event_orders_two_streams(strided: bool) -> None:
    """What one stream copies late is seen by the other after it has waited."""
    first, second = torch.npu.Stream(), torch.npu.Stream()
    source = torch.arange(NUM_LARGE, dtype=torch.float32, device=NPU)
    flat = torch.zeros(NUM_LARGE, device=NPU)
    parts = [torch.zeros(NUM_LARGE // 2, device=NPU) for _ in range(2)]
    torch.npu.synchronize()
    with torch.npu.stream(first):
        flat.copy_(source, non_blocking=True)
        copied = first.record_event()
    with torch.npu.stream(second):
        second.wait_event(copied)
        views = (flat[::2], flat[1::2]) if strided else flat.chunk(2)
        for part, view in zip(parts, views, strict=True):
            part.copy_(view, non_blocking=True)
    torch.npu.current_stream().wait_stream(second)
    host = torch.arange(NUM_LARGE, dtype=torch.float32)
    expected = (host[::2], host[1::2]) if strided else host.chunk(2)
    for part, other in zip(parts, expected, strict=True):
        assert torch.equal(part.cpu(), other)


def test_operator_follows_its_stream() -> None:
    """An operator after a late copy on the same stream sees what was copied."""
    stream = torch.npu.Stream()
    source = torch.ones(NUM_LARGE, device=NPU)
    target = torch.zeros(NUM_LARGE, device=NPU)
    torch.npu.synchronize()
    with torch.npu.stream(stream):
        target.copy_(source, non_blocking=True)
        assert (target + 1).sum().item() == 2 * NUM_LARGE


def test_freed_pinned_memory_is_not_reused_while_it_is_read() -> None:
    stream = torch.npu.Stream()
    target = torch.zeros(NUM_LARGE, device=NPU)
    torch.npu.synchronize()
    with torch.npu.stream(stream):
        pinned = torch.full((NUM_LARGE,), 7.0).pin_memory()
        target.copy_(pinned, non_blocking=True)
        del pinned
        torch.full((NUM_LARGE,), -7.0).pin_memory()
    stream.synchronize()
    assert target.unique().tolist() == [7]


def test_overlapping_target_is_refused() -> None:
    with pytest.raises(RuntimeError, match="more than one element"):
        torch.zeros(3, device=NPU).expand(2, 3).copy_(torch.ones(2, 3, device=NPU))


DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.int32, torch.int64, torch.bool])


@st.composite
def windows(draw: st.DrawFn) -> tuple[slice, slice, bool]:
    """A way to see 4 by 4 elements of an 8 by 8 tensor: rows, columns, and whether they change places."""
    return _four_of_eight(draw), _four_of_eight(draw), draw(st.booleans())


def _four_of_eight(draw: st.DrawFn) -> slice:
    step = draw(st.sampled_from([1, 2]))
    start = draw(st.integers(0, 8 - (3 * step + 1)))
    return slice(start, start + 3 * step + 1, step)


@settings(max_examples=100, deadline=None)
@given(
    devices=st.sampled_from([("cpu", "npu"), ("npu", "cpu"), ("npu", "npu")]),
    dtypes=st.tuples(DTYPES, DTYPES),
    seen=st.tuples(windows(), windows()),
    non_blocking=st.booleans(),
)
def test_any_window_into_any_window(devices, dtypes, seen, non_blocking: bool) -> None:
    """A copy does what it does between two CPU tensors, and touches nothing beside its target."""

    def copied(source_device: str, target_device: str) -> torch.Tensor:
        source = torch.arange(-32, 32).view(8, 8).to(dtypes[0]).to(source_device)
        target = torch.ones(8, 8, dtype=dtypes[1], device=target_device)
        _through(target, seen[1]).copy_(_through(source, seen[0]), non_blocking=non_blocking)
        torch.npu.synchronize()
        return target.cpu()

    assert torch.equal(copied(*devices), copied("cpu", "cpu"))


def _through(whole: torch.Tensor, window: tuple[slice, slice, bool]) -> torch.Tensor:
    rows, columns, transposed = window
    view = whole[rows, columns]
    return view.t() if transposed else view
