# SPDX-License-Identifier: Apache-2.0
"""Engines of every kind that differ, at once: tensor and pipeline parallel, block sizes, layouts."""

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from zlib import crc32

import pytest
from disaggregated.fleet import MODEL, MODEL_NAME, Fleet, hand_over, on_fleet, recall_fleet, text_of
from recall import make_question

pytestmark = on_fleet(recall_fleet)


@pytest.mark.parametrize(
    ("prefill", "decode", "sources"),
    [
        pytest.param("one", "two", [0], id="prefill TP 1, decode TP 2"),
        pytest.param("one", "staged", [0], id="stages 1 to 2, blocks of 128 to 64, token- to head-major"),
        pytest.param("staged", "one", [0, 1], id="stages 2 to 1, blocks of 64 to 128, head- to token-major"),
        pytest.param(
            "staged", "two", [0, 1], id="stages 2 to 1, TP 1 to 2, blocks of 64 to 128, head- to token-major"
        ),
        pytest.param(
            "four",
            "staged",
            [0, 1, 2, 3],
            id="stages 1 to 2, TP 4 to 1, blocks of 128 to 64, token-major pages of one head to head-major",
        ),
    ],
)
@pytest.mark.parametrize("num_prompt_tokens", [17, 65, 129, 300, 512])
def test_answers_are_right(
    fleet: Fleet, prefill: str, decode: str, sources: list[int], num_prompt_tokens: int
):
    # Of its own, so that no prefix of it is there already.
    seed = crc32(f"{prefill} to {decode}".encode()) + num_prompt_tokens
    question = make_question(seed, num_prompt_tokens, num_answer_tokens=16)
    answer = hand_over(fleet[prefill], fleet[decode], question)
    assert question.accepts(text_of(answer)), f"{text_of(answer)!r} is not {question.answer!r}"
    assert answer["kv_transfer_params"]["tokens"] == num_prompt_tokens - 1
    assert answer["kv_transfer_params"]["sources"] == sources


def test_one_prefill_engine_feeds_decode_engines_of_different_sizes_at_the_same_time(fleet: Fleet):
    questions = [make_question(40_000 + i, 60 + 37 * i, num_answer_tokens=12) for i in range(12)]
    prefills, decodes = [fleet["four"]] * 12, [fleet["one"], fleet["two"], fleet["staged"]] * 4
    with ThreadPoolExecutor(len(questions)) as pool:
        answers = [text_of(answer) for answer in pool.map(hand_over, prefills, decodes, questions)]
    assert [question.accepts(answer) for question, answer in zip(questions, answers, strict=True)] == [
        True
    ] * 12


def test_vllm_bench_serve_measures_an_engine(fleet: Fleet, tmp_path: Path):
    done = subprocess.run(
        [
            *(sys.executable, "-m", "vllm.entrypoints.cli.main", "bench", "serve"),
            *("--base-url", fleet["one"].url, "--model", MODEL_NAME, "--tokenizer", MODEL),
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
