# SPDX-License-Identifier: Apache-2.0
"""A decode step on head-major pages against one on token-major pages.

    python -m vllm_ascend.emulator --devices 1 python tests/benchmarks/decode_layout.py

Two engines in one process, alike but for `kv_cache_layout`, decode the same batch in turn, step by step: of
the recall model of the examples, and of one layer with the shapes of Qwen3-8B and weights that mean nothing.
`ratio` is head-major ÷ token-major, of the medians; `least_ratio` of the least times. Prints one JSON object
per case and draws them into docs/.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from plot import Chart

LAYOUTS = ("token_major", "head_major")
GOAL = 1.05
WARM_UP_STEPS = 4
RECALL = Path(__file__).parents[2] / "examples" / "recall_model"
QWEN3_8B_LAYER = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "num_hidden_layers": 1,
    "vocab_size": 1024,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": True,
    "dtype": "bfloat16",
}


@dataclass(frozen=True)
class Case:
    name: str
    model: Path
    num_requests: int
    context_tokens: int
    """Of the longest; each other has one less than the one before it."""


def measure(case: Case, num_steps: int) -> dict[str, object]:
    from vllm import LLM

    engines = [
        LLM(
            str(case.model),
            skip_tokenizer_init=True,
            load_format="auto" if case.model == RECALL else "dummy",
            max_model_len=1024,
            max_num_seqs=case.num_requests,
            max_num_batched_tokens=case.num_requests * case.context_tokens,
            kv_cache_memory_bytes=256 << 20,
            gpu_memory_utilization=0.3,  # of a device that two engines share
            enable_prefix_caching=False,
            async_scheduling=False,
            additional_config={"kv_cache_layout": layout},
        ).llm_engine
        for layout in LAYOUTS
    ]
    for engine in engines:
        _prefill(engine, case, num_steps)
    taken_s: list[list[float]] = [[] for _ in engines]
    for step in range(WARM_UP_STEPS + num_steps):
        for engine, times in zip(engines, taken_s, strict=True):
            begin = time.perf_counter()
            outputs = engine.step()
            if step >= WARM_UP_STEPS:
                times.append(time.perf_counter() - begin)
            assert len(outputs) == case.num_requests
    for engine in engines:
        engine.engine_core.shutdown()
    token_ms, head_ms = (1000 * statistics.median(times) for times in taken_s)
    return {
        "benchmark": "decode_layout",
        "case": case.name,
        "ratio": round(head_ms / token_ms, 3),
        "least_ratio": round(min(taken_s[1]) / min(taken_s[0]), 3),
        "token_major_ms": round(token_ms, 2),
        "head_major_ms": round(head_ms, 2),
        "steps": num_steps,
    }


def _prefill(engine: object, case: Case, num_steps: int) -> None:
    """Add the batch, and step until each of its requests has its first token."""
    from vllm import SamplingParams
    from vllm.v1.engine.llm_engine import LLMEngine

    assert isinstance(engine, LLMEngine)
    sampling = SamplingParams(
        temperature=0, ignore_eos=True, detokenize=False, max_tokens=WARM_UP_STEPS + num_steps + 2
    )
    for number in range(case.num_requests):
        # Each of a length of its own, as a server's requests are.
        prompt = [(7 * number + token) % 100 for token in range(case.context_tokens - number)]
        engine.add_request(str(number), {"prompt_token_ids": prompt}, sampling)
    while len(engine.step()) < case.num_requests:
        pass


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    plot = Path(__file__).parents[2] / "docs" / "decode_layout.svg"
    parser.add_argument("--plot", type=Path, default=plot, help="where to draw the result")
    parser.add_argument("--steps", type=int, default=40, help="decode steps that count")
    arguments = parser.parse_args()
    # Engine and worker in this process, so that the two can take turns.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    results = []
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(QWEN3_8B_LAYER))
        for case in (
            Case("recall model, 16 requests of 256 tokens", RECALL, 16, 256),
            Case("one layer of Qwen3-8B, 8 requests of 512 tokens", Path(folder), 8, 512),
        ):
            results.append(measure(case, arguments.steps))
            print(json.dumps(results[-1]), flush=True)
    Chart(
        title="A decode step on head-major pages, on the emulated device",
        unit="times a step on token-major pages",
        series=("median", "least"),
        groups={str(r["case"]): (r["ratio"], r["least_ratio"]) for r in results},
        goals={"goal": GOAL},
    ).save(arguments.plot)


if __name__ == "__main__":
    main()
