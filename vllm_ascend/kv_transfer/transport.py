# SPDX-License-Identifier: Apache-2.0
"""The seam between planning and moving bytes: `Transport`, and `Copies`, its unit of work.

A transport knows sessions (processes whose memory it can read), addresses and lengths. It knows nothing of
requests, blocks or heads. `MooncakeTransport` is the real one; `InProcessTransport` below reads the memory
of its own process and serves wherever no second process is wanted.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NewType, Protocol

import numpy as np
import numpy.typing as npt

from vllm_ascend.errors import ReadFailed

Address = NewType("Address", int)
"""A byte's address in the address space of one process."""

Session = NewType("Session", str)
"""How a transport finds another process, such as `host:port`."""

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Region:
    """Memory that a transport may read or write: `num_bytes` from `address` on."""

    address: Address
    num_bytes: int

    @property
    def end(self) -> int:
        return self.address + self.num_bytes


@dataclass(frozen=True)
class Copies:
    """Byte ranges to read, as three arrays of one length: num_bytes[i] from remote[i] to local[i]."""

    remote: Ints
    local: Ints
    num_bytes: Ints

    def __len__(self) -> int:
        return len(self.num_bytes)

    @property
    def total_bytes(self) -> int:
        return int(self.num_bytes.sum())

    def batches(self, most: int) -> Iterator[Copies]:
        """The same copies, at most `most` at a time."""
        for start in range(0, len(self), most):
            part = slice(start, start + most)
            yield Copies(self.remote[part], self.local[part], self.num_bytes[part])


class Transport(Protocol):
    """Moves bytes between registered regions. Knows nothing of requests or heads."""

    @property
    def session(self) -> Session:
        """How other processes address the memory registered here."""
        ...

    def register(self, regions: Sequence[Region]) -> None:
        """Open `regions` to reads from other processes and to writes by `read`. Raises ConfigError."""
        ...

    def read(self, peer: Session, copies: Copies) -> None:
        """Return when all `copies` are local; raise ReadFailed, never return a code.

        After ReadFailed the destinations hold anything; after ReadUnsettled, which says how long, they may
        still be written. Safe to call from several threads.
        """
        ...

    def close(self) -> None:
        """Withdraw what was registered. May be called twice."""
        ...


@dataclass
class InProcessTransport:
    """Reads the memory of its own process; `cluster` maps sessions to what they registered."""

    session: Session
    cluster: dict[Session, list[Region]] = field(default_factory=dict)

    def register(self, regions: Sequence[Region]) -> None:
        self.cluster.setdefault(self.session, []).extend(regions)

    def read(self, peer: Session, copies: Copies) -> None:
        for remote, local, num_bytes in zip(copies.remote, copies.local, copies.num_bytes, strict=True):
            self._check(peer, int(remote), int(num_bytes))
            self._check(self.session, int(local), int(num_bytes))
            ctypes.memmove(int(local), int(remote), int(num_bytes))

    def close(self) -> None:
        self.cluster.pop(self.session, None)

    def _check(self, owner: Session, address: int, num_bytes: int) -> None:
        regions = self.cluster.get(owner, [])
        if not any(region.address <= address and address + num_bytes <= region.end for region in regions):
            raise ReadFailed(f"{owner} has not registered {num_bytes} bytes at {address:#x}")
