# SPDX-License-Identifier: Apache-2.0
"""Asks engines questions, each with sampling of its own: `-m engine.ask JOBS RESULTS`, as `generate` does."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from engine.generate import start, stop, without_multiprocessing


@dataclass(frozen=True)
class Question:
    prompt: str | list[int]
    sampling: dict[str, Any]
    """For vllm.SamplingParams; `choice` and `regex` are constraints on the text."""
    adapter: str | None = None
    """Folder of a LoRA adapter."""
    priority: int = 0


@dataclass(frozen=True)
class Inquiry:
    """What one engine is asked: batches in turn."""

    model: str
    options: dict[str, Any]
    batches: list[list[Question]]
    port: int | None = None
    """As in generate.Job."""


@dataclass(frozen=True)
class Completion:
    tokens: list[int]
    text: str
    log_probabilities: list[dict[int, float]]
    """Of each token, those that were asked for and its own, by token."""
    finish_reason: str
    stop_reason: int | str | None


@dataclass(frozen=True)
class Reply:
    completions: list[Completion]
    prompt_log_probabilities: list[dict[int, float]]
    """Of every prompt token but the first."""
    first_token_s: float
    """On a clock of the engine."""


@dataclass(frozen=True)
class Report:
    batches: list[list[Reply]]
    drafted: int
    accepted: int
    """Tokens that speculative decoding drafted, and those of them that were kept."""


def report_of(result: Any) -> Report:
    """What `main` wrote for one inquiry."""
    return Report(
        [[_reply_of(reply) for reply in batch] for batch in result["batches"]],
        result["drafted"],
        result["accepted"],
    )


def main(jobs: Path, results: Path) -> None:
    without_multiprocessing()
    results.write_text(json.dumps([asdict(_run(job)) for job in json.loads(jobs.read_text())]))


def _run(job: dict[str, Any]) -> Report:
    inquiry = Inquiry(**job | {"batches": [[Question(**q) for q in batch] for batch in job["batches"]]})
    llm = start(inquiry.model, inquiry.options | {"disable_log_stats": False}, inquiry.port)
    batches = [_ask(llm, batch) for batch in inquiry.batches]
    counters = {metric.name: metric for metric in llm.get_metrics()}
    drafted, accepted = (
        getattr(counters.get(f"vllm:spec_decode_num_{what}_tokens"), "value", 0)
        for what in ("draft", "accepted")
    )
    stop(llm)
    return Report(batches, drafted, accepted)


def _ask(llm: Any, batch: list[Question]) -> list[Reply]:
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest
    from vllm.sampling_params import StructuredOutputsParams

    adapters = sorted({question.adapter for question in batch if question.adapter is not None})
    sampling = []
    for question in batch:
        constraint = {k: v for k, v in question.sampling.items() if k in ("choice", "regex")}
        others = {k: v for k, v in question.sampling.items() if k not in constraint}
        structured = StructuredOutputsParams(**constraint) if constraint else None
        sampling.append(SamplingParams(**others, structured_outputs=structured))
    outputs = llm.generate(
        [q.prompt if isinstance(q.prompt, str) else {"prompt_token_ids": q.prompt} for q in batch],
        sampling,
        use_tqdm=False,
        lora_request=[
            None if q.adapter is None else LoRARequest(q.adapter, 1 + adapters.index(q.adapter), q.adapter)
            for q in batch
        ],
        priority=[question.priority for question in batch],
    )
    return [_reply(output) for output in outputs]


def _reply(request: Any) -> Reply:
    return Reply(
        [
            Completion(
                list(output.token_ids),
                output.text,
                [_values(step) for step in output.logprobs or []],
                output.finish_reason,
                output.stop_reason,
            )
            for output in request.outputs
        ],
        [_values(step) for step in (request.prompt_logprobs or [])[1:]],
        request.metrics.first_token_ts,
    )


def _values(step: Any) -> dict[int, float]:
    return {token: entry.logprob for token, entry in step.items()}


def _reply_of(result: dict[str, Any]) -> Reply:
    return Reply(
        [
            Completion(**c | {"log_probabilities": [_by_token(step) for step in c["log_probabilities"]]})
            for c in result["completions"]
        ],
        [_by_token(step) for step in result["prompt_log_probabilities"]],
        result["first_token_s"],
    )


def _by_token(step: dict[str, float]) -> dict[int, float]:
    return {int(token): value for token, value in step.items()}


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
