# SPDX-License-Identifier: Apache-2.0
"""Runs engines one after the other in a process of its own: `-m engine.generate JOBS RESULTS`, JSON files.

A job is a model, options for `vllm.LLM`, and batches of prompts (token ids) that one engine gets in turn. The
answer holds, for each batch and prompt, the tokens, the log-probability of each, and how many prompt tokens
came from the prefix cache.

Jobs with tensor parallelism are run by one such process per rank: every process schedules the same prompts
in the same way, and their workers meet at the job's port. So no job imports vLLM anew.
"""

from __future__ import annotations

import gc
import json
import os
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Job:
    model: str
    options: dict[str, Any]
    batches: list[list[list[int]]]
    num_new_tokens: int
    port: int | None = None
    """Where the ranks of this job meet, each in a process of its own; None if they are not."""


@dataclass(frozen=True)
class Answer:
    tokens: list[int]
    log_probabilities: list[float]
    num_cached_tokens: int


Answers = dict[str, list[list[Answer]]]
"""By model: for each batch of its job, the answer to each prompt."""


def main(jobs: Path, results: Path) -> None:
    without_multiprocessing()
    answers = [run(Job(**job)) for job in json.loads(jobs.read_text())]
    results.write_text(json.dumps([[[asdict(a) for a in batch] for batch in job] for job in answers]))


def run(job: Job) -> list[list[Answer]]:
    """Start an engine for the job, ask it everything, stop it."""
    from vllm import SamplingParams

    llm = start(job.model, job.options | {"skip_tokenizer_init": True}, job.port)
    sampling = SamplingParams(
        temperature=0, max_tokens=job.num_new_tokens, ignore_eos=True, logprobs=0, detokenize=False
    )
    answers = []
    for batch in job.batches:
        prompts = [{"prompt_token_ids": prompt} for prompt in batch]
        answers.append([answer_of(request) for request in llm.generate(prompts, sampling, use_tqdm=False)])
    stop(llm)
    return answers


def without_multiprocessing() -> None:
    """Have engines and their first workers in this process, and import vLLM."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    # Nothing that is imported becomes garbage; looking for it takes a third of the time.
    gc.disable()
    import vllm.v1.worker.gpu_model_runner  # noqa: F401

    gc.enable()


def start(model: str, options: dict[str, Any], port: int | None) -> Any:
    """A vllm.LLM; with a port, this process's rank of it."""
    from vllm import LLM

    if port is not None:
        os.environ["MASTER_PORT"] = str(port)
        options = options | {"distributed_executor_backend": "external_launcher"}
    return LLM(model, **options)


def stop(llm: Any) -> None:
    """End the engine and leave the devices to the next."""
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

    llm.llm_engine.engine_core.shutdown()
    # It collects the garbage too.
    cleanup_dist_env_and_memory()


def answer_of(request: Any) -> Answer:
    """What the engine answered to one request."""
    output = request.outputs[0]
    chosen = [step[token].logprob for step, token in zip(output.logprobs, output.token_ids, strict=True)]
    return Answer(list(output.token_ids), chosen, request.num_cached_tokens)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
