# SPDX-License-Identifier: Apache-2.0
"""Full attention beside sliding windows through two engines: right tokens, and only blocks still seen."""

from pathlib import Path

from disaggregated.fleet import MODEL_NAME, Fleet, member, on_fleet
from engine.models import NUM_NEW_TOKENS, RANDOM_MODELS, greedy_tokens, prompts_of
from servers import Server, router

NAME, BLOCK_SIZE = "gemma3", 16
# A card's attention takes no float32, in which tokens are compared one for one.
EMULATOR = ("--devices", "8", "--memory", "1GiB", "--allow-fp32")


def windowed_fleet(folder: Path) -> list[Server]:
    """The router before a prefill engine with two ranks and a decode engine with one."""
    RANDOM_MODELS[NAME].save(folder / NAME)

    def serve(name: str, devices: list[int], role: str) -> Server:
        options = ("--dtype", "float32", "--skip-tokenizer-init", "--max-model-len", "384")
        return member(
            name,
            folder,
            devices,
            role=role,
            block_size=BLOCK_SIZE,
            model=folder / NAME,
            options=options,
            emulator=EMULATOR,
        )

    prefill, decode = serve("prefill", [0, 1], "kv_producer"), serve("decode", [2], "kv_consumer")
    return [prefill, decode, router([prefill], [decode], folder)]


pytestmark = on_fleet(windowed_fleet)


def test_tokens_are_those_of_transformers_and_blocks_those_still_seen(fleet: Fleet) -> None:
    prompts = [prompt for prompt in prompts_of(NAME) if len(prompt) in (16, 33, 100, 257)]
    answers = [
        fleet["router"].post(
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
    assert [answer["choices"][0]["token_ids"] for answer in answers] == greedy_tokens(
        fleet.folder / NAME, prompts
    )
    # Of 15, 32, 99 and 256 tokens all blocks, and twice (windows of 24) those from token 0, 9, 76 and 233 on.
    expected_blocks = [1 + 2 * 1, 2 + 2 * 2, 7 + 2 * 3, 16 + 2 * 2]
    assert [answer["kv_transfer_params"]["blocks"] for answer in answers] == expected_blocks
