# SPDX-License-Identifier: Apache-2.0
"""A decode engine drafts from the prompt which it pulled: the same words, drafts kept and drafts rejected."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from disaggregated.fleet import MODEL, connector, engine_options, hand_over, metric, text_of
from recall import make_question
from servers import Server, engine, running

NUM_DRAFTS = 3
NGRAM = {
    "method": "ngram",
    "num_speculative_tokens": NUM_DRAFTS,
    "prompt_lookup_min": 1,
    "prompt_lookup_max": 2,
}


@dataclass(frozen=True)
class Pair:
    prefill: Server
    decode: Server

    def counted(self) -> tuple[float, float]:
        """Tokens that decode has drafted so far, and those of them that were kept."""
        drafted, kept = (
            metric(self.decode, f"vllm:spec_decode_num_{what}_tokens_total") for what in ("draft", "accepted")
        )
        return drafted, kept


@pytest.fixture(scope="module")
def pair(log_dir: Path) -> Iterator[Pair]:
    def serve(name: str, devices: list[int], role: str, *more: str) -> Server:
        return engine(
            name,
            MODEL,
            devices=devices,
            log_dir=log_dir,
            kv_transfer_config=connector(role, kv_load_failure_policy="fail"),
            options=(*engine_options(16), *more),
        )

    prefill = serve("prefill", [0, 1], "kv_producer")
    decode = serve("decode", [2], "kv_consumer", "--speculative-config", json.dumps(NGRAM))
    with running([prefill, decode]):
        yield Pair(prefill, decode)


@pytest.mark.parametrize("num_prompt_tokens", [33, 65, 97])
def test_answers_are_right_with_drafts_kept_and_rejected(pair: Pair, num_prompt_tokens: int):
    """An answer that goes round the table again repeats itself, which can be drafted."""
    drafted_before, kept_before = pair.counted()
    once = (num_prompt_tokens - 1) // 2
    question = make_question(9300 + num_prompt_tokens, num_prompt_tokens, num_answer_tokens=once + 16)
    answer = hand_over(pair.prefill, pair.decode, question)
    assert question.accepts(text_of(answer)), f"{text_of(answer)!r} is not {question.answer!r}"
    assert answer["kv_transfer_params"]["tokens"] == num_prompt_tokens - 1
    drafted, kept = pair.counted()
    assert 0 < kept - kept_before < drafted - drafted_before
