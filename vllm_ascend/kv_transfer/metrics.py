# SPDX-License-Identifier: Apache-2.0
"""What a transfer cost: per request for its user, per interval for vLLM's log and for Prometheus."""

from __future__ import annotations

from dataclasses import dataclass
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
    parts: int = 1
    """In how many parts it was read: more than one where decode was told of it while it was computed."""

    def then(self, later: TransferNumbers, begins_anew: bool) -> TransferNumbers:
        """This and a later part of the load as one; `begins_anew`: at the load's first token."""
        return TransferNumbers(
            prompt_tokens=self.prompt_tokens,
            tokens=later.tokens + (0 if begins_anew else self.tokens),
            blocks=later.blocks + (0 if begins_anew else self.blocks),
            bytes=self.bytes + later.bytes,
            descriptors=self.descriptors + later.descriptors,
            sources=tuple(sorted({*self.sources, *later.sources})),
            queue_ms=self.queue_ms + later.queue_ms,
            transfer_ms=self.transfer_ms + later.transfer_ms,
            regroup_ms=self.regroup_ms + later.regroup_ms,
            parts=self.parts + later.parts,
        )

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
            parts=max(self.parts, other.parts),
        )

    def as_params(self) -> dict[str, Any]:
        """For the answer to the client, as plain JSON; milliseconds to the microsecond."""
        return {
            name: round(value, 3) if isinstance(value, float) else value for name, value in vars(self).items()
        }


def nothing_moved(prompt_tokens: int) -> TransferNumbers:
    """The numbers of a request whose whole prompt was a local prefix hit."""
    return TransferNumbers(prompt_tokens, 0, 0, 0, 0, (), 0.0, 0.0, 0.0, 0)


_SUMS = {
    "loads": "Loads of a request's KV cache by a rank.",
    "parts": "Parts in which they were read, more than loads where decode was told early.",
    "failed": "Loads that failed.",
    "declined": "Requests that brought KV of no use and were computed here.",
    "blocks": "Blocks pulled from prefill engines.",
    "bytes": "Bytes pulled from prefill engines.",
    "descriptors": "Ranges that the transfer engine was given.",
    "leases_granted": "Finished requests whose blocks were held for a decode engine.",
    "leases_renewed": "Times that a decode engine asked to go on holding a request's blocks.",
    "leases_read": "Leases that ended because every reader was done, or decode declined.",
    "leases_expired": "Leases that ended because nobody renewed them.",
}
"""What is summed, and what Prometheus shows about it."""

_LEVELS = {
    "leases_held": "Finished requests whose blocks are held for a decode engine now.",
    "blocks_pinned": "Blocks of these requests, in all KV cache groups.",
}
"""What has a value at a time."""

_SECONDS = {
    "queue_seconds": "From the scheduler's decision to the start of a rank's read.",
    "wire_seconds": "A rank's read.",
    "regroup_seconds": "Regrouping heads and converting elements, after a rank's read.",
}
"""What is measured for each load of a rank."""

_SECONDS_BUCKETS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)

FAILURES = ("unreachable", "not_admitted", "refused", "mismatch", "read", "checksum", "lease_ended", "other")
"""Why loads fail: the kinds of errors.KVTransferError, and a lease that ended before the read did."""


