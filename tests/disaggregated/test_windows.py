# SPDX-License-Identifier: Apache-2.0
"""Full attention beside sliding windows through two engines: right tokens, and only blocks still seen."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from disaggregated.fleet import MODEL_NAME, connector, engine_options
from engine.models import NUM_NEW_TOKENS, RANDOM_MODELS, greedy_tokens, prompts_of
from servers import Server, engine, router, running

NAME, BLOCK_SIZE = "gemma3", 16
# A card's attention takes no float32, in which tokens are compared one for one.
EMULATOR = ("--devices", "8", "--memory", "1GiB", "--allow-fp32")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(NAME)
    RANDOM_MODELS[NAME].save(folder)
    return folder


@pytest.fixture(scope="module")
def front(model: Path, log_dir: Path) -> Iterator[Server]:
    """The router before a prefill engine with two ranks and a decode engine with one."""

    def serve(name: str, devices: list[int], role: str) -> Server:
        options = (*engine_options(BLOCK_SIZE), "--dtype", "float32", "--skip-tokenizer-init")
        options = (*options, "--max-model-len", "384")
        return engine(
            name,
            model,
            devices=devices,
            log_dir=log_dir,
            kv_transfer_config=connector(role),
            emulator=EMULATOR,
            options=options,
        )

    prefill = serve("windowed-prefill", [0, 1], "kv_producer")
    decode = serve("windowed-decode", [2], "kv_consumer")
    front = router([prefill], [decode], log_dir, name="windowed-router")
    with running([prefill, decode, front]):
        yield front


def test_tokens_are_those_of_transformers_and_blocks_those_still_seen(front: Server, model: Path) -> None:
    prompts = [prompt for prompt in prompts_of(NAME) if len(prompt) in (16, 33, 100, 257)]
    answers = [
        front.post(
            "/v1/completions",
            {
                "model": MODEL_NAME,
                "prompt": prompt,
                "max_tokens": NUM_NEW_TOKENS,
                "temperature": 0,
                "ignore_eos": True,
                "return_token_ids": True,
            },
        )
        for prompt in prompts
    ]
    assert [answer["choices"][0]["token_ids"] for answer in answers] == greedy_tokens(model, prompts)
    # Of 15, 32, 99 and 256 tokens all blocks, and twice (windows of 24) those from token 0, 9, 76 and 233 on.
    expected = [1 + 2 * 1, 2 + 2 * 2, 7 + 2 * 3, 16 + 2 * 2]
    assert [answer["kv_transfer_params"]["blocks"] for answer in answers] == expected
