# SPDX-License-Identifier: Apache-2.0
"""`vllm bench latency` measures an engine; `vllm bench serve` is in tests/disaggregated, on a server."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from engine.models import RECALL_FOLDER


def test_latency(tmp_path: Path) -> None:
    result = tmp_path / "latency.json"
    done = subprocess.run(
        [
            *(sys.executable, "-m", "vllm.entrypoints.cli.main", "bench", "latency"),
            # It draws token ids below 10000.
            *("--model", RECALL_FOLDER, "--hf-overrides", '{"vocab_size": 10240}', "--load-format", "dummy"),
            *("--skip-tokenizer-init", "--max-model-len", "64", "--num-gpu-blocks-override", "8"),
            *("--input-len", "8", "--output-len", "4", "--batch-size", "2"),
            *("--num-iters-warmup", "1", "--num-iters", "2", "--output-json", result),
        ],
        # Engine and worker in the process of the benchmark: nothing is imported twice.
        env=os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:]
    latencies = json.loads(result.read_text())["latencies"]
    assert len(latencies) == 2
    assert all(latency > 0 for latency in latencies)
