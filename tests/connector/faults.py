# SPDX-License-Identifier: Apache-2.0
"""Transports that fail as real ones do, put in at the seam: `start_transport` of a connector."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from vllm_ascend.kv_transfer.connector import MooncakeConnector
from vllm_ascend.kv_transfer.transport import Copies, Region, Session, Transport

Read = Callable[[Session, Copies], None]
Fault = Callable[[Read, Session, Copies], None]
"""Takes the true read, and what was asked of it."""


@dataclass
class FaultyTransport:
    """A transport whose reads go through `faults`, the next one in turn; without any they are true."""

    inner: Transport
    faults: list[Fault] = field(default_factory=list)
    detours: dict[Session, Session] = field(default_factory=dict)
    """Sessions that are reached by another address."""
    registered: list[Region] = field(default_factory=list)

    @property
    def session(self) -> Session:
        return self.inner.session

    def register(self, regions: Sequence[Region]) -> None:
        self.inner.register(regions)
        self.registered.extend(regions)

    def read(self, peer: Session, copies: Copies) -> None:
        peer = self.detours.get(peer, peer)
        try:
            # Several threads read; one of them meets each fault.
            fault = self.faults.pop(0)
        except IndexError:
            self.inner.read(peer, copies)
            return
        fault(self.inner.read, peer, copies)

    def close(self) -> None:
        self.inner.close()


class FaultyConnector(MooncakeConnector):
    """The connector over a faulty transport."""

    transports: ClassVar[list[FaultyTransport]] = []
    """Those of ranks that were started; cleared by whoever starts an engine to find its own."""

    @classmethod
    def start_transport(cls, host: str, protocol: str, timeout_s: float) -> Transport:
        cls.transports.append(FaultyTransport(super().start_transport(host, protocol, timeout_s)))
        return cls.transports[-1]
