# SPDX-License-Identifier: Apache-2.0
"""Engines of every kind that differ, at once: tensor and pipeline parallel, block sizes."""

import json
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
from disaggregated.fleet import MODEL, MODEL_NAME, connector, engine_options, hand_over, text_of
from recall import make_question
from servers import Server, engine, running


@dataclass(frozen=True)
class Engines:
    """Every prefill engine feeds every decode engine."""

    narrow: Server
    """Prefill and decode, TP 1, blocks of 64."""
    staged_prefill: Server
    """Prefill, two pipeline stages, blocks of 128."""
    wide: Server
    """Decode, TP 2, blocks of 64."""
    staged_decode: Server
    """Decode, two pipeline stages, blocks of 128."""


@pytest.fixture(scope="module")
def engines(log_dir: Path) -> Iterator[Engines]:
    in_stages = ("--pipeline-parallel-size", "2")

    def serve(
        name: str, devices: list[int], role: str, block_size: int, tp_size: int, *options: str
    ) -> Server:
        return engine(
            name,
            MODEL,
            devices=devices,
            tp_size=tp_size,
            log_dir=log_dir,
            kv_transfer_config=connector(role),
            options=(*engine_options(block_size), *options),
        )

    narrow = serve("narrow", [0], "kv_both", 64, 1)
    staged_prefill = serve("staged-prefill", [1, 2], "kv_producer", 128, 1, *in_stages)
    wide = serve("wide", [3, 4], "kv_consumer", 64, 2)
    staged_decode = serve("staged-decode", [5, 6], "kv_consumer", 128, 1, *in_stages)
    servers = [narrow, staged_prefill, wide, staged_decode]
    with running(servers):
        yield Engines(*servers)


@pytest.mark.parametrize(
    ("prefill", "decode", "sources"),
    [
        pytest.param("narrow", "wide", [0], id="prefill TP 1, decode TP 2"),
        pytest.param("narrow", "staged_decode", [0], id="stages 1 to 2, blocks of 64 to 128"),
        pytest.param("staged_prefill", "narrow", [0, 1], id="stages 2 to 1, blocks of 128 to 64"),
        pytest.param("staged_prefill", "wide", [0, 1], id="stages 2 to 1, TP 1 to 2, blocks of 128 to 64"),
        pytest.param("staged_prefill", "staged_decode", [0, 1], id="stages 2 to 2"),
    ],
)
@pytest.mark.parametrize("num_prompt_tokens", [17, 65, 129, 300, 512])
def test_answers_are_right(
    engines: Engines, prefill: str, decode: str, sources: list[int], num_prompt_tokens: int
):
    # Of its own, so that no prefix of it is there already.
    seed = sum(map(ord, prefill + decode)) + num_prompt_tokens
    question = make_question(seed, num_prompt_tokens, num_answer_tokens=16)
    answer = hand_over(getattr(engines, prefill), getattr(engines, decode), question)
    assert question.accepts(text_of(answer)), f"{text_of(answer)!r} is not {question.answer!r}"
    assert answer["kv_transfer_params"]["tokens"] == num_prompt_tokens - 1
    assert answer["kv_transfer_params"]["sources"] == sources


def test_one_prefill_engine_feeds_decode_engines_of_different_sizes_at_the_same_time(engines: Engines):
    questions = [make_question(20_000 + i, 60 + 37 * i, num_answer_tokens=12) for i in range(12)]
    prefills, decodes = [engines.narrow] * 12, [engines.wide, engines.staged_decode] * 6
    with ThreadPoolExecutor(len(questions)) as pool:
        answers = [text_of(answer) for answer in pool.map(hand_over, prefills, decodes, questions)]
    assert [question.accepts(answer) for question, answer in zip(questions, answers, strict=True)] == [
        True
    ] * 12


def test_vllm_bench_serve_measures_an_engine(engines: Engines, tmp_path: Path):
    done = subprocess.run(
        [
            *(sys.executable, "-m", "vllm.entrypoints.cli.main", "bench", "serve"),
            *("--base-url", engines.narrow.url, "--model", MODEL_NAME, "--tokenizer", MODEL),
            *("--dataset-name", "random", "--random-input-len", "40", "--random-output-len", "8"),
            *("--num-prompts", "4", "--ignore-eos", "--save-result"),
            *("--result-dir", tmp_path, "--result-filename", "result.json"),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:]
    result = json.loads((tmp_path / "result.json").read_text())
    assert (result["completed"], result["total_output_tokens"]) == (4, 32)
    assert result["mean_ttft_ms"] > 0