class TransferStats(KVConnectorStats):
    """What happened in an interval, over ranks, for vLLM's periodic line `KV Transfer metrics: ...`.

    `data` is plain, since vLLM carries it between processes: sums and levels by name, failures by kind, and
    the seconds of each load.
    """

    def __init__(self, data: dict[str, Any] | None = None) -> None:
        super().__init__(data=data or _nothing())

    def add(self, numbers: TransferNumbers) -> None:
        """Count one rank's load."""
        self.count(
            loads=1, **{name: getattr(numbers, name) for name in ("parts", "blocks", "bytes", "descriptors")}
        )
        seconds = self.data["seconds"]
        seconds["queue_seconds"].append(numbers.queue_ms / 1000)
        seconds["wire_seconds"].append(numbers.transfer_ms / 1000)
        seconds["regroup_seconds"].append(numbers.regroup_ms / 1000)

    def add_failure(self, kind: str) -> None:
        """Count one rank's failed load, of a kind that FAILURES has."""
        self.count(failed=1)
        self.data["failures"][kind] = self.data["failures"].get(kind, 0) + 1

    def count(self, **amounts: int) -> None:
        """Add to sums."""
        for name, amount in amounts.items():
            self.data["sums"][name] += amount

    def level(self, **values: int) -> None:
        """Note what has a value now."""
        self.data["levels"].update(values)

    def reset(self) -> None:
        self.data = _nothing()

    def aggregate(self, other: KVConnectorStats) -> KVConnectorStats:
        mine, theirs = self.data, other.data
        return TransferStats(
            {
                "sums": {name: mine["sums"][name] + theirs["sums"][name] for name in _SUMS},
                "failures": {
                    kind: mine["failures"].get(kind, 0) + theirs["failures"].get(kind, 0)
                    for kind in {*mine["failures"], *theirs["failures"]}
                },
                # Later ones last: vLLM adds intervals in their order.
                "levels": {**mine["levels"], **theirs["levels"]},
                "seconds": {name: mine["seconds"][name] + theirs["seconds"][name] for name in _SECONDS},
            }
        )

    def reduce(self) -> dict[str, int | float]:
        sums, seconds = self.data["sums"], self.data["seconds"]
        loads = max(1, sums["loads"])
        return {
            "loads": sums["loads"],
            "parts": sums["parts"],
            "failed loads": sums["failed"],
            **{f"failed: {kind}": count for kind, count in sorted(self.data["failures"].items())},
            "MiB": round(sums["bytes"] / 2**20, 3),
            "descriptors": sums["descriptors"],
            "mean transfer ms": round(sum(seconds["wire_seconds"]) * 1000 / loads, 3),
            "mean regroup ms": round(sum(seconds["regroup_seconds"]) * 1000 / loads, 3),
            "leases expired": sums["leases_expired"],
            **{name.replace("_", " "): value for name, value in self.data["levels"].items()},
        }

    def is_empty(self) -> bool:
        return not any(self.data["sums"].values()) and not self.data["levels"]


def _nothing() -> dict[str, Any]:
    return {
        "sums": dict.fromkeys(_SUMS, 0),
        "failures": {},
        "levels": {},
        "seconds": {name: [] for name in _SECONDS},
    }


class TransferCounters(KVConnectorPromMetrics):
    """The same for Prometheus, since the start: `vllm:ascend_kv_<name>`."""

    def __init__(self, *arguments: Any) -> None:  # Any: vLLM's own arguments, handed on
        super().__init__(*arguments)
        # Any below: vLLM's helper forgets which kind of metric it was given
        self._sums: dict[str, dict[int, Any]] = {
            name: self._per_engine(self._counter_cls, name, meaning) for name, meaning in _SUMS.items()
        }
        self._levels: dict[str, dict[int, Any]] = {
            name: self._per_engine(self._gauge_cls, name, meaning, multiprocess_mode="mostrecent")
            for name, meaning in _LEVELS.items()
        }
        self._seconds: dict[str, dict[int, Any]] = {
            name: self._per_engine(self._histogram_cls, name, meaning, buckets=_SECONDS_BUCKETS)
            for name, meaning in _SECONDS.items()
        }
        failures = self._counter_cls(
            name="vllm:ascend_kv_failures",
            documentation="Loads that failed, by kind.",
            labelnames=[*self._labelnames, "kind"],
        )
        self._failures: dict[int, dict[str, Any]] = {
            engine: {kind: failures.labels(*values, kind) for kind in FAILURES}
            for engine, values in self.per_engine_labelvalues.items()
        }

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        """Add an interval."""
        for name, amount in transfer_stats_data["sums"].items():
            self._sums[name][engine_idx].inc(amount)
        for kind, amount in transfer_stats_data["failures"].items():
            self._failures[engine_idx][kind].inc(amount)
        for name, value in transfer_stats_data["levels"].items():
            self._levels[name][engine_idx].set(value)
        for name, loads in transfer_stats_data["seconds"].items():
            for seconds in loads:
                self._seconds[name][engine_idx].observe(seconds)

    def _per_engine(self, kind: Any, name: str, meaning: str, **options: Any) -> dict[int, Any]:
        metric = kind(
            name=f"vllm:ascend_kv_{name}", documentation=meaning, labelnames=self._labelnames, **options
        )
        return create_metric_per_engine(metric, self.per_engine_labelvalues)
