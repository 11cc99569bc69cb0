# SPDX-License-Identifier: Apache-2.0
"""Asks models that see or hear, in a process of its own: `-m engine.see FOLDER WHOM NAME...`.

Writes a checkpoint FOLDER/NAME for each architecture of `pictures` and `hearing` that is named, has
transformers answer, and engines too if WHOM is `engines`, and writes all to FOLDER/answers.json: by name what
transformers answers (`expected`), and time by time what the engine does (`given`).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from types import ModuleType
from typing import Any

from engine import hearing, pictures
from engine.generate import answer_of, start, stop, without_multiprocessing
from engine.launch import ON_EMULATOR_WITH_FLOAT32, job
from engine.sensing import BLOCK_SIZE, NUM_NEW_TOKENS, Sensing, save

TIMES = 2
"""From the second time on prefixes are cached, those with pictures too."""
_TESTS = Path(__file__).parents[1]
_MODELS: dict[str, Sensing] = {**pictures.SEEING, **hearing.HEARING}


def run(folder: Path, whom: str, names: Sequence[str]) -> dict[str, Any]:
    """Start that process and return what it writes; what it printed is in the error."""
    done = subprocess.run(
        [sys.executable, *ON_EMULATOR_WITH_FLOAT32, "-m", "engine.see", folder, whom, *names],
        env=os.environ | pictures.environment(_TESTS),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-8000:]
    answers: dict[str, Any] = json.loads((folder / "answers.json").read_text())
    return answers


def main(folder: Path, whom: str, names: Sequence[str]) -> None:
    from vllm_ascend.compat import declare_operators_that_torchvision_lacks

    # Before transformers is imported.
    declare_operators_that_torchvision_lacks()
    if whom == "engines":
        without_multiprocessing()
    answers = {}
    for name in names:
        save(name, _MODELS[name], folder / name)
        answers[name] = {
            "expected": expected(name, folder / name),
            "given": given(name, folder / name) if whom == "engines" else [],
        }
    (folder / "answers.json").write_text(json.dumps(answers))


def expected(name: str, folder: Path) -> list[dict[str, Any]]:
    """What transformers generates, greedily, in float32 on the CPU."""
    import torch
    import transformers
    from engine.greedy import greedy

    processor = transformers.AutoProcessor.from_pretrained(folder)
    model = getattr(transformers, name).from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )
    answers = []
    for question in _subject(name).QUESTIONS:
        inputs = _subject(name).inputs(name, processor, question)
        answer = greedy(model, NUM_NEW_TOKENS, **inputs)
        answers.append(
            {
                "num_prompt_tokens": answer.num_prompt_tokens,
                "tokens": answer.tokens,
                "log_probabilities": answer.log_probabilities.tolist(),
            }
        )
    return answers


def given(name: str, folder: Path) -> list[list[dict[str, Any]]]:
    """What an engine generates, time by time."""
    from vllm import SamplingParams

    own = _MODELS[name].options
    usual = job(folder, [], NUM_NEW_TOKENS, dtype="float32", block_size=BLOCK_SIZE, **own)
    llm = start(usual.model, usual.options, usual.port)
    sampling = SamplingParams(temperature=0, max_tokens=NUM_NEW_TOKENS, ignore_eos=True, logprobs=0)
    requests = [_subject(name).request(name, question) for question in _subject(name).QUESTIONS]
    answers = [
        [asdict(answer_of(output)) for output in llm.generate(requests, sampling, use_tqdm=False)]
        for _ in range(TIMES)
    ]
    stop(llm)
    return answers


def _subject(name: str) -> ModuleType:
    """Where the model's questions are."""
    return hearing if name in hearing.HEARING else pictures


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3:])
