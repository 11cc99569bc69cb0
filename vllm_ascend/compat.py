# SPDX-License-Identifier: Apache-2.0
"""Where vLLM 0.32.0 has no hook: one function per workaround, with the reason and its end."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


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
