# SPDX-License-Identifier: Apache-2.0
"""Runs pooling engines one after the other in a process of its own: `pool.py JOBS RESULTS`, two JSON files.

A job is a model, options for `vllm.LLM`, a task and prompts. The answer holds what each prompt gave: a list
of numbers, or one for each token.
"""

from __future__ import annotations

import gc
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class PoolJob:
    model: str
    options: dict[str, Any]
    task: str
    prompts: list[list[int]]
    second_text_from: list[int | None]
    """For each prompt, the token with which its second text begins."""


def main(jobs: Path, results: Path) -> None:
    # Engine and first worker in this process: nothing is imported twice.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    answers = [run(PoolJob(**job)) for job in json.loads(jobs.read_text())]
    results.write_text(json.dumps(answers))


def run(job: PoolJob) -> list[Any]:
    """Start an engine for the job, ask it everything at once, stop it."""
    from vllm import LLM, PoolingParams
    from vllm.config import PoolerConfig
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

    options = dict(job.options)
    llm = LLM(job.model, pooler_config=PoolerConfig(**options.pop("pooler_config")), **options)
    parameters = [
        PoolingParams(
            use_activation=False,
            extra_kwargs=None if start is None else {"compressed_token_type_ids": start},
        )
        for start in job.second_text_from
    ]
    prompts = [{"prompt_token_ids": prompt} for prompt in job.prompts]
    outputs = llm.encode(prompts, parameters, pooling_task=job.task, use_tqdm=False)
    answers = [output.outputs.data.float().tolist() for output in outputs]
    llm.llm_engine.engine_core.shutdown()
    del llm
    gc.collect()
    cleanup_dist_env_and_memory()
    return answers


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
