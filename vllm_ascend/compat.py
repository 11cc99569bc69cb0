# SPDX-License-Identifier: Apache-2.0
"""Where vLLM 0.32.0 has no hook: one function per workaround, with the reason and its end."""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partialmethod
from pathlib import Path

import torch

CORES_TO_SPIN = 4
"""Cores of the host per device from which on a waiting rank may keep one busy; servers with cards have 20."""
LOOK_AGAIN_MS = 20
"""How long a rank on fewer cores sleeps when nothing wakes it."""


@contextmanager
def cuda_streams_are_npu_streams() -> Iterator[None]:
    """Inside, the stream and event names of `torch.cuda` are torch.npu's; afterwards they are what they were.

    Why: vLLM's model runner copies sampled tokens to the host on a stream of its own when scheduling is
    asynchronous (its default), and names torch.cuda.Stream, Event, current_stream and stream to do so. That
    hides the scheduling of a step behind the device's work, too much to switch off.
    Until: vLLM's runner uses torch.Stream, torch.Event and torch.accelerator there, as it does elsewhere.
    """
    names = ("Stream", "Event", "current_stream", "stream")
    npu = torch.get_device_module("npu")
    originals = {name: getattr(torch.cuda, name) for name in names}
    for name in names:
        setattr(torch.cuda, name, getattr(npu, name))
    try:
        yield
    finally:
        for name, original in originals.items():
            setattr(torch.cuda, name, original)


def sleep_while_waiting_where_cores_are_few() -> None:
    """Readers of vLLM's shared-memory queues sleep at once when no message is there, on hosts with few cores.

    Why: they ask again and again for a second after each message, each rank on a core of its own, before they
    sleep. Where ranks share cores (the emulated device on a workstation, a container with a few cores), that
    second is taken from the ranks and the transfers that they wait for. A wake-up of one that sleeps may be
    lost, since its socket holds one at the most. With pipeline stages that came to 5 s every few steps, after
    which vLLM looks again; so it looks again sooner.
    Until: `SpinCondition.busy_loop_s` can be set from outside, by environment or by the platform.
    """
    cores = len(os.sched_getaffinity(0))
    if cores < CORES_TO_SPIN * torch.get_device_module("npu").device_count():
        from vllm.distributed.device_communicators import shm_broadcast

        shm_broadcast.SHM_READER_RECHECK_INTERVAL_MS = LOOK_AGAIN_MS
        condition = shm_broadcast.SpinCondition
        condition.__init__ = partialmethod(condition.__init__, busy_loop_s=0)  # type: ignore[method-assign, assignment]


@functools.cache
def declare_operators_that_torchvision_lacks() -> None:
    """Make torchvision importable where its own library does not load, so that pictures can be prepared.

    Why: a registry's torchvision is built for CUDA, and its library needs CUDA's. Beside torch's CPU build it
    does not load. Then `import torchvision` ends at the first of two operators that it names, and with it
    vLLM's and transformers' modules for pictures, which use none of its operators. One that is called is
    still refused, by torch.
    Until: torchvision names these two only where its library was loaded, as it does with all others.
    """
    found = importlib.util.find_spec("torchvision")
    if found is None or found.origin is None:
        return
    try:
        library = Path(found.origin).with_name("_C.so")
        torch.ops.load_library(library)  # type: ignore[no-untyped-call]
    except OSError:
        # The schemas of torchvision 0.28.
        torch.library.define(
            "torchvision::nms", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
        )
        torch.library.define(
            "torchvision::qnms", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
        )
