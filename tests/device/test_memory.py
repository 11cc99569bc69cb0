# SPDX-License-Identifier: Apache-2.0
"""Device memory as a program sees it: its budget, what fresh memory holds, and copies of any layout."""

import os

import pytest
import torch

NPU = torch.device("npu")
MIB = 1 << 20
ROUNDING = 512

emulator_only = pytest.mark.skipif(
    "ASCEND_EMULATOR_SOC" not in os.environ, reason="a card's fresh memory holds what was there before"
)


@pytest.fixture(autouse=True)
def _own_memory():
    """Every test starts and ends with nothing cached, so that sizes mean what they say."""
    torch.npu.empty_cache()
    yield
    torch.npu.empty_cache()


def test_allocated_bytes_are_counted_and_given_back():
    before = torch.npu.memory_allocated()
    # Of a size that has a segment to itself: a smaller one may get the rest of another test's segment, and a
    # rest of less than 1 MiB more than was asked is counted whole.
    tensor = torch.empty(32 * MIB, dtype=torch.uint8, device=NPU)
    # The allocator adds 32 bytes for the DMA engine and rounds to 512.
    assert 0 <= torch.npu.memory_allocated() - before - 32 * MIB <= ROUNDING
    del tensor
    assert torch.npu.memory_allocated() == before


def test_free_memory_shrinks_and_comes_back():
    free_before, total = torch.npu.mem_get_info()
    tensor = torch.empty(64 * MIB, dtype=torch.uint8, device=NPU)
    free_during, _ = torch.npu.mem_get_info()
    del tensor
    torch.npu.empty_cache()
    free_after, total_after = torch.npu.mem_get_info()
    assert free_before - free_during >= 64 * MIB
    assert (free_after, total_after) == (free_before, total)


def test_exhausted_budget_is_an_out_of_memory_error_and_memory_works_again_after_freeing():
    _, total = torch.npu.mem_get_info()
    first = torch.empty(total // 2, dtype=torch.uint8, device=NPU)
    with pytest.raises(torch.OutOfMemoryError, match="out of memory"):
        torch.empty(total // 2 + MIB, dtype=torch.uint8, device=NPU)
    first[:4] = torch.tensor([1, 2, 3, 4], dtype=torch.uint8, device=NPU)
    assert first[:4].tolist() == [1, 2, 3, 4]
    del first
    second = torch.empty(total // 2 + MIB, dtype=torch.uint8, device=NPU)
    assert second.numel() == total // 2 + MIB


@emulator_only
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_fresh_memory_is_nan(dtype: torch.dtype):
    # More than the allocator could serve from a block that an earlier test had written.
    fresh = torch.empty(32 * MIB // dtype.itemsize, dtype=dtype, device=NPU)
    assert fresh[:1000].cpu().isnan().all()
    assert fresh[-1000:].cpu().isnan().all()


@pytest.mark.parametrize("device_index", [0, 1])
def test_each_device_has_its_own_memory(device_index: int):
    if device_index >= torch.npu.device_count():
        pytest.skip("the machine has one device")
    before = [torch.npu.memory_allocated(index) for index in range(torch.npu.device_count())]
    tensor = torch.ones(MIB, dtype=torch.uint8, device=f"npu:{device_index}")
    after = [torch.npu.memory_allocated(index) for index in range(torch.npu.device_count())]
    grown = [bytes_after - bytes_before for bytes_before, bytes_after in zip(before, after, strict=True)]
    assert 0 <= grown.pop(device_index) - MIB <= ROUNDING
    assert not any(grown)
    assert tensor.device.index == device_index


LAYOUTS = {
    "contiguous": lambda base: base,
    "transposed": lambda base: base.transpose(0, 2),
    "every second column": lambda base: base[:, :, ::2],
    "a slice of rows": lambda base: base[1:3],
    "one column": lambda base: base[:, 2, :],
    "a broadcast": lambda base: base[:, :1, :].expand(-1, 5, -1),
    "a single value": lambda base: base[1, 2, 3],
    "nothing": lambda base: base[:, 0:0, :],
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool])
def test_host_to_device_and_back_keeps_every_value(layout, dtype: torch.dtype):
    host = layout(_numbered(dtype))
    on_device = host.to(NPU)
    assert on_device.device.type == "npu"
    assert on_device.cpu().equal(host)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_device_to_host_from_a_view_of_device_memory(layout):
    base = _numbered(torch.float32)
    assert layout(base.to(NPU)).cpu().equal(layout(base))


@pytest.mark.parametrize("layout", [LAYOUTS[name] for name in LAYOUTS if name != "a broadcast"])
def test_host_to_device_into_a_view_leaves_the_rest_alone(layout):
    expected = torch.zeros(4, 6, 8)
    target = torch.zeros(4, 6, 8, device=NPU)
    values = layout(_numbered(torch.float32))
    layout(expected).copy_(values)
    layout(target).copy_(values)
    assert target.cpu().equal(expected)


@pytest.mark.parametrize("source", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_device_to_device_from_a_view(source):
    base = _numbered(torch.float32)
    copy = torch.zeros(source(base).shape, device=NPU)
    copy.copy_(source(base.to(NPU)))
    assert copy.cpu().equal(source(base))


def test_a_copy_converts_the_dtype():
    host = torch.tensor([-1.5, 0.0, 2.0, 3.75])
    expected = [-1.5, 0.0, 2.0, 3.75]
    assert host.to(NPU, torch.bfloat16).cpu().tolist() == expected
    assert host.to(NPU).to("cpu", torch.float64).tolist() == expected
    assert host.to(NPU).to(torch.int32).tolist() == [-1, 0, 2, 3]


def test_a_copy_between_two_devices():
    if torch.npu.device_count() < 2:
        pytest.skip("the machine has one device")
    base = _numbered(torch.float32)
    moved = base.to("npu:0").transpose(0, 2).to("npu:1")
    assert moved.device.index == 1
    assert moved.cpu().equal(base.transpose(0, 2))


def test_pinned_memory_is_known_as_pinned():
    pinned = torch.arange(1000).pin_memory()
    assert pinned.is_pinned()
    assert not torch.arange(1000).is_pinned()
    assert pinned.to(NPU).cpu().equal(torch.arange(1000))


def _numbered(dtype: torch.dtype) -> torch.Tensor:
    """Shape [4, 6, 8]; values that differ between neighbours in every direction, in every dtype."""
    numbers = torch.arange(4 * 6 * 8).reshape(4, 6, 8)
    return (numbers % 3 == 0) if dtype is torch.bool else numbers.to(dtype)
