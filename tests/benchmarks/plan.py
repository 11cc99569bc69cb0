# SPDX-License-Identifier: Apache-2.0
"""What a plan costs: 131,072 tokens of 61 layers, read by a rank of TP 4 from a prefill engine of TP 16.

`python tests/benchmarks/plan.py` prints a JSON object per case. `ratio` is the time of the case over the time
of copying the descriptors that come out (three arrays of `descriptors` integers), both the least of many
runs on this machine. What is done for each request and rank, by a thread that reads, is to find the runs,
spread the plan over them, and prove it: "repeated". "first" is that and the plan of the pair of engines, made
once.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable, Iterator, Sequence

from vllm_ascend.attention.cache_layout import PageLayout
from vllm_ascend.kv_transfer.blocks import Blocks, runs_of
from vllm_ascend.kv_transfer.cover import prove_cover
from vllm_ascend.kv_transfer.plan import PairPlan, RankMemory, plan_pair
from vllm_ascend.kv_transfer.topology import Span, heads_on
from vllm_ascend.kv_transfer.transport import Address, Copies

NUM_TOKENS, BLOCK_SIZE, LAYERS = 131_072, 128, 61
PREFILL_TP, DECODE_TP = 16, 4
NUM_BLOCKS = NUM_TOKENS // BLOCK_SIZE
LONGEST_RUN = 64
RUNS, SECONDS = 5, 1.0

GROUPED = PageLayout(BLOCK_SIZE, 16, head_size=128, itemsize_bytes=2)
LATENT = PageLayout(BLOCK_SIZE, 1, head_size=576, itemsize_bytes=2, planes=1)


def ranks(page: PageLayout, tp_size: int) -> list[RankMemory]:
    """Every rank of an engine that has twice the blocks of the prompt."""
    memories = []
    for rank in range(tp_size):
        heads = heads_on(rank, tp_size, page.num_heads)
        own = page.of_size(BLOCK_SIZE, len(heads))
        layer_bytes = 2 * NUM_BLOCKS * own.page_bytes
        addresses = tuple(Address((rank * LAYERS + layer) * layer_bytes) for layer in range(LAYERS))
        names = tuple(f"model.layers.{layer}" for layer in range(LAYERS))
        memories.append(RankMemory(heads, own, 2 * NUM_BLOCKS, names, addresses))
    return memories


def blocks_in_a_row() -> list[int]:
    return list(range(NUM_BLOCKS))


def blocks_anywhere() -> list[int]:
    return random.Random(0).sample(range(2 * NUM_BLOCKS), NUM_BLOCKS)


def plan_request(plan: PairPlan, remote: Sequence[int], local: Sequence[int]) -> list[Copies]:
    """What a reader thread does before it reads; the ranges of each source."""
    there, here = Blocks(remote, BLOCK_SIZE, BLOCK_SIZE), Blocks(local, BLOCK_SIZE, BLOCK_SIZE)
    longest = LONGEST_RUN if plan.shares > 1 else plan.local.num_blocks
    runs = runs_of(Span(0, NUM_TOKENS), there, here, longest)
    copies = [part for _, part in plan.copies(runs)]
    prove_cover(plan.local, runs, copies)
    return copies


def copied(ranges: Sequence[Copies]) -> list[Copies]:
    return [Copies(part.remote.copy(), part.local.copy(), part.num_bytes.copy()) for part in ranges]


def least_s(work: Callable[[], object]) -> float:
    """The shortest of at least RUNS runs, and of as many as SECONDS allow."""
    shortest, end = float("inf"), time.perf_counter() + SECONDS
    count = 0
    while count < RUNS or time.perf_counter() < end:
        start = time.perf_counter()
        work()
        shortest = min(shortest, time.perf_counter() - start)
        count += 1
    return shortest


def results() -> Iterator[dict[str, object]]:
    row = blocks_in_a_row()
    for kind, page in (("16 KV heads", GROUPED), ("latents", LATENT)):
        prefill, (decode, *_) = ranks(page, PREFILL_TP), ranks(page, DECODE_TP)
        plan = plan_pair(decode, prefill, turn=0)
        for where, blocks in (("in a row", row), ("anywhere", blocks_anywhere())):
            ranges = plan_request(plan, blocks, row)
            copy_s = least_s(lambda r=ranges: copied(r))
            ways = {
                "first": lambda d=decode, p=prefill, b=blocks: plan_request(plan_pair(d, p, turn=0), b, row),
                "repeated": lambda p=plan, b=blocks: plan_request(p, b, row),
            }
            for way, work in ways.items():
                seconds = least_s(work)
                yield {
                    "case": f"{kind}, blocks {where}, {way}",
                    "ratio": round(seconds / copy_s, 1),
                    "ms": round(seconds * 1000, 2),
                    "descriptors": sum(map(len, ranges)),
                }


if __name__ == "__main__":
    for result in results():
        print(json.dumps({"benchmark": "plan"} | result))
