# SPDX-License-Identifier: Apache-2.0
"""The device and the process: which devices it sees, what a fork may do, and how it ends."""

import os
import subprocess
import sys

import pytest

pytest.importorskip("torch_npu")


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs `code` in a new Python on the same devices, emulated or not."""
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.parametrize(
    ("visible", "expected"),
    [
        pytest.param("0", 1, id="one device"),
        pytest.param("1,0", 2, id="two devices in another order"),
        pytest.param("0,99,1", 1, id="the list ends before a device that is not there"),
    ],
)
def test_visible_devices_are_honoured(visible: str, expected: int):
    code = "import torch; print('count', torch.npu.device_count()); torch.ones(1, device='npu:0')"
    result = run(code, ASCEND_RT_VISIBLE_DEVICES=visible)
    assert f"count {expected}" in result.stdout, result.stderr
    assert result.returncode == 0


def test_a_process_ends_cleanly_with_work_in_flight():
    code = """
import threading, torch
stream = torch.npu.Stream()
source = torch.ones(1 << 22).pin_memory()
target = torch.zeros(1 << 22, device="npu")
event = torch.npu.Event()
with torch.npu.stream(stream):
    for _ in range(8):
        target.copy_(source, non_blocking=True)
    event.record()
def keep_calling():
    while True:
        torch.npu.current_stream().query()
threading.Thread(target=keep_calling, daemon=True).start()
print("last line")
"""
    result = run(code)
    assert result.stdout.endswith("last line\n"), result.stderr
    assert result.returncode == 0, result.stderr


def test_a_forked_child_may_not_use_the_device():
    code = """
import os, torch
torch.ones(1, device="npu")
child = os.fork()
if child == 0:
    try:
        torch.ones(1, device="npu")
    except RuntimeError:
        os._exit(3)
    os._exit(4)
print("child", os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    result = run(code)
    assert "child 3" in result.stdout, result.stderr


def test_a_fork_before_the_first_use_leaves_the_child_free():
    code = """
import os, torch
torch.npu.device_count()
child = os.fork()
if child == 0:
    os._exit(0 if torch.ones(2, device="npu").sum().item() == 2.0 else 1)
print("child", os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
print(torch.ones(2, device="npu").tolist())
"""
    result = run(code)
    assert "child 0" in result.stdout, result.stderr
    assert "[1.0, 1.0]" in result.stdout
