# SPDX-License-Identifier: Apache-2.0
"""Head-major pages between engines of one and of two ranks, both ways: a descriptor per block and source."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from disaggregated.fleet import HEAD_MAJOR, MODEL, connector, engine_options, hand_over, text_of
from recall import make_question
from servers import Server, engine, running

BLOCK_SIZE = 64


@pytest.fixture(scope="module")
def engines(log_dir: Path) -> Iterator[dict[int, Server]]:
    """By tensor-parallel size; each hands out and pulls."""
    servers = {
        tp_size: engine(
            f"tp-{tp_size}",
            MODEL,
            devices=devices,
            log_dir=log_dir,
            kv_transfer_config=connector("kv_both"),
            options=(
                *engine_options(BLOCK_SIZE),
                *HEAD_MAJOR,
            ),
        )
        for tp_size, devices in ((1, [0]), (2, [1, 2]))
    }
    with running(list(servers.values())):
        yield servers


@pytest.mark.parametrize(
    ("prefill", "decode"),
    [pytest.param(2, 1, id="prefill TP 2, decode TP 1"), pytest.param(1, 2, id="prefill TP 1, decode TP 2")],
)
@pytest.mark.parametrize("num_prompt_tokens", [17, 65, 300, 512])
def test_answers_are_right(engines: dict[int, Server], prefill: int, decode: int, num_prompt_tokens: int):
    question = make_question(30_000 * prefill + num_prompt_tokens, num_prompt_tokens, num_answer_tokens=16)
    answer = hand_over(engines[prefill], engines[decode], question)
    assert question.accepts(text_of(answer)), f"{text_of(answer)!r} is not {question.answer!r}"
    transfer = answer["kv_transfer_params"]
    assert transfer["tokens"] == num_prompt_tokens - 1
    # Two ranks are read, or two read.
    assert transfer["descriptors"] == 2 * transfer["blocks"]
