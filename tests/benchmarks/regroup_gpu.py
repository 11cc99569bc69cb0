# SPDX-License-Identifier: Apache-2.0
"""The regroup in one launch on a GPU, against one copy of the same bytes and three operators per layer.

    PYTHONPATH=. python tests/benchmarks/regroup_gpu.py

Wants PyTorch for CUDA and Triton, and nothing of torch_npu or vLLM. A rank of 8 KV heads of 128 elements in
bfloat16 gets 2,048 tokens from 2, 4 and 8 sources, into pages scattered over a cache twice as large. Every
case is first checked bit by bit against plain indexing, over the whole cache. Prints a JSON object per case
and draws them into docs/.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
from cases import HEAD_SIZE, HEADS, Case, cases
from plot import Chart

from vllm_ascend.kv_transfer.place_kernel import OneLaunch

ROUNDS, WARM_UP = 30, 5
GOAL = 1.08
"""Times one copy of the same bytes."""


class Memory:
    """A cache, and staged pieces for half of its pages; both of random bits."""

    def __init__(self, case: Case) -> None:
        self.case = case
        page_shape = (HEADS, case.block_size, 2 * HEAD_SIZE)
        self.layers = [
            _random(2 * case.num_pages * case.page_bytes).view(torch.bfloat16).view(-1, *page_shape)
            for _ in range(case.num_layers)
        ]
        self.staged = _random(math.prod(case.staged_shape)).view(case.staged_shape)
        self.pages = torch.randperm(2 * case.num_pages)[: case.num_pages]
        self.copied = torch.empty_like(self.staged)

    def expected(self) -> list[torch.Tensor]:
        """The layers after a regroup, by plain indexing: a row of a page is a row of every share."""
        case, result = self.case, []
        for layer, pieces in zip(self.layers, self.staged, strict=True):
            rows = 2 * case.block_size
            after = layer.clone().view(torch.int8).view(2 * case.num_pages, rows, case.shares, -1)
            for share in range(case.shares):
                after[self.pages.to("cuda"), :, share] = pieces[share].view(case.num_pages, rows, -1)
            result.append(after.view(layer.shape[0], -1))
        return result


class ThreeOperators:
    """Gather the pieces of a layer, transpose them, scatter them to its pages; once per layer."""

    def __init__(self, memory: Memory) -> None:
        case = memory.case
        piece = (2 * case.block_size, HEADS // case.shares * HEAD_SIZE)
        shape = (case.num_layers, case.shares * case.num_pages, *piece)
        self._pieces = memory.staged.view(torch.bfloat16).view(shape)
        number = torch.arange(case.shares * case.num_pages, device="cuda").view(case.shares, case.num_pages)
        self._order = number.t().reshape(-1)
        self._by_share = torch.empty(case.num_pages, case.shares, *piece, dtype=torch.bfloat16, device="cuda")
        by_token = (case.num_pages, piece[0], case.shares, piece[1])
        self._by_token = torch.empty(by_token, dtype=torch.bfloat16, device="cuda")
        self._layers = [layer.view(len(layer), *by_token[1:]) for layer in memory.layers]
        self._pages = memory.pages.to("cuda")

    def __call__(self) -> None:
        gathered = self._by_share.view(-1, *self._by_share.shape[2:])
        for pieces, layer in zip(self._pieces, self._layers, strict=True):
            torch.index_select(pieces, 0, self._order, out=gathered)
            self._by_token.copy_(self._by_share.transpose(1, 2))
            layer.index_copy_(0, self._pages, self._by_token)


def measure(case: Case) -> dict[str, object]:
    memory = Memory(case)
    one_launch, three_operators = OneLaunch(memory.layers), ThreeOperators(memory)
    target = one_launch.target(memory.pages.numpy(), case.shares)

    def place() -> None:
        one_launch.place(memory.staged, 0, target)

    for way, run in (("one launch", place), ("three operators", three_operators)):
        expected = memory.expected()
        run()
        for layer, after in zip(memory.layers, expected, strict=True):
            assert torch.equal(layer.view(torch.int8).view(len(layer), -1), after), f"{way}: {case.name}"
            layer.view(torch.int8).copy_(_random(layer.numel() * 2).view(layer.view(torch.int8).shape))
    copy, placed, steps = medians_ms(
        lambda: memory.copied.copy_(memory.staged),
        place,
        three_operators,
    )
    return {
        "benchmark": "regroup_gpu",
        "case": case.name,
        "ratio": round(placed / copy, 3),
        "three_operators_ratio": round(steps / copy, 2),
        "faster_than_three_operators": round(steps / placed, 1),
        "copy_ms": round(copy, 4),
        "copy_gb_per_s": round(2 * memory.staged.numel() / copy / 1e6),
        "bytes": memory.staged.numel(),
        "device": torch.cuda.get_device_name(),
    }


def medians_ms(*ways: Callable[[], object]) -> list[float]:
    """The median time of each way on the device, all ways taking turns."""
    taken: list[list[tuple[torch.cuda.Event, torch.cuda.Event]]] = [[] for _ in ways]
    for _ in range(WARM_UP + ROUNDS):
        for way, events in zip(ways, taken, strict=True):
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            way()
            end.record()
            events.append((begin, end))
    torch.cuda.synchronize()
    return [statistics.median(begin.elapsed_time(end) for begin, end in events[WARM_UP:]) for events in taken]


def _random(num_bytes: int) -> torch.Tensor:
    return torch.randint(-128, 128, (num_bytes,), dtype=torch.int8, device="cuda")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    plot = Path(__file__).parents[2] / "docs" / "regroup_gpu.svg"
    parser.add_argument("--plot", type=Path, default=plot, help="where to draw the result")
    arguments = parser.parse_args()
    results = []
    for case in cases([61, 32]):
        results.append(measure(case))
        print(json.dumps(results[-1]), flush=True)
    Chart(
        title=f"Regroup of 2,048 tokens, 8 heads × 128, bf16, on {torch.cuda.get_device_name()}",
        unit="times one device copy of the same bytes",
        series=("one launch for all layers", "three operators per layer"),
        groups={str(r["case"]): (r["ratio"], r["three_operators_ratio"]) for r in results},
        goals={"goal": GOAL},
    ).save(arguments.plot)


if __name__ == "__main__":
    main()
