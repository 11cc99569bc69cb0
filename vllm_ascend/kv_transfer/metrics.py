# SPDX-License-Identifier: Apache-2.0
"""What a transfer cost: per request for its user, per interval for vLLM's log and for Prometheus."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorPromMetrics, KVConnectorStats
from vllm.v1.metrics.utils import create_metric_per_engine


@dataclass(frozen=True)
class TransferNumbers:
    """One request's load, at one rank or, merged, at all ranks of the decode engine."""

    prompt_tokens: int
    tokens: int
    """Tokens whose KV was pulled: not those of a prefix hit, nor the last, which decode computes itself."""
    blocks: int
    """Blocks that hold them."""
    bytes: int
    descriptors: int
    sources: tuple[int, ...]
    """Prefill ranks that were read."""
    queue_ms: float
    """From the scheduler's decision to the start of the read."""
    transfer_ms: float
    regroup_ms: float

    def merged(self, other: TransferNumbers) -> TransferNumbers:
        """Both ranks' work as one: amounts add up, times are those of the slower rank."""
        return TransferNumbers(
            prompt_tokens=self.prompt_tokens,
            tokens=self.tokens,
            blocks=self.blocks,
            bytes=self.bytes + other.bytes,
            descriptors=self.descriptors + other.descriptors,
            sources=tuple(sorted({*self.sources, *other.sources})),
            queue_ms=max(self.queue_ms, other.queue_ms),
            transfer_ms=max(self.transfer_ms, other.transfer_ms),
            regroup_ms=max(self.regroup_ms, other.regroup_ms),
        )

    def as_params(self) -> dict[str, Any]:
        """For the answer to the client, as plain JSON; milliseconds to the microsecond."""
        return {
            name: round(value, 3) if isinstance(value, float) else value
            for name, value in asdict(self).items()
        }


def nothing_moved(prompt_tokens: int) -> TransferNumbers:
    """The numbers of a request whose whole prompt was a local prefix hit."""
    return TransferNumbers(prompt_tokens, 0, 0, 0, 0, (), 0.0, 0.0, 0.0)


_SUMS = {
    "loads": "Loads of a request's KV cache by a rank.",
    "failed": "Loads that failed.",
    "blocks": "Blocks pulled from prefill engines.",
    "bytes": "Bytes pulled from prefill engines.",
    "descriptors": "Ranges that the transfer engine was given.",
    "transfer_ms": "Milliseconds that ranks spent reading.",
    "regroup_ms": "Milliseconds that ranks spent regrouping heads.",
}
"""What is summed, and what Prometheus shows about it."""


class TransferStats(KVConnectorStats):
    """Sums over an interval and over ranks, for vLLM's periodic line `KV Transfer metrics: ...`."""

    def __init__(self, data: dict[str, Any] | None = None) -> None:
        super().__init__(data=data or dict.fromkeys(_SUMS, 0))

    def add(self, numbers: TransferNumbers) -> None:
        """Count one rank's load."""
        self.data["loads"] += 1
        for name in ("blocks", "bytes", "descriptors", "transfer_ms", "regroup_ms"):
            self.data[name] += getattr(numbers, name)

    def add_failure(self) -> None:
        """Count one rank's failed load."""
        self.data["failed"] += 1

    def reset(self) -> None:
        self.data = dict.fromkeys(_SUMS, 0)

    def aggregate(self, other: KVConnectorStats) -> KVConnectorStats:
        return TransferStats({name: self.data[name] + other.data[name] for name in _SUMS})

    def reduce(self) -> dict[str, int | float]:
        loads = max(1, self.data["loads"])
        return {
            "loads": self.data["loads"],
            "failed loads": self.data["failed"],
            "MiB": round(self.data["bytes"] / 2**20, 3),
            "descriptors": self.data["descriptors"],
            "mean transfer ms": round(self.data["transfer_ms"] / loads, 3),
            "mean regroup ms": round(self.data["regroup_ms"] / loads, 3),
        }

    def is_empty(self) -> bool:
        return not self.data["loads"] and not self.data["failed"]


class TransferCounters(KVConnectorPromMetrics):
    """The sums since the start as Prometheus counters, `vllm:ascend_kv_<sum>`."""

    def __init__(self, *arguments: Any) -> None:  # Any: vLLM's own arguments, handed on
        super().__init__(*arguments)
        # Any: vLLM's helper forgets which kind of metric it was given
        self._counters: dict[str, dict[int, Any]] = {
            name: create_metric_per_engine(
                self._counter_cls(
                    name=f"vllm:ascend_kv_{name}", documentation=meaning, labelnames=self._labelnames
                ),
                self.per_engine_labelvalues,
            )
            for name, meaning in _SUMS.items()
        }

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        """Add an interval's sums."""
        for name, counters in self._counters.items():
            counters[engine_idx].inc(transfer_stats_data[name])
