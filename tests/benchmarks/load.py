# SPDX-License-Identifier: Apache-2.0
"""`vllm bench serve` against the router over two prefill and two decode engines, and against one engine.

    python -m vllm_ascend.emulator python tests/benchmarks/load.py

All are `vllm serve` processes of the recall model, one device each, started once; all sides take turns,
so that what else runs on the machine spoils both alike. Prompts are random words. Cases:

- time to first token: the median behind the router, over that of the one engine plus the mean time that the
  decode engines waited for KV (queue and wire, by their own metrics);
- inter-token time: the median behind the router while prompts keep coming, over the same with one request at
  a time, where nobody prefills while it decodes; `one_engine` is this ratio of the one engine.

Each behind the router as it is, and behind one that tells decode early (`--early`).

`--model` and `--emulator=` (empty) run it on cards.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import httpx
from plot import Chart

sys.path.append(str(Path(__file__).parents[2] / "examples" / "disaggregated"))

from servers import Server, engine, router, running

ROOT = Path(__file__).parents[2]
NAME = "served"


@dataclass(frozen=True)
class Found:
    """Milliseconds of one run of `vllm bench serve`, medians over its requests or tokens."""

    first_token_ms: float
    inter_token_ms: float


@dataclass(frozen=True)
class Load:
    """What is asked of a side."""

    num_prompts: int
    prompt_tokens: int
    answer_tokens: int
    rate: float
    """Requests per second."""
    at_once: int
    """Requests that are under way at the most."""


def bench(server: Server, model: Path, load: Load, seed: int, folder: Path) -> Found:
    """Run vLLM's client against the server. Raises RuntimeError if a request failed."""
    result = folder / "bench.json"
    command = [
        *(sys.executable, "-m", "vllm.entrypoints.cli.main", "bench", "serve", "--backend", "vllm"),
        *("--base-url", server.url, "--model", NAME, "--tokenizer", str(model), "--seed", str(seed)),
        *("--dataset-name", "random", "--random-input-len", str(load.prompt_tokens)),
        *("--random-output-len", str(load.answer_tokens), "--num-prompts", str(load.num_prompts)),
        *("--request-rate", str(load.rate), "--max-concurrency", str(load.at_once), "--ignore-eos"),
        *("--save-result", "--result-dir", str(folder), "--result-filename", result.name, "--disable-tqdm"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"vllm bench serve ended with {done.returncode}\n{done.stderr[-2000:]}")
    found = json.loads(result.read_text())
    if found["completed"] != load.num_prompts:
        raise RuntimeError(
            f"of {load.num_prompts} requests to {server.name} {found['completed']} were answered"
        )
    return Found(found["median_ttft_ms"], found["median_itl_ms"])


def waited_ms(decodes: Sequence[Server]) -> tuple[float, float]:
    """How long loads of these engines have taken so far, queue and wire together, and how many there were."""
    total_s = count = 0.0
    for server in decodes:
        metrics = httpx.get(f"{server.url}/metrics").text
        for name in ("queue_seconds", "wire_seconds"):
            total_s += sum(map(float, re.findall(rf"^vllm:ascend_kv_{name}_sum.* (\S+)$", metrics, re.M)))
        count += sum(map(float, re.findall(r"^vllm:ascend_kv_wire_seconds_count.* (\S+)$", metrics, re.M)))
    return 1000 * total_s, count


def median(values: Sequence[float]) -> float:
    return statistics.median(values)


def measure(
    one: Server, fronts: Sequence[Server], decodes: Sequence[Server], model: Path, rounds: int, folder: Path
) -> list[dict[str, object]]:
    quiet = Load(num_prompts=6, prompt_tokens=400, answer_tokens=48, rate=100, at_once=1)
    busy = Load(num_prompts=32, prompt_tokens=400, answer_tokens=48, rate=4, at_once=16)
    found: dict[tuple[str, Load], list[Found]] = {}
    before_ms, before = waited_ms(decodes)
    # The first round meets peers and compiles what is compiled late.
    for turn in range(1 + rounds):
        for load in (quiet, busy):
            for side in (one, *fronts):
                result = bench(side, model, load, turn, folder)
                if turn:
                    found.setdefault((side.name, load), []).append(result)
    after_ms, after = waited_ms(decodes)
    wire_ms = (after_ms - before_ms) / max(1, after - before)

    def first_ms(side: Server, load: Load) -> float:
        return median([result.first_token_ms for result in found[side.name, load]])

    def inter_ms(side: Server, load: Load) -> float:
        return median([result.inter_token_ms for result in found[side.name, load]])

    first = [
        {
            "benchmark": "load",
            "case": f"time to first token, {name}, {front.name}",
            "ratio": round(first_ms(front, load) / (first_ms(one, load) + wire_ms), 2),
            "pair_ms": round(first_ms(front, load), 1),
            "one_engine_ms": round(first_ms(one, load), 1),
            "wire_ms": round(wire_ms, 1),
        }
        for name, load in (("one request at a time", quiet), (f"{busy.rate:g} requests a second", busy))
        for front in fronts
    ]
    inter = [
        {
            "benchmark": "load",
            "case": f"inter-token time while others prefill, {front.name}",
            "ratio": round(inter_ms(front, busy) / inter_ms(front, quiet), 2),
            "one_engine": round(inter_ms(one, busy) / inter_ms(one, quiet), 2),
            "pair_ms": round(inter_ms(front, busy), 1),
            "one_engine_ms": round(inter_ms(one, busy), 1),
        }
        for front in fronts
    ]
    return [*first, *inter]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--plot", type=Path, default=ROOT / "docs" / "load.svg", help="where to draw the result"
    )
    parser.add_argument("--model", type=Path, default=ROOT / "examples" / "recall_model")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each side, besides the first")
    parser.add_argument("--emulator", default="--devices 8 --memory 1GiB", help="its options; empty: cards")
    arguments = parser.parse_args()
    options = (
        *("--block-size", "128", "--max-model-len", "1024", "--max-num-seqs", "32"),
        *("--num-gpu-blocks-override", "400", "--served-model-name", NAME, "--no-enable-prefix-caching"),
    )
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)

        def serve(name: str, device: int, role: str | None = None) -> Server:
            config = None
            if role is not None:
                config = {"kv_connector": "MooncakeConnectorV1", "kv_role": role, "kv_port": 0}
            return engine(
                name,
                arguments.model,
                devices=[device],
                log_dir=folder,
                kv_transfer_config=config,
                emulator=arguments.emulator.split() or None,
                options=options,
            )

        one = serve("one engine", 0)
        prefills = [serve(f"prefill {number}", number, "kv_producer") for number in (1, 2)]
        decodes = [serve(f"decode {number}", number, "kv_consumer") for number in (3, 4)]
        fronts = [
            router(prefills, decodes, folder),
            router(prefills, decodes, folder, name="router --early", options=["--early"]),
        ]
        with running([one, *prefills, *decodes, *fronts]):
            results = measure(one, fronts, decodes, arguments.model, arguments.rounds, folder)
    for result in results:
        print(json.dumps(result), flush=True)
    Chart(
        title="Two prefill and two decode engines against one engine",
        unit="times what stands in the case",
        series=("behind the router",),
        groups={str(result["case"]): (float(str(result["ratio"])),) for result in results},
        goals={"goal": 1.0},
    ).save(arguments.plot)


if __name__ == "__main__":
    main()
