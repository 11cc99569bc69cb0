# SPDX-License-Identifier: Apache-2.0
"""What the connector costs an engine's thread: all its calls in one step, with 256 requests in flight.

    python -m vllm_ascend.emulator python tests/benchmarks/engine_thread.py

A prefill and a decode engine of one rank each, without a model, in one process: the real connector, the real
transfer engine, requests of 2,048 tokens of 32 layers and one KV head of 128 elements. Steps begin every
20 ms. In each, as many requests arrive as have ended, so that 256 are always held on one side and pulled or
awaited on the other, while reader threads read. Timed is every call that vLLM makes to the connector in a
step, on both halves; that includes waiting for Python's lock, which the threads of both engines share here.

`ratio` is the median of these times over a step of 20 ms, for steps in which no request arrives and for those
in which some do; `to_empty` is it over the median with nothing in flight; `median_cpu_us` leaves out what
the thread waited. Prints a JSON object per case, and draws a plot.
"""

from __future__ import annotations

import argparse
import cProfile
import dataclasses
import itertools
import json
import pstats
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from plot import Chart
from vllm.v1.core.kv_cache_manager import KVCacheBlocks
from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.outputs import KVConnectorOutput
from vllm.v1.request import Request, RequestStatus

sys.path.append(str(Path(__file__).parents[1]))

from connector.engines import Engine, engine_config, model_folder, request, running
from connector.topologies import Model

TOKENS, LAYERS, HEADS, HEAD_SIZE, BLOCK_SIZE = 2048, 32, 1, 128, 128
IN_FLIGHT = 256
STEP_S = 0.020
GOAL = 0.01
WARM_UP = 50

