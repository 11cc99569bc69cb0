# SPDX-License-Identifier: Apache-2.0
"""Numbers of ranks become numbers of a request, of an interval, and of Prometheus."""

from __future__ import annotations

from functools import partial

from connector.engines import engine_config, model_folder
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from vllm_ascend.kv_transfer.connector import MooncakeConnector, Numbers
from vllm_ascend.kv_transfer.metrics import TransferNumbers, TransferStats

FIRST = TransferNumbers(
    prompt_tokens=300,
    tokens=299,
    blocks=3,
    bytes=1000,
    descriptors=4,
    sources=(0, 1),
    queue_ms=1.0,
    transfer_ms=5.0,
    regroup_ms=0.5,
)
SECOND = TransferNumbers(
    prompt_tokens=300,
    tokens=299,
    blocks=3,
    bytes=1000,
    descriptors=6,
    sources=(2, 3),
    queue_ms=2.0,
    transfer_ms=4.0,
    regroup_ms=0.25,
)


def test_ranks_add_up_amounts_and_keep_the_slower_time():
    joined = Numbers({"a": FIRST}).aggregate(Numbers({"a": SECOND, "b": SECOND}))
    assert joined.by_request["b"] == SECOND
    assert joined.by_request["a"].as_params() == {
        "prompt_tokens": 300,
        "tokens": 299,
        "blocks": 3,
        "bytes": 2000,
        "descriptors": 10,
        "sources": (0, 1, 2, 3),
        "queue_ms": 2.0,
        "transfer_ms": 5.0,
        "regroup_ms": 0.5,
    }


def test_an_interval_is_reported_in_means_per_load():
    stats = TransferStats()
    assert stats.is_empty()
    stats.add(FIRST)
    other = TransferStats()
    other.add(SECOND)
    other.add_failure()
    assert stats.aggregate(other).reduce() == {
        "loads": 2,
        "failed loads": 1,
        "MiB": 0.002,
        "descriptors": 10,
        "mean transfer ms": 4.5,
        "mean regroup ms": 0.375,
    }


def test_prometheus_counts_since_the_start(tmp_path):
    registry = CollectorRegistry()

    config = engine_config(model_folder(tmp_path, 4), 1, "kv_consumer")
    types = {Counter: partial(Counter, registry=registry), Gauge: Gauge, Histogram: Histogram}
    counters = MooncakeConnector.build_prom_metrics(config, types, ["engine"], {0: ["0"], 1: ["1"]})
    stats = TransferStats()
    stats.add(FIRST)
    counters.observe(stats.to_dict(), engine_idx=1)
    counters.observe(stats.to_dict(), engine_idx=1)
    shown = generate_latest(registry).decode()
    assert 'vllm:ascend_kv_bytes_total{engine="1"} 2000.0' in shown
    assert 'vllm:ascend_kv_bytes_total{engine="0"} 0.0' in shown
