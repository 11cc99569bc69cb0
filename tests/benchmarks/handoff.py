# SPDX-License-Identifier: Apache-2.0
"""A handoff, from the moment that a request is ready to be pulled until its blocks are usable.

    python -m vllm_ascend.emulator --memory 8GiB python tests/benchmarks/handoff.py

A request of 2,048 tokens of a model with 32 layers and 8 KV heads of 128 elements in bfloat16, between
engines of the sizes of `PAIRS`, in blocks scattered over the caches of both. The engines are those of the
connector's tests: the real connector on every rank and Mooncake's real engine, without a model, in one
process.

The yardstick is one plain read of as many bytes, from the same ranks, by Mooncake's engine alone: long
ranges, all sources asked at once, nothing planned and nothing regrouped. vLLM's own MooncakeConnector
(vllm_mooncake.py) hands over the same request, for comparison. All ways take turns in each round; `ratio` is
the median of a way over the median of the yardstick. Prints a JSON object per case, and draws a plot.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from mooncake.engine import TransferEngine
from plot import Chart

sys.path.append(str(Path(__file__).parents[1]))

from connector.engines import Engine, admit, engine_config, finish, model_folder, prefilled, running
from connector.topologies import Model
from vllm_mooncake import HEAD_SIZE, HEADS, LAYERS, TOKENS, VllmHandoffs

TOTAL_BYTES = TOKENS * LAYERS * HEADS * HEAD_SIZE * 2 * 2
PAIRS = ((1, 1), (2, 1), (4, 1), (8, 1), (4, 2), (1, 2))
CONVERTED = ((1, 1), (2, 1), (1, 2))
"""Of these, also between engines of which one is head-major and the other is not."""
BLOCK_SIZES = (128, 16)
PLAIN_RANGE_BYTES = 4 << 20

MODEL = Model(HEADS, group_of_layer=(0,) * LAYERS, head_size=HEAD_SIZE)


@dataclass(frozen=True)
class Way:
    """How the two engines lay out KV, and how the decode engine takes it."""

    prefill: str
    decode: str
    regroup: str = "operators"

    @property
    def name(self) -> str:
        if self.prefill != self.decode:
            return f"converted, {self.prefill.removesuffix('major')} to {self.decode}"
        return self.decode if self.regroup == "operators" else f"{self.decode}, {self.regroup}"


@dataclass(frozen=True)
class Pair:
    """The sizes of two engines."""

    prefill_tp: int
    decode_tp: int
    block_size: int

    @property
    def name(self) -> str:
        return f"TP {self.prefill_tp} to {self.decode_tp}, blocks of {self.block_size}"

    @property
    def num_blocks(self) -> int:
        return TOKENS // self.block_size

    @property
    def ways(self) -> list[Way]:
        """Staging memory is for token-major pages of other sizes: more of them, or parts of them."""
        token, head = "token-major", "head-major"
        staged = [Way(token, token, "staged")] if self.prefill_tp != self.decode_tp else []
        converted = [Way(token, head), Way(head, token)]
        is_converted = (self.prefill_tp, self.decode_tp) in CONVERTED
        return [Way(token, token), *staged, Way(head, head), *(converted if is_converted else [])]

    def bytes_read(self, way: Way) -> int:
        """Of token-major pages that are taken apart, a rank reads all heads, also where it wants some."""
        too_many = way.prefill == "token-major" and (way.decode == "head-major" or way.regroup == "staged")
        return TOTAL_BYTES * (max(1, self.decode_tp // self.prefill_tp) if too_many else 1)


class PlainReader:
    """Mooncake's engine alone: for each decode rank one that reads as much, from the same ranks."""

    def __init__(self, pair: Pair, prefill: Engine) -> None:
        sources_of_rank = max(1, pair.prefill_tp // pair.decode_tp)
        self._bytes = TOTAL_BYTES // pair.decode_tp // sources_of_rank
        regions = [rank.get_handshake_metadata().regions for rank in prefill.workers]
        self._engines, self._targets, self._sources = [], [], []
        for rank in range(pair.decode_tp):
            engine = TransferEngine()
            assert engine.initialize("127.0.0.1", "P2PHANDSHAKE", "tcp", "") == 0
            target = torch.zeros(sources_of_rank * self._bytes, dtype=torch.int8)
            assert engine.register_memory(target.data_ptr(), target.numel()) == 0
            first = rank * pair.prefill_tp // pair.decode_tp
            self._engines.append(engine)
            self._targets.append(target)
            self._sources.append(regions[first : first + sources_of_rank])

    def __call__(self) -> None:
        """Read all, and wait for it."""
        asked = [self._ask(rank) for rank in range(len(self._engines))]
        for engine, batches in zip(self._engines, asked, strict=True):
            assert engine.get_batch_transfer_status(batches) == 0

    def close(self) -> None:
        for engine, target in zip(self._engines, self._targets, strict=True):
            engine.unregister_memory(target.data_ptr())

    def _ask(self, rank: int) -> list[int]:
        batches = []
        for number, source in enumerate(self._sources[rank]):
            starts = range(0, self._bytes, PLAIN_RANGE_BYTES)
            lengths = [min(PLAIN_RANGE_BYTES, self._bytes - start) for start in starts]
            local = self._targets[rank].data_ptr() + number * self._bytes
            # Layers of an engine lie one behind the other.
            remote = source.stacks[0].addresses[0]
            batches.append(
                self._engines[rank].batch_transfer_async_read(
                    source.session,
                    [local + start for start in starts],
                    [remote + start for start in starts],
                    lengths,
                )
            )
        return batches


class Handoffs:
    """A pair of engines between which one request after the other is handed over."""

    def __init__(self, pair: Pair, prefill: Engine, decode: Engine) -> None:
        self._prefill, self._decode = prefill, decode
        self._number = itertools.count()
        chance = random.Random(0)
        numbers = range(1, 2 * pair.num_blocks)
        self.remote_blocks = chance.sample(numbers, pair.num_blocks)
        self.local_blocks = chance.sample(numbers, pair.num_blocks)
        self.costs: list[dict[str, Any]] = []
        """What each cost, as the connector tells the client."""

    def __call__(self) -> float:
        """Seconds of one handoff."""
        name = f"request {next(self._number)}"
        params = prefilled(self._prefill, name, TOKENS, self.remote_blocks)
        begin_s = time.perf_counter()
        wanted, _ = admit(self._decode, name, TOKENS, self.local_blocks, params)
        while not (output := self._decode.step()).finished_recving:
            pass
        seconds = time.perf_counter() - begin_s
        assert not output.failed_recving
        self.costs.append(finish(self._decode, wanted) or {})
        self._prefill.step_until(lambda output: bool(output.finished_sending))
        return seconds

    def median_ms(self, part: str) -> float:
        """Of a part of all but the first two, which meet the peer and warm up."""
        return round(statistics.median(cost[part] for cost in self.costs[2:]), 1)

    def check(self) -> None:
        """The bytes of the last handoff are the prefill engine's."""
        for layer in range(LAYERS):
            there, here = (
                torch.cat([engine.layer(rank, layer)[blocks].cpu() for rank in range(engine.tp_size)], dim=-2)
                for engine, blocks in ((self._prefill, self.remote_blocks), (self._decode, self.local_blocks))
            )
            assert torch.equal(there, here), f"layer {layer}"


@contextmanager
def engines(pair: Pair, folder: Path) -> Iterator[list[tuple[Engine, Engine]]]:
    """For each way a prefill and a decode engine; ways that begin with one layout share the former."""
    model = model_folder(folder, HEADS, num_hidden_layers=LAYERS, head_dim=HEAD_SIZE)

    numbers = itertools.count()

    def start(tp_size: int, role: str, layout: str, **extra: Any) -> Engine:
        config = engine_config(
            model,
            tp_size,
            role,
            {"peer_timeout_s": 60, **extra},
            block_size=pair.block_size,
            head_major=layout == "head-major",
            engine_id=f"{role} {next(numbers)}",
        )
        return Engine(config, MODEL, num_blocks=2 * pair.num_blocks)

    layouts = dict.fromkeys(way.prefill for way in pair.ways)
    prefills = {layout: start(pair.prefill_tp, "kv_producer", layout, lease_s=600) for layout in layouts}
    decodes = [start(pair.decode_tp, "kv_consumer", way.decode, regroup=way.regroup) for way in pair.ways]
    with running(*prefills.values(), *decodes):
        for prefill in prefills.values():
            for rank, layer in itertools.product(range(pair.prefill_tp), range(LAYERS)):
                bits = prefill.layer(rank, layer)
                bits.copy_(torch.randint(-(1 << 15), 1 << 15, bits.shape, dtype=bits.dtype))
        yield [(prefills[way.prefill], decode) for way, decode in zip(pair.ways, decodes, strict=True)]


@contextmanager
def of_vllm(pair: Pair) -> Iterator[VllmHandoffs]:
    handoffs = VllmHandoffs(pair.prefill_tp, pair.decode_tp, pair.block_size)
    try:
        yield handoffs
    finally:
        handoffs.close()


def measure(pair: Pair, folder: Path, rounds: int) -> Iterator[dict[str, object]]:
    """A result for each way, and for vLLM's connector."""
    with engines(pair, folder) as sides, of_vllm(pair) as theirs:
        plain = PlainReader(pair, sides[0][0])
        handoffs = [Handoffs(pair, prefill, decode) for prefill, decode in sides]
        theirs()
        for handoff in handoffs:
            handoff()
            handoff.check()
        plain_s, theirs_s, *ways_s = medians_s(rounds, lambda: timed(plain), theirs, *handoffs)
        plain.close()
    for way, seconds, handoff in zip(pair.ways, ways_s, handoffs, strict=True):
        assert handoff.costs[-1]["bytes"] == pair.bytes_read(way)
        yield {
            "benchmark": "handoff",
            "case": f"{way.name}, {pair.name}",
            "ratio": round(seconds / plain_s, 2),
            "ms": round(seconds * 1000, 1),
            "plain_ms": round(plain_s * 1000, 1),
            "plain_gb_per_s": round(TOTAL_BYTES / plain_s / 1e9, 2),
            "descriptors": handoff.costs[-1]["descriptors"],
            **{part: handoff.median_ms(part) for part in ("queue_ms", "transfer_ms", "regroup_ms")},
        } | ({"to_operators": round(seconds / ways_s[0], 2)} if way.regroup != "operators" else {})
    yield {
        "benchmark": "handoff",
        "case": f"vLLM's MooncakeConnector, {pair.name}",
        "ratio": round(theirs_s / plain_s, 2),
        "ms": round(theirs_s * 1000, 1),
        "plain_ms": round(plain_s * 1000, 1),
    }


def medians_s(rounds: int, *ways: Callable[[], float]) -> list[float]:
    """The median time of each way, all taking turns; the first turn does not count."""
    taken = [[way() for way in ways] for _ in range(1 + rounds)]
    return [statistics.median(of_way) for of_way in zip(*taken[1:], strict=True)]


def timed(work: Callable[[], None]) -> float:
    begin_s = time.perf_counter()
    work()
    return time.perf_counter() - begin_s


def draw(results: Sequence[dict[str, Any]], path: Path) -> None:
    """One group per pair, a bar per way; a way that a pair has not is left out."""
    names = list(dict.fromkeys(str(result["case"]).rpartition(", TP")[0] for result in results))
    groups: dict[str, list[float]] = {}
    for result in results:
        way, _, pair = str(result["case"]).rpartition(", TP")
        groups.setdefault(f"TP{pair}", [0.0] * len(names))[names.index(way)] = float(result["ratio"])
    Chart(
        title="Handoff of 2,048 tokens, 32 layers × 8 heads × 128, bf16, over TCP on one host",
        unit="times one plain read of the same bytes by Mooncake's engine alone",
        series=names,
        groups=groups,
        goals={"the same": 1.0},
        longest=8,
    ).save(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    plot = Path(__file__).parents[2] / "docs" / "handoff.svg"
    parser.add_argument("--plot", type=Path, default=plot, help="where to draw the result")
    parser.add_argument("--rounds", type=int, default=7, help="handoffs of each way")
    parser.add_argument("--only", default="", help="measure only pairs whose name has this in it")
    arguments = parser.parse_args()
    # As in every process of an engine.
    from vllm.plugins import load_general_plugins

    load_general_plugins()
    results = []
    with tempfile.TemporaryDirectory() as folder:
        for block_size, (prefill_tp, decode_tp) in itertools.product(BLOCK_SIZES, PAIRS):
            pair = Pair(prefill_tp, decode_tp, block_size)
            if arguments.only not in pair.name:
                continue
            for result in measure(pair, Path(folder), arguments.rounds):
                results.append(result)
                print(json.dumps(result), flush=True)
    draw(results, arguments.plot)


if __name__ == "__main__":
    main()
