# SPDX-License-Identifier: Apache-2.0
"""Mooncake's transfer engine behind `Transport`. The only file that imports mooncake.

The engine reads another process's registered memory by itself, without that process taking part. It reports
failure by codes; here they become exceptions.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from vllm_ascend.errors import ConfigError, ReadUnsettled
from vllm_ascend.kv_transfer.transport import Copies, Region, Session

_MOST_PER_BATCH = 1024
"""Ranges in one batch. Over TCP 2,048 went through and 4,096 failed, whole batches at a time."""

_TIMEOUT_S = 30
"""How long the engine waits for a batch, unless MC_TRANSFER_TIMEOUT says otherwise."""

_SETTLE_AFTER_ERROR_S = 1.0
"""An error of one range ends the wait for a batch; connections that broke end the others soon after."""

_SETTLE_AFTER_TIMEOUT_S = 60.0
"""A batch that timed out goes on, and cannot be cancelled: a peer that froze may still send when it thaws."""

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

    def __init__(self, host: str, protocol: str) -> None:
        """Start the engine. Raises ConfigError if Mooncake cannot be loaded or cannot speak `protocol`."""
        _check_protocol(protocol)
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
        for batch in copies.batches(_MOST_PER_BATCH):
            started_s = time.monotonic()
            code = self._engine.batch_transfer_sync_read(
                peer, batch.local.tolist(), batch.remote.tolist(), batch.num_bytes.tolist()
            )
            if code != 0:
                seconds = time.monotonic() - started_s
                raise ReadUnsettled(
                    f"Mooncake's transfer engine returned {code} for {len(batch)} ranges, "
                    f"{batch.total_bytes} bytes, from {peer} after {seconds:.3g} s",
                    _SETTLE_AFTER_TIMEOUT_S if seconds >= _timeout_s() else _SETTLE_AFTER_ERROR_S,
                )

    def close(self) -> None:
        while self._registered:
            self._engine.unregister_memory(self._registered.pop().address)


def _timeout_s() -> float:
    return float(os.environ.get("MC_TRANSFER_TIMEOUT", _TIMEOUT_S))


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