MODEL = Model(HEADS, group_of_layer=(0,) * LAYERS, head_size=HEAD_SIZE)
BLOCKS = list(range(1, 1 + TOKENS // BLOCK_SIZE))
LAYER_NAMES = [str(layer) for layer in range(LAYERS)]
STEP_WITH_WORK = dataclasses.replace(SchedulerOutput.make_empty(), total_num_scheduled_tokens=1)

Result = TypeVar("Result")


@dataclass(frozen=True)
class Step:
    """The time in calls in one step."""

    arrived: int
    """Requests that arrived in it."""
    seconds: float
    cpu_s: float


@dataclass
class Calls:
    """The time in calls to one engine's connector, step by step."""

    profile: cProfile.Profile | None = None
    steps: list[Step] = field(default_factory=list)
    by_call_s: dict[str, list[float]] = field(default_factory=dict)
    """The same for each call, over all steps."""
    _step_s: float = 0.0
    _step_cpu_s: float = 0.0

    def __call__(self, call: Callable[..., Result], *arguments: Any) -> Result:  # Any: what the call takes
        if self.profile is not None:
            return self.profile.runcall(call, *arguments)
        begin_s, begin_cpu_s = time.perf_counter(), time.thread_time()
        try:
            return call(*arguments)
        finally:
            self._step_cpu_s += time.thread_time() - begin_cpu_s
            took_s = time.perf_counter() - begin_s
            self._step_s += took_s
            self.by_call_s.setdefault(call.__name__, []).append(took_s)

    def end_step(self, arrived: int) -> None:
        self.steps.append(Step(arrived, self._step_s, self._step_cpu_s))
        self._step_s = self._step_cpu_s = 0.0

    def longest_us(self, most: int) -> dict[str, int]:
        """The calls that take the most time, the median of each."""
        each_us = {name: round(statistics.median(took_s) * 1e6) for name, took_s in self.by_call_s.items()}
        return dict(sorted(each_us.items(), key=lambda one: -one[1])[:most])

    def measured(self, arrival: bool) -> list[Step]:
        """The steps after the first ones in which a request arrived, or those in which none did."""
        return [step for step in self.steps[WARM_UP:] if bool(step.arrived) == arrival]


class Prefill:
    """The engine that holds what it computed; `params` of requests that it has finished."""

    def __init__(self, engine: Engine, calls: Calls) -> None:
        self._engine, self.calls = engine, calls
        self.held = 0

    def step(self, names: list[str]) -> list[dict[str, Any]]:
        """Finish requests of these names, and what else a step does."""
        call, engine = self.calls, self._engine
        params = []
        for name in names:
            ended = request(name, TOKENS, {"do_remote_decode": True, "do_remote_prefill": False})
            call(engine.scheduler.on_new_request, ended)
            call(engine.scheduler.get_num_new_matched_tokens, ended, 0)
            call(engine.scheduler.update_state_after_alloc, ended, allocated(), 0)
            ended.num_computed_tokens = TOKENS
            ended.status = RequestStatus.FINISHED_LENGTH_CAPPED
            held, of_request = call(engine.scheduler.request_finished_all_groups, ended, (BLOCKS,))
            assert held
            params.append(json.loads(json.dumps(of_request)))
        output = step(engine, call)
        self.held += len(names) - len(output.finished_sending or ())
        call.end_step(len(names))
        return params


class Decode:
    """The engine that pulls."""

    def __init__(self, engine: Engine, calls: Calls) -> None:
        self._engine, self.calls = engine, calls
        self._wanted: dict[str, Request] = {}
        self.loaded = 0

    @property
    def in_flight(self) -> int:
        return len(self._wanted)

    def step(self, names: list[str], params: list[dict[str, Any]]) -> None:
        """Admit requests of these names, and what else a step does."""
        call, engine = self.calls, self._engine
        for name, of_request in zip(names, params, strict=True):
            wanted = self._wanted[name] = request(name, TOKENS, of_request)
            blocks = allocated()
            call(engine.scheduler.on_new_request, wanted)
            num_external, _ = call(engine.scheduler.get_num_new_matched_tokens, wanted, 0)
            call(engine.scheduler.update_state_after_alloc, wanted, blocks, num_external)
        output = step(engine, call)
        assert not output.failed_recving
        for name in output.finished_recving or ():
            ended = self._wanted.pop(name)
            ended.status = RequestStatus.FINISHED_STOPPED
            call(engine.scheduler.request_finished_all_groups, ended, ([],))
            self.loaded += 1
        call.end_step(len(names))


def allocated() -> KVCacheBlocks:
    return KVCacheBlocks(([KVCacheBlock(block) for block in BLOCKS],))


def step(engine: Engine, call: Calls) -> KVConnectorOutput:
    """The calls of a step in which the model has work, on both halves."""
    (worker,) = engine.workers
    metadata = call(engine.scheduler.build_connector_meta, STEP_WITH_WORK)
    call(worker.bind_connector_metadata, metadata)
    call(worker.start_load_kv, None)
    call(of_every_layer, worker)
    call(worker.wait_for_save)
    results = call(worker.get_transfer_results, set())
    output = KVConnectorOutput(
        finished_sending=results.finished_sending,
        finished_recving=results.finished_recving,
        failed_recving=results.failed_recving,
        kv_connector_worker_meta=call(worker.build_connector_worker_meta),
        kv_connector_stats=call(worker.get_kv_connector_stats),
    )
    call(worker.clear_connector_metadata)
    call(engine.scheduler.update_connector_output, output)
    call(engine.scheduler.get_kv_connector_stats)
    return output


def of_every_layer(worker: Any) -> None:  # Any: a connector
    for name in LAYER_NAMES:
        worker.wait_for_layer_load(name)
        worker.save_kv_layer(name, None, None)


def run(prefill: Prefill, decode: Decode, num_steps: int, in_flight: int) -> None:
    """Steps of both engines, every STEP_S, that keep `in_flight` requests between them."""
    number = itertools.count(len(prefill.calls.steps) << 20)
    begin_s = time.perf_counter()
    for done in range(1, 1 + num_steps):
        # No more than a few per step arrive: an engine that starts does not get all of them at once.
        missing = min(8, in_flight - decode.in_flight)
        names = [f"request {next(number)}" for _ in range(missing)]
        decode.step(names, prefill.step(names))
        time.sleep(max(0.0, begin_s + done * STEP_S - time.perf_counter()))


def reports(side: str, calls: Calls, empty: Calls) -> Iterator[dict[str, object]]:
    """A result for steps in which no request arrives, and one for those in which some do."""
    empty_s = statistics.median(step.seconds for step in empty.measured(arrival=False))
    for arrival in (False, True):
        steps = calls.measured(arrival)
        # A machine on which nothing ends while it is measured has no arrivals.
        if len(steps) < 2:
            continue
        seconds = [step.seconds for step in steps]
        median_s = statistics.median(seconds)
        yield {
            "benchmark": "engine_thread",
            "case": f"{side}, {IN_FLIGHT} in flight, {'some arrive' if arrival else 'none arrives'}",
            "ratio": round(median_s / STEP_S, 5),
            "to_empty": round(median_s / empty_s, 1),
            "median_us": round(median_s * 1e6),
            "median_cpu_us": round(statistics.median(step.cpu_s for step in steps) * 1e6),
            "p99_us": round(statistics.quantiles(seconds, n=100)[-1] * 1e6),
            "empty_us": round(empty_s * 1e6),
            "steps": len(steps),
            "arrivals": round(statistics.mean(step.arrived for step in steps), 1),
            "longest_us": calls.longest_us(5),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    plot = Path(__file__).parents[2] / "docs" / "engine_thread.svg"
    parser.add_argument("--plot", type=Path, default=plot, help="where to draw the result")
    parser.add_argument("--steps", type=int, default=500, help="steps to measure")
    parser.add_argument("--profile", action="store_true", help="show instead in which functions it computes")
    arguments = parser.parse_args()
    # As in every process of an engine.
    from vllm.plugins import load_general_plugins

    load_general_plugins()
    torch.npu.set_device(0)
    with tempfile.TemporaryDirectory() as folder, ExitStack() as closing:
        model = model_folder(Path(folder), HEADS, num_hidden_layers=LAYERS, head_dim=HEAD_SIZE)
        sides = []
        for role in ("kv_producer", "kv_consumer"):
            config = engine_config(model, 1, role, block_size=BLOCK_SIZE)
            sides.append(Engine(config, MODEL, num_blocks=2 * len(BLOCKS)))
            closing.enter_context(running(sides[-1]))
        empty = Prefill(sides[0], Calls()), Decode(sides[1], Calls())
        run(*empty, WARM_UP + arguments.steps, 0)
        profile = cProfile.Profile(time.thread_time) if arguments.profile else None
        prefill, decode = Prefill(sides[0], Calls(profile)), Decode(sides[1], Calls(profile))
        run(prefill, decode, WARM_UP + arguments.steps, IN_FLIGHT)
        if profile is not None:
            pstats.Stats(profile).sort_stats("tottime").print_stats(25)
            return
        results = [
            *reports("decode", decode.calls, empty[1].calls),
            *reports("prefill", prefill.calls, empty[0].calls),
        ]
    for result in results:
        print(json.dumps(result), flush=True)
    Chart(
        title="Time in the connector's calls per engine step, 256 requests in flight",
        unit="per cent of a step of 20 ms",
        series=("median",),
        groups={str(result["case"]): (100 * float(str(result["ratio"])),) for result in results},
        goals={"goal": 100 * GOAL},
    ).save(arguments.plot)


if __name__ == "__main__":
    main()
