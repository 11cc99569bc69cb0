# SPDX-License-Identifier: Apache-2.0
"""Runs pooling engines one after the other in a process of its own: JOBS and RESULTS are two JSON files.

With PYTHONPATH=tests, `python -m engine.pool JOBS RESULTS` does so; `launch.started` starts it.

A job is a model, options for `vllm.LLM`, a task and prompts. The answer holds what each prompt gave: a list
of numbers, or one for each token.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.generate import start, stop, without_multiprocessing


@dataclass(frozen=True)
class PoolJob:
    model: str
    options: dict[str, Any]
    task: str
    prompts: list[list[int]]
    second_text_from: list[int | None]
    """For each prompt, the token with which its second text begins."""
    port: int | None = None
    """Where the ranks of an engine meet, if it has several; `launch` chooses it."""


def main(jobs: Path, results: Path) -> None:
    without_multiprocessing()
    answers = [run(PoolJob(**job)) for job in json.loads(jobs.read_text())]
    results.write_text(json.dumps(answers))


def run(job: PoolJob) -> list[Any]:
    """Start an engine for the job, ask it everything at once, stop it."""
    from vllm import PoolingParams
    from vllm.config import PoolerConfig

    pooler = PoolerConfig(**job.options["pooler_config"])
    llm = start(job.model, job.options | {"pooler_config": pooler}, job.port)
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
    stop(llm)
    return answers


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
