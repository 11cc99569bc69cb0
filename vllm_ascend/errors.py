# SPDX-License-Identifier: Apache-2.0
"""The exception tree. Each class is named after what its catcher does next."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar


class AscendError(Exception):
    """Base of everything this package raises on purpose."""


class ConfigError(AscendError, ValueError):
    """An option that cannot be honoured: the engine must not start."""


class KVTransferError(AscendError):
    """Base of what can go wrong between two engines; the engine that raises it goes on."""

    kind: ClassVar[str] = "other"
    """Its name in metrics."""


class TopologyError(KVTransferError):
    """Two engines whose models, caches or sizes cannot exchange KV: no retry will help."""

    kind: ClassVar[str] = "mismatch"


class WireError(KVTransferError):
    """A message that this engine does not understand: it is refused, the connection stays."""

    kind: ClassVar[str] = "refused"


class PeerUnreachable(KVTransferError):
    """A peer that did not answer in time: its leases will end, its requests are lost."""

    kind: ClassVar[str] = "unreachable"


class ReadFailed(KVTransferError):
    """One request's KV did not arrive whole: its destination blocks must not be used."""

    kind: ClassVar[str] = "read"


class PeerNotAdmitted(KVTransferError):
    """A peer outside the listed networks: it is never called, and what it says is not used."""

    kind: ClassVar[str] = "not_admitted"


class ReadUnsettled(ReadFailed):
    """Its destination blocks may still be written: they must stay out of use until it is `settled()`."""

    def __init__(self, message: str, settled: Callable[[], bool]) -> None:
        """`settled`, once True, stays so; it never waits, and any thread may call it."""
        super().__init__(message)
        self.settled = settled


class ReadDiffers(ReadFailed):
    """KV that arrived is not what prefill computed: somebody should find out why."""

    kind: ClassVar[str] = "checksum"


class LeaseEnded(ReadFailed):
    """The blocks that were read may have been given to another request meanwhile."""

    kind: ClassVar[str] = "lease_ended"
