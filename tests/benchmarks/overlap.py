# SPDX-License-Identifier: Apache-2.0
"""What is left of a handoff after prefill has ended, when decode reads the prompt while it is computed.

    python -m vllm_ascend.emulator --memory 8GiB python tests/benchmarks/overlap.py

The request, the engines and the transfer are those of handoff.py. Prefill's computing is paced: a chunk of
512 of the 2,048 tokens is in memory every so many milliseconds, by default as many as the ordinary handoff
takes for a chunk, so that the wire just keeps up. The yardstick is the ordinary handoff, which begins when
prefill has ended; both take turns. `ratio` is the median time from prefill's end until the blocks are usable,
told early, over that of the ordinary handoff: a quarter, if nothing is left but the last chunk. Prints a JSON
object per case, and draws a plot.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from handoff import PAIRS, TOKENS, Handoffs, Pair, engines, medians_s
from plot import Chart
from vllm.v1.core.kv_cache_manager import KVCacheBlocks
from vllm.v1.core.kv_cache_utils import KVCacheBlock

sys.path.append(str(Path(__file__).parents[1]))

from connector.engines import Engine, finish, prefilled, request
from connector.growing import Prompt, early_params

CHUNK = 512
BLOCK_SIZE = 128


class EarlyHandoffs:
    """Between the engines and blocks of `ordinary`, prompts that are handed over as they grow."""

    def __init__(self, prefill: Engine, decode: Engine, ordinary: Handoffs) -> None:
        self._prefill, self._decode = prefill, decode
        self._ordinary = ordinary
        self._number = itertools.count()
        self._learned = prefilled(prefill, "learned", 1, [1])
        self.chunk_every_s = 0.0
        self.costs: list[dict[str, Any]] = []
        """What each cost, as the connector tells the client."""

    def __call__(self) -> float:
        """Seconds from prefill's end until the blocks are usable."""
        prompt = Prompt(self._prefill, TOKENS, self._ordinary.remote_blocks)
        name = f"early {next(self._number)}"
        self._wanted = request(name, TOKENS, early_params(self._learned, prompt.name))
        self._decode.scheduler.on_new_request(self._wanted)
        self._has_blocks = False
        for chunk_at_s in self._chunks_at_s():
            while time.perf_counter() < chunk_at_s:
                assert not self._step()
            prompt.schedule(CHUNK)
            prompt.process(CHUNK)
        prompt.end()
        begin_s = time.perf_counter()
        while not self._step():
            pass
        seconds = time.perf_counter() - begin_s
        self.costs.append(finish(self._decode, self._wanted) or {})
        self._prefill.step_until(lambda output: prompt.request_id in (output.finished_sending or ()))
        return seconds

    def _chunks_at_s(self) -> list[float]:
        now_s = time.perf_counter()
        return [now_s + chunk * self.chunk_every_s for chunk in range(1, 1 + TOKENS // CHUNK)]

    def _step(self) -> bool:
        """A step of decode. Returns whether the request is loaded."""
        scheduler = self._decode.scheduler
        if not self._has_blocks:
            num_tokens, _ = scheduler.get_num_new_matched_tokens(self._wanted, 0)
            if num_tokens is not None:
                blocks = [KVCacheBlock(block) for block in self._ordinary.local_blocks]
                scheduler.update_state_after_alloc(self._wanted, KVCacheBlocks((blocks,)), num_tokens)
                self._has_blocks = True
        output = self._decode.step()
        assert not output.failed_recving
        return bool(output.finished_recving)


def measure(pair: Pair, folder: Path, rounds: int, pace: float) -> Iterator[dict[str, object]]:
    """A result for each way."""
    with engines(pair, folder) as sides:
        for way, (prefill, decode) in zip(pair.ways, sides, strict=True):
            ordinary = Handoffs(pair, prefill, decode)
            early = EarlyHandoffs(prefill, decode, ordinary)
            ordinary_s = statistics.median(ordinary() for _ in range(3))
            early.chunk_every_s = pace * ordinary_s * CHUNK / TOKENS
            early()
            ordinary.check()
            ordinary_s, tail_s = medians_s(rounds, ordinary, early)
            yield {
                "benchmark": "overlap",
                "case": f"{way.name}, {pair.name}",
                "ratio": round(tail_s / ordinary_s, 2),
                "tail_ms": round(tail_s * 1000, 1),
                "ordinary_ms": round(ordinary_s * 1000, 1),
                "chunk_every_ms": round(early.chunk_every_s * 1000, 1),
                "parts": early.costs[-1]["parts"],
            }


def draw(results: Sequence[dict[str, Any]], path: Path) -> None:
    """One bar per case."""
    Chart(
        title="From prefill's end until KV is usable, told early: 2,048 tokens in 4 chunks, 32 layers, bf16",
        unit="times the handoff that begins when prefill has ended",
        series=["told early"],
        groups={str(result["case"]): [float(result["ratio"])] for result in results},
        goals={"the last chunk": CHUNK / TOKENS, "the ordinary handoff": 1.0},
    ).save(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    plot = Path(__file__).parents[2] / "docs" / "overlap.svg"
    parser.add_argument("--plot", type=Path, default=plot, help="where to draw the result")
    parser.add_argument("--rounds", type=int, default=7, help="handoffs of each way")
    parser.add_argument(
        "--pace", type=float, default=1.0, help="time of a chunk, in ordinary handoffs of one"
    )
    parser.add_argument("--only", default="", help="measure only pairs whose name has this in it")
    arguments = parser.parse_args()
    # As in every process of an engine.
    from vllm.plugins import load_general_plugins

    load_general_plugins()
    results = []
    with tempfile.TemporaryDirectory() as folder:
        # 1 to 2 takes seconds token-major, whatever is done meanwhile (docs/benchmarks.md).
        for prefill_tp, decode_tp in PAIRS[:-1]:
            pair = Pair(prefill_tp, decode_tp, BLOCK_SIZE)
            if arguments.only not in pair.name:
                continue
            for result in measure(pair, Path(folder), arguments.rounds, arguments.pace):
                results.append(result)
                print(json.dumps(result), flush=True)
    draw(results, arguments.plot)


if __name__ == "__main__":
    main()
