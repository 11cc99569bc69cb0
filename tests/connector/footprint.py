# SPDX-License-Identifier: Apache-2.0
"""What a process takes of its host that it must give back."""

from __future__ import annotations

import os
import time
from typing import NamedTuple


class Footprint(NamedTuple):
    """Of the calling process. Threads are those of the kernel, Mooncake's and ZMQ's among them."""

    descriptors: int
    threads: int


def footprint() -> Footprint:
    return Footprint(len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task")))


def grown_since(before: Footprint, within_s: float = 5) -> dict[str, tuple[int, int]]:
    """What is more than `before`, with both numbers; nothing once it is back, else after `within_s`.

    Threads and sockets take a moment to end.
    """
    deadline = time.monotonic() + within_s
    while (grown := _grown(before)) and time.monotonic() < deadline:
        time.sleep(0.02)
    return grown


def _grown(before: Footprint) -> dict[str, tuple[int, int]]:
    numbers = zip(Footprint._fields, before, footprint(), strict=True)
    return {name: (then, now) for name, then, now in numbers if now > then}
