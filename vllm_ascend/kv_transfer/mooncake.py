# SPDX-License-Identifier: Apache-2.0
"""Mooncake's transfer engine behind `Transport`. The only file that imports mooncake.

The engine reads another process's registered memory by itself, without that process taking part. It reports
failure by codes; here they become exceptions.

A batch that Mooncake reports as failed is not over: the report comes with the first range that failed or
with the end of the patience, and the other ranges land when the peer sends them. The one exact question that
its Python interface answers is whether a batch of one range has ended. So over TCP, where ranges travel one
by one anyway, each is a batch of its own. A range ends when it is read, when its connection breaks, or when
nothing came for MC_TCP_PROGRESS_TIMEOUT_SEC (30 by default). Over other protocols, which gain from batches, a
failed one is taken to have ended after as long as Mooncake's own patience (MC_TRANSFER_TIMEOUT).
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from functools import partial
from importlib import metadata
from pathlib import Path
from threading import Lock
from typing import Any

from vllm_ascend.errors import ConfigError, ReadUnsettled
from vllm_ascend.kv_transfer.transport import Copies, Region, Session

_MOST_PER_BATCH = 1024
"""Ranges in one batch."""

_MOST_UNDER_WAY = 256
"""Ranges of one read that wait in Mooncake over TCP: enough to keep its connections busy."""

_PIECE_BYTES = 4 << 20
"""Longest range that is asked for over TCP: the unit of progress, and of sharing a peer's connections."""

_LOOK_EVERY_S, _LOOK_RARELY_S = 0.0002, 0.001
"""Pause between looks at what is under way: the first after progress, twice as long each time without any."""

_LOOK_PAST = 8
"""Ranges end about in their order: a look ends at so many that have not. Each costs the engine's thread time,
which needs Python's lock, too."""

_ASK_AT_ONCE = 16
"""Ranges that are asked for before other threads get Python's lock."""

_FAILED_BATCH_ENDS_S = 30.0

_TCP_QUEUE = {
    "MC_TCP_MAX_QUEUED_TRANSFERS_PER_PEER": "65535",
    "MC_TCP_MAX_PENDING_ADMISSIONS_PER_PEER": "65535",
    "MC_TCP_ADMISSION_TIMEOUT_MS": "30000",
}
"""Ranges that may wait for one peer, and how long. Mooncake 0.3.13 by itself fails a whole batch when 1,024
are queued and as many wait, or wait for a second; two requests that are read row by row have more. Its
successors have the larger numbers, too (kvcache-ai/Mooncake#3710)."""

_RDMA_DEVICES = Path("/sys/class/infiniband")

_CARD_BUILD = "mooncake-transfer-engine-npu"


def default_protocol() -> str:
    """`ascend` where Mooncake's build for Ascend cards is installed, `tcp` elsewhere."""
    return "ascend" if _installed(_CARD_BUILD) else "tcp"


