# SPDX-License-Identifier: Apache-2.0
"""The exception tree. Each class is named after what its catcher does next."""

from __future__ import annotations

from collections.abc import Callable


class AscendError(Exception):
    """Base of everything this package raises on purpose."""


class ConfigError(AscendError, ValueError):
    """An option that cannot be honoured: the engine must not start."""


class KVTransferError(AscendError):
    """Base of what can go wrong between two engines; the engine that raises it goes on."""


class TopologyError(KVTransferError):
    """Two engines whose models, caches or sizes cannot exchange KV: no retry will help."""


class WireError(KVTransferError):
    """A message that this engine does not understand: it is refused, the connection stays."""


class PeerUnreachable(KVTransferError):
    """A peer that did not answer in time: its leases will end, its requests are lost."""


class ReadFailed(KVTransferError):
    """One request's KV did not arrive whole: its destination blocks must not be used.

    Until `settled()` the transport may still write there, and they must not be given to anyone else either.
    """

    def __init__(self, reason: str, settled: Callable[[], bool] = lambda: True) -> None:
        """`settled`, once True, stays so; it never waits, and is called by one thread at a time."""
        super().__init__(reason)
        self.settled = settled


class PeerNotAdmitted(KVTransferError):
    """A peer outside the listed networks: it is never called, and what it says is not used."""
