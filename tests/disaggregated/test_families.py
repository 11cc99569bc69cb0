# SPDX-License-Identifier: Apache-2.0
"""Families of models through prefill TP 2 and decode TP 1 answer as one engine and as transformers do.

Each row is an architecture of `engine.families`, in float32. The one engine to compare with is the decode
engine itself, asked without a transfer and under a cache salt of its own: so it computes the prompt.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from disaggregated.fleet import MODEL_NAME, connector, engine_options
from engine.families import FAMILIES, LOG_PROBABILITY_TOLERANCE, NUM_NEW_TOKENS, Reference, reference
from engine.models import random_prompts
from servers import Server, engine, running

# A card's attention takes no float32, in which tokens are compared one for one.
EMULATOR = ("--devices", "3", "--memory", "1GiB", "--allow-fp32")
PROMPTS = random_prompts((16, 33, 100, 257))
MAX_TOKENS = 384
BATCHED_TOKENS = 96
"""Per step: fewer than the longer prompts have, so that prefill computes those in chunks."""


@dataclass(frozen=True)
class Row:
    architecture: str
    block_size: int
    blocks: list[int]
    """That decode pulls for each of PROMPTS, which is all but its last token."""
    prefill_options: tuple[str, ...] = ()


ROWS = [
    pytest.param(
        Row("Qwen3MoeForCausalLM", 16, [1, 2, 7, 16], ("--enable-expert-parallel",)),
        id="experts behind grouped-query attention, each on one of two prefill ranks",
    ),
    pytest.param(
        # One layer in three sees all; two, in blocks of their own, see 24 tokens: those from 0, 9, 76 and 233
        # on.
        Row("GptOssForCausalLM", 16, [1 + 2 * 1, 2 + 2 * 2, 7 + 2 * 3, 16 + 2 * 2]),
        id="experts, attention sinks, windows beside full attention",
    ),
]


@dataclass(frozen=True)
class Pair:
    row: Row
    folder: Path
    prefill: Server
    decode: Server


@dataclass(frozen=True)
class Answer:
    tokens: list[int]
    log_probabilities: list[float]
    transfer: dict[str, Any] | None
    """What decode says it pulled."""


@pytest.fixture(scope="module", params=ROWS)
def pair(request: pytest.FixtureRequest, log_dir: Path) -> Iterator[Pair]:
    row: Row = request.param
    folder = log_dir / row.architecture
    FAMILIES[row.architecture].tiny.save(folder)

    def serve(name: str, devices: list[int], role: str, *more: str) -> Server:
        options = (
            *engine_options(row.block_size),
            *("--dtype", "float32", "--skip-tokenizer-init", "--max-model-len", str(MAX_TOKENS)),
            *("--max-num-batched-tokens", str(BATCHED_TOKENS), *more),
        )
        return engine(
            f"{row.architecture}-{name}",
            folder,
            devices=devices,
            log_dir=log_dir,
            kv_transfer_config=connector(role),
            emulator=EMULATOR,
            options=options,
        )

    prefill = serve("prefill", [0, 1], "kv_producer", *row.prefill_options)
    decode = serve("decode", [2], "kv_consumer")
    with running([prefill, decode]):
        yield Pair(row, folder, prefill, decode)


@pytest.fixture(scope="module")
def of_two_engines(pair: Pair) -> list[Answer]:
    """Of each prompt: held by prefill, pulled and continued by decode."""
    ask = {"do_remote_decode": True, "do_remote_prefill": False}
    answers = []
    for prompt in PROMPTS:
        held = post(pair.prefill, prompt, max_tokens=1, kv_transfer_params=ask)["kv_transfer_params"]
        answers.append(answer_of(post(pair.decode, prompt, kv_transfer_params=held)))
    return answers


@pytest.fixture(scope="module")
def of_one_engine(pair: Pair) -> list[Answer]:
    return [answer_of(post(pair.decode, prompt, cache_salt="one engine")) for prompt in PROMPTS]


@pytest.fixture(scope="module")
def of_transformers(pair: Pair) -> Reference:
    return reference(pair.folder, PROMPTS)


def post(server: Server, prompt: list[int], **more: Any) -> dict[str, Any]:
    return server.post(
        "/v1/completions",
        {
            "model": MODEL_NAME,
            "prompt": prompt,
            "max_tokens": NUM_NEW_TOKENS,
            "temperature": 0,
            "ignore_eos": True,
            "logprobs": 0,
            "return_token_ids": True,
            "return_tokens_as_token_ids": True,
        }
        | more,
    )


def answer_of(reply: dict[str, Any]) -> Answer:
    (choice,) = reply["choices"]
    return Answer(
        choice["token_ids"], choice["logprobs"]["token_logprobs"], reply.get("kv_transfer_params") or None
    )


def test_tokens_are_those_of_one_engine_and_of_transformers(
    of_two_engines: list[Answer], of_one_engine: list[Answer], of_transformers: Reference
) -> None:
    tokens = [answer.tokens for answer in of_two_engines]
    assert len({tuple(output) for output in tokens}) == len(PROMPTS), "every prompt has an answer of its own"
    assert tokens == [answer.tokens for answer in of_one_engine]
    assert tokens == of_transformers.tokens


def test_log_probabilities_are_those_of_one_engine_and_of_transformers(
    of_two_engines: list[Answer], of_one_engine: list[Answer], of_transformers: Reference
) -> None:
    expected = of_transformers.log_probabilities.tolist()
    for ours, one, theirs in zip(of_two_engines, of_one_engine, expected, strict=True):
        assert ours.log_probabilities == pytest.approx(one.log_probabilities, abs=LOG_PROBABILITY_TOLERANCE)
        assert ours.log_probabilities == pytest.approx(theirs, abs=LOG_PROBABILITY_TOLERANCE)


def test_all_but_the_last_token_is_pulled_in_blocks_still_seen(
    pair: Pair, of_two_engines: list[Answer], of_one_engine: list[Answer]
) -> None:
    transfers = [answer.transfer for answer in of_two_engines]
    assert all(transfers)
    assert [transfer["tokens"] for transfer in transfers if transfer] == [len(p) - 1 for p in PROMPTS]
    assert [transfer["blocks"] for transfer in transfers if transfer] == pair.row.blocks
    assert not any(answer.transfer for answer in of_one_engine), "one engine computes its prompts"
