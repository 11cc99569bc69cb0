# SPDX-License-Identifier: Apache-2.0
"""Numbers of ranks become numbers of a request, of an interval, and of Prometheus."""

from __future__ import annotations

import time
from functools import partial

import msgspec
from connector.engines import Engine, admit, engine_config, model_folder, prefilled, request, running
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from vllm_ascend.errors import KVTransferError
from vllm_ascend.kv_transfer.connector import MooncakeConnector, Numbers
from vllm_ascend.kv_transfer.metrics import FAILURES, TransferNumbers, TransferStats

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
        "parts": 1,
    }


def test_the_parts_of_a_load_add_up_to_it():
    assert FIRST.then(SECOND, begins_anew=False).as_params() == {
        "prompt_tokens": 300,
        "tokens": 598,
        "blocks": 6,
        "bytes": 2000,
        "descriptors": 10,
        "sources": (0, 1, 2, 3),
        "queue_ms": 3.0,
        "transfer_ms": 9.0,
        "regroup_ms": 0.75,
        "parts": 2,
    }
    # What was read of it before does not count as its tokens, and was read all the same.
    anew = FIRST.then(SECOND, begins_anew=True)
    assert (anew.tokens, anew.blocks, anew.bytes, anew.parts) == (299, 3, 2000, 2)


def test_an_interval_is_reported_in_means_per_load():
    stats = TransferStats()
    assert stats.is_empty()
    stats.add(FIRST)
    stats.level(leases_held=3, blocks_pinned=30)
    other = TransferStats()
    other.add(SECOND)
    other.add_failure("read")
    other.count(leases_expired=1)
    other.level(leases_held=2, blocks_pinned=20)
    assert stats.aggregate(other).reduce() == {
        "loads": 2,
        "parts": 2,
        "failed loads": 1,
        "failed: read": 1,
        "MiB": 0.002,
        "descriptors": 10,
        "mean transfer ms": 4.5,
        "mean regroup ms": 0.375,
        "leases expired": 1,
        "leases held": 2,
        "blocks pinned": 20,
    }


def test_every_kind_of_error_has_a_counter():
    pending, kinds = [KVTransferError], {KVTransferError.kind}
    while pending:
        pending += (children := pending.pop().__subclasses__())
        kinds |= {child.kind for child in children}
    assert kinds == set(FAILURES)


def test_prometheus_counts_since_the_start(tmp_path):
    registry = CollectorRegistry()
    config = engine_config(model_folder(tmp_path, 4), 1, "kv_consumer")
    types = {kind: partial(kind, registry=registry) for kind in (Counter, Gauge, Histogram)}
    counters = MooncakeConnector.build_prom_metrics(config, types, ["engine"], {0: ["0"], 1: ["1"]})
    stats = TransferStats()
    stats.add(FIRST)
    stats.add_failure("checksum")
    stats.level(blocks_pinned=7)
    # What vLLM carries from the engine to its logger is plain.
    carried = msgspec.msgpack.decode(msgspec.msgpack.encode(stats.to_dict()))
    counters.observe(carried, engine_idx=1)
    stats.level(blocks_pinned=5)
    counters.observe(stats.to_dict(), engine_idx=1)
    shown = generate_latest(registry).decode().splitlines()
    for line in (
        'vllm:ascend_kv_bytes_total{engine="1"} 2000.0',
        'vllm:ascend_kv_bytes_total{engine="0"} 0.0',
        'vllm:ascend_kv_failures_total{engine="1",kind="checksum"} 2.0',
        'vllm:ascend_kv_failures_total{engine="1",kind="unreachable"} 0.0',
        'vllm:ascend_kv_blocks_pinned{engine="1"} 5.0',
        'vllm:ascend_kv_wire_seconds_count{engine="1"} 2.0',
        'vllm:ascend_kv_wire_seconds_sum{engine="1"} 0.01',
        'vllm:ascend_kv_wire_seconds_bucket{engine="1",le="0.003"} 0.0',
        'vllm:ascend_kv_wire_seconds_bucket{engine="1",le="0.01"} 2.0',
        'vllm:ascend_kv_queue_seconds_sum{engine="1"} 0.002',
        'vllm:ascend_kv_regroup_seconds_sum{engine="1"} 0.001',
    ):
        assert line in shown


def gathered(engine: Engine) -> TransferStats:
    """What vLLM takes from a scheduler half and its workers since the last time."""
    stats = TransferStats()
    for part in (*engine.workers, engine.scheduler):
        if (found := part.get_kv_connector_stats()) is not None:
            stats = stats.aggregate(found)
    return stats


def test_engines_report_leases_loads_and_why_loads_fail(tmp_path):
    model = model_folder(tmp_path, 4)
    prefill = Engine(engine_config(model, 2, "kv_producer", {"lease_s": 1.5}), 4)
    decode = Engine(engine_config(model, 1, "kv_consumer"), 4)
    with running(prefill, decode):
        params = prefilled(prefill, "p1", 20, [1, 2])
        assert gathered(prefill).data["levels"] == {"leases_held": 1, "blocks_pinned": 2}
        admit(decode, "d1", 20, [1, 2], params)
        decode.step_until(lambda output: output.finished_recving == {"d1"})
        prefill.step_until(lambda output: output.finished_sending == {"p1"})
        stats = gathered(prefill).data
        assert stats["levels"] == {"leases_held": 0, "blocks_pinned": 0}
        assert (stats["sums"]["leases_read"], stats["sums"]["leases_expired"]) == (1, 0)
        assert gathered(prefill).is_empty()

        params = prefilled(prefill, "p2", 20, [1, 2])
        prefill.step_until(lambda output: output.finished_sending == {"p2"})
        sums = gathered(prefill).data["sums"]
        assert (sums["leases_granted"], sums["leases_read"], sums["leases_expired"]) == (1, 0, 1)
        for request_id, change in (
            ("d2", {}),
            ("d3", {"remote_engine_id": "older"}),
            ("d4", {"remote_port": 9}),
        ):
            admit(decode, request_id, 20, [1, 2], {**params, **change})
            decode.step_until(lambda output: bool(output.finished_recving))
        admit(decode, "d5", 20, [1, 2], {**params, "remote_port": None})
        stats = gathered(decode).data
        assert (stats["sums"]["loads"], stats["sums"]["failed"], stats["sums"]["declined"]) == (1, 3, 1)
        assert stats["failures"] == {"lease_ended": 1, "mismatch": 1, "unreachable": 1}
        assert {name: len(loads) for name, loads in stats["seconds"].items()} == {
            "queue_seconds": 1,
            "wire_seconds": 1,
            "regroup_seconds": 1,
        }


def test_renewals_are_counted(tmp_path):
    model = model_folder(tmp_path, 4)
    prefill = Engine(engine_config(model, 1, "kv_producer", {"lease_s": 0.6}), 4)
    decode = Engine(engine_config(model, 1, "kv_consumer"), 4)
    with running(prefill, decode):
        params = prefilled(prefill, "p", 20, [1, 2])
        decode.scheduler.on_new_request(request("d", 20, params))
        renewed = 0
        deadline = time.monotonic() + 20
        while renewed < 2 and time.monotonic() < deadline:
            prefill.step()
            renewed += gathered(prefill).data["sums"]["leases_renewed"]
            time.sleep(0.01)
        assert renewed >= 2
