# SPDX-License-Identifier: Apache-2.0
"""Workarounds for vLLM leave torch as they found it."""

import contextlib
import os
import subprocess
import sys

import pytest
import torch
from engine.pictures import environment

from vllm_ascend.compat import cuda_streams_are_npu_streams

NAMES = ("Stream", "Event", "current_stream", "stream")


def test_cuda_streams_are_npu_streams_inside_and_what_they_were_after() -> None:
    before = [getattr(torch.cuda, name) for name in NAMES]
    with contextlib.suppress(ArithmeticError), cuda_streams_are_npu_streams():
        assert torch.cuda.current_stream().device.type == "npu"
        assert isinstance(torch.cuda.Event(blocking=True), torch.npu.Event)
        raise ArithmeticError
    assert [getattr(torch.cuda, name) for name in NAMES] == before


QUEUE_OF_ONE_READER = """
import os, threading, time

os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
from vllm_ascend import prepare_process
prepare_process()
from vllm.distributed.device_communicators.shm_broadcast import MessageQueue

writer = MessageQueue(n_reader=1, n_local_reader=1)
reader = MessageQueue.create_from_handle(writer.export_handle(), rank=0)
threading.Thread(target=reader.wait_until_ready).start()
writer.wait_until_ready()
writer.enqueue("first")
assert reader.dequeue() == "first"
"""
SECONDS_ON_THE_CORE = """
threading.Timer(0.5, writer.enqueue, ["second"]).start()
before_s = time.thread_time()
assert reader.dequeue(timeout=10) == "second"
print(time.thread_time() - before_s)
"""
SECONDS_WITHOUT_A_WAKE_UP = """
writer._spin_condition.notify = lambda: None
before_s = time.monotonic()
threading.Timer(0.5, writer.enqueue, ["second"]).start()
assert reader.dequeue() == "second"
print(time.monotonic() - before_s)
"""


def _seconds_of_waiting(script: str, devices: str) -> float:
    """On a machine of one core."""
    printed = subprocess.run(
        [sys.executable, "-c", QUEUE_OF_ONE_READER + script],
        env=os.environ | {"ASCEND_RT_VISIBLE_DEVICES": devices},
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    return float(printed.splitlines()[-1])


@pytest.mark.parametrize(("devices", "sleeps"), [("0", True), ("", False)], ids=["one device", "no device"])
def test_a_reader_without_a_message_leaves_the_core_where_cores_are_few(devices: str, sleeps: bool) -> None:
    """Half a second of waiting, measured as time that the reader spent on the core."""
    assert (_seconds_of_waiting(SECONDS_ON_THE_CORE, devices) < 0.1) == sleeps


def test_a_reader_that_sleeps_finds_a_message_whose_wake_up_was_lost() -> None:
    """vLLM alone looks again after 5 s."""
    assert 0.4 < _seconds_of_waiting(SECONDS_WITHOUT_A_WAKE_UP, "0") < 3


SHRINK = """
import torch, torchvision
from torchvision.transforms.v2 import functional

assert functional.resize(torch.ones(3, 8, 6), [4, 3]).shape == (3, 4, 3)
if not torchvision.extension._has_ops():
    try:
        torch.ops.torchvision.nms(torch.zeros(1, 4), torch.zeros(1), 0.5)
    except NotImplementedError:
        print("refused")
"""


def test_torchvision_prepares_pictures_whether_its_library_loads_or_not() -> None:
    """Where it does not, `import torchvision` fails without the plugin; its operators are refused with it."""
    scripts = (SHRINK, "import vllm_ascend; vllm_ascend.register()" + SHRINK)
    plain, helped = (
        subprocess.run(
            [sys.executable, "-c", script],
            env=os.environ | environment(),
            capture_output=True,
            text=True,
            check=False,
        )
        for script in scripts
    )
    assert helped.returncode == 0, helped.stderr
    assert (plain.returncode != 0) == ("refused" in helped.stdout)
