# SPDX-License-Identifier: Apache-2.0
"""What the processes of servers take of their host."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from servers import Server


@dataclass(frozen=True)
class Footprint:
    """What a process takes of its host."""

    memory_mib: int
    descriptors: int
    threads: int


def footprints(servers: Sequence[Server]) -> dict[str, Footprint]:
    """Of every process of the servers, by server and place in the order of their starts."""
    found = {}
    for server in servers:
        members = sorted(
            pid for pid in map(int, filter(str.isdigit, os.listdir("/proc"))) if _group_of(pid) == server.pid
        )
        for place, pid in enumerate(members):
            if (footprint := _footprint(Path("/proc", str(pid)))) is not None:
                found[f"{server.name}/{place}"] = footprint
    return found


def _group_of(pid: int) -> int | None:
    try:
        return os.getpgid(pid)
    except ProcessLookupError:  # it has ended
        return None


def _footprint(process: Path) -> Footprint | None:
    try:
        status = dict(line.split(":", 1) for line in (process / "status").read_text().splitlines())
        descriptors = len(os.listdir(process / "fd"))
    except (FileNotFoundError, ProcessLookupError):  # it has ended
        return None
    if "VmRSS" not in status:  # it is about to
        return None
    return Footprint(int(status["VmRSS"].split()[0]) // 1024, descriptors, int(status["Threads"]))