class MooncakeTransport:
    """One transfer engine: a session of its own, reachable at `host` on a port that the engine chooses."""

    def __init__(self, host: str, protocol: str, timeout_s: float = 10.0) -> None:
        """Start the engine. A read fails when nothing has come for `timeout_s` (over TCP; see above).

        Raises ConfigError if Mooncake cannot be loaded or cannot speak `protocol`.
        """
        _check_protocol(protocol)
        self._protocol = protocol
        self._timeout_s = timeout_s
        for name, value in _TCP_QUEUE.items():
            os.environ.setdefault(name, value)
        self._engine = _engine_class()()
        # P2PHANDSHAKE: engines find each other by session, without a metadata server.
        if self._engine.initialize(host, "P2PHANDSHAKE", protocol, "") != 0:
            raise ConfigError(
                f"Mooncake's transfer engine cannot start with protocol {protocol!r} on {host}; choose "
                f"another protocol or host in kv_connector_extra_config"
            )
        self._session = Session(f"{host}:{self._engine.get_rpc_port()}")
        self._registered: list[Region] = []

    @property
    def session(self) -> Session:
        return self._session

    def register(self, regions: Sequence[Region]) -> None:
        for region in regions:
            if self._engine.register_memory(region.address, region.num_bytes) != 0:
                raise ConfigError(
                    f"Mooncake's transfer engine cannot register {region.num_bytes} bytes of KV cache at "
                    f"{region.address:#x}; raise the limit on locked memory (ulimit -l unlimited)"
                )
            self._registered.append(region)

    def read(self, peer: Session, copies: Copies) -> None:
        if self._protocol == "tcp":
            self._read_ranges(peer, copies)
        else:
            self._read_batches(peer, copies)

    def close(self) -> None:
        if self._engine is None:
            return
        while self._registered:
            self._engine.unregister_memory(self._registered.pop().address)
        # Ends its threads, and with them whatever still waits for a peer.
        self._engine = None

    def ended(self, batch: int) -> int:
        """What became of a batch of one range: 0 not yet known, 1 read, -1 failed; then asked no more."""
        return 1 if self._engine is None else int(self._engine.transfer_check_status(batch))

    def _read_ranges(self, peer: Session, copies: Copies) -> None:
        left = copies.pieces(_PIECE_BYTES)
        under_way = _UnderWay(self)
        progress_s, pause_s = time.monotonic(), _LOOK_EVERY_S
        while self._ask_for(peer, left, under_way) or under_way.batches:
            ended = under_way.look()
            now_s = time.monotonic()
            if under_way.failed:
                raise ReadUnsettled(
                    f"Mooncake's transfer engine could not read {under_way.failed} of the ranges asked of "
                    f"{peer}",
                    under_way.settled,
                )
            if ended:
                progress_s, pause_s = now_s, _LOOK_EVERY_S
            elif now_s - progress_s > self._timeout_s:
                raise ReadUnsettled(
                    f"nothing came from {peer} for {self._timeout_s:g} s, with {len(under_way.batches)} "
                    f"ranges under way; restart it if it hangs, or raise read_timeout_s",
                    under_way.settled,
                )
            else:
                time.sleep(pause_s)
                pause_s = min(2 * pause_s, _LOOK_RARELY_S)

    def _ask_for(self, peer: Session, left: Iterator[tuple[int, int, int]], under_way: _UnderWay) -> bool:
        """Fill up `under_way` from what is `left`. Returns whether any was."""
        asked = False
        while len(under_way.batches) < _MOST_UNDER_WAY and (piece := next(left, None)) is not None:
            remote, local, num_bytes = piece
            batch = self._engine.batch_transfer_async_read(peer, [local], [remote], [num_bytes])
            if batch == 0:
                raise ReadUnsettled(f"Mooncake's transfer engine cannot ask {peer}", under_way.settled)
            under_way.batches.append(batch)
            asked = True
            if len(under_way.batches) % _ASK_AT_ONCE == 0:
                time.sleep(0)
        return asked

    def _read_batches(self, peer: Session, copies: Copies) -> None:
        for batch in copies.batches(_MOST_PER_BATCH):
            code = self._engine.batch_transfer_sync_read(
                peer, batch.local.tolist(), batch.remote.tolist(), batch.num_bytes.tolist()
            )
            if code != 0:
                raise ReadUnsettled(
                    f"Mooncake's transfer engine returned {code} for {len(batch)} ranges, "
                    f"{batch.total_bytes} bytes, from {peer}",
                    partial(self._past, time.monotonic() + _FAILED_BATCH_ENDS_S),
                )

    def _past(self, at_s: float) -> bool:
        return self._engine is None or time.monotonic() >= at_s


class _UnderWay:
    """Ranges that the engine was asked for and has not reported on."""

    def __init__(self, transport: MooncakeTransport) -> None:
        self._transport = transport
        self._lock = Lock()
        self.batches: list[int] = []
        self.failed = 0

    def look(self) -> int:
        """How many were found to have ended since the last look; 0 only if none of the oldest has."""
        # A batch may be asked no more once it has ended, by whichever thread.
        with self._lock:
            going_on: list[int] = []
            looked = 0
            while looked < len(self.batches) and len(going_on) < _LOOK_PAST:
                if not self._ended(self.batches[looked]):
                    going_on.append(self.batches[looked])
                looked += 1
            self.batches = going_on + self.batches[looked:]
            return looked - len(going_on)

    def settled(self) -> bool:
        """Whether all have ended."""
        while self.look():
            pass
        return not self.batches

    def _ended(self, batch: int) -> bool:
        code = self._transport.ended(batch)
        self.failed += code < 0
        return code != 0


def _engine_class() -> Any:  # Any: Mooncake's extension module has no types
    try:
        from mooncake.engine import TransferEngine
    except ImportError as error:
        raise ConfigError(_cannot_load(error)) from error
    return TransferEngine


def _cannot_load(error: ImportError) -> str:
    if isinstance(error, ModuleNotFoundError):
        return (
            f"MooncakeConnectorV1 needs Mooncake's transfer engine, which is not installed ({error}); "
            f"pip install mooncake-transfer-engine-non-cuda, or {_CARD_BUILD} on Ascend cards"
        )
    return (
        f"Mooncake's transfer engine is installed but cannot be loaded ({error}); install what it links: "
        f"apt-get install libibverbs1 librdmacm1 libnuma1 liburing2 libcurl4"
    )


def _check_protocol(protocol: str) -> None:
    # Mooncake silently takes TCP where it has no hardware or code for the protocol it was asked for.
    if protocol == "ascend" and not _installed(_CARD_BUILD):
        raise ConfigError(
            f"protocol 'ascend' needs {_CARD_BUILD}, which is not installed; install it in place of another "
            f"build, or set protocol to 'tcp' in kv_connector_extra_config"
        )
    if protocol == "rdma" and not any(_RDMA_DEVICES.glob("*")):
        raise ConfigError(
            f"protocol 'rdma' needs an RDMA device and {_RDMA_DEVICES} lists none; set protocol to 'tcp' in "
            f"kv_connector_extra_config"
        )


def _installed(distribution: str) -> bool:
    try:
        metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return False
    return True
