# SPDX-License-Identifier: Apache-2.0
"""The regroup on the device at hand, out of staging memory and in place, against a copy of the same bytes.

    python -m vllm_ascend.emulator --devices 1 python tests/benchmarks/regroup.py

A rank of 8 KV heads of 128 elements in bfloat16 gets 2,048 tokens from 2, 4 and 8 sources, into pages
scattered over a cache twice as large. Every case is first checked bit by bit against plain indexing. The ways
take turns, layer by layer, and of each layer the least time counts: what else runs on the machine only adds.
Prints one JSON object per case
and draws them into docs/.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch_npu
from cases import HEAD_SIZE, HEADS, Case, cases
from plot import Chart

from vllm_ascend.kv_transfer.blocks import neighbours
from vllm_ascend.kv_transfer.place import PerLayer
from vllm_ascend.kv_transfer.plan import share_positions
from vllm_ascend.kv_transfer.regroup import LONGEST_RUN, Regroup

ROUNDS = 30
GOAL = 1.5
"""Times one copy of the same bytes."""

DEVICE = torch.device("npu", 0)


def measure(case: Case) -> dict[str, object]:
    staged = torch.randint(-128, 128, case.staged_shape, dtype=torch.int8).to(DEVICE)
    view = (2 * case.num_pages, HEADS, case.block_size, 2 * HEAD_SIZE)
    layers = [torch.zeros(view, dtype=torch.bfloat16, device=DEVICE) for _ in range(case.num_layers)]
    local = np.random.default_rng(0).permutation(2 * case.num_pages)[: case.num_pages]
    placing = PerLayer(layers)
    target = placing.target(local, case.shares)
    runs = neighbours(local, local, 1, LONGEST_RUN)
    copied = torch.empty_like(staged)

    placing.place(staged, 0, target)
    rows = 2 * case.block_size
    for layer, pieces in zip(layers, staged, strict=True):
        by_row = layer.cpu().view(torch.int8).view(2 * case.num_pages, rows, case.shares, -1)[local]
        by_share = pieces.cpu().view(case.shares, case.num_pages, rows, -1)
        for share in range(case.shares):
            assert torch.equal(by_row[:, :, share], by_share[share]), case.name

    def by_operators(layer: int) -> None:
        Regroup(layers[layer : layer + 1]).run(runs.local(), share_positions(runs, case.shares), runs.length)

    copy, of_staged, of_operators = least_s(
        case.num_layers,
        lambda layer: copied[layer].copy_(staged[layer]),
        lambda layer: placing.place(staged[layer : layer + 1], layer, target),
        by_operators,
    )
    return {
        "benchmark": "regroup",
        "case": case.name,
        "ratio": round(of_staged / copy, 2),
        "operators_ratio": round(of_operators / copy, 2),
        "staged_to_operators": round(of_staged / of_operators, 3),
        "copy_ms": round(copy * 1000, 2),
        "bytes": staged.numel(),
        "device": torch_npu.npu.get_device_name(),
    }


def least_s(num_layers: int, *ways: Callable[[int], object]) -> list[float]:
    """The least time of each way for each layer, summed over layers; the first turn does not count."""
    taken = np.full((len(ways), num_layers, ROUNDS), np.inf)
    for turn, way, layer in itertools.product(range(1 + ROUNDS), range(len(ways)), range(num_layers)):
        begin = time.perf_counter()
        ways[way](layer)
        torch_npu.npu.synchronize()
        if turn:
            taken[way, layer, turn - 1] = time.perf_counter() - begin
    return [float(seconds) for seconds in taken.min(axis=2).sum(axis=1)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    plot = Path(__file__).parents[2] / "docs" / "regroup.svg"
    parser.add_argument("--plot", type=Path, default=plot, help="where to draw the result")
    parser.add_argument("--layers", type=int, default=8, help="layers of the cache")
    arguments = parser.parse_args()
    torch_npu.npu.set_device(DEVICE)
    results = []
    for case in cases([arguments.layers]):
        results.append(measure(case))
        print(json.dumps(results[-1]), flush=True)
    Chart(
        title="Regroup of 2,048 tokens, 8 heads × 128, bf16, on the emulated device",
        unit="times one copy of the same bytes",
        series=("from staging memory", "three operators per layer"),
        groups={str(r["case"]): (r["ratio"], r["operators_ratio"]) for r in results},
        goals={"goal": GOAL},
    ).save(arguments.plot)


if __name__ == "__main__":
    main()
