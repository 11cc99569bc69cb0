# SPDX-License-Identifier: Apache-2.0
"""Two small engines that hand each other KV, and a router: with a secret, with checksums, with long leases.

The leases outlive every test. So blocks that are free again were given back in words, not by a lease's end.
"""

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from disaggregated.fleet import (
    MODEL,
    MODEL_NAME,
    TASK_QUEUE,
    blocks_in_use,
    body,
    connector,
    hand_over,
    text_of,
    wait_until,
)
from recall import Question, make_question
from servers import Server, engine, router, running

SECRET = "3c0f1d7e5a944b6cbd2b7d6c0d1a2f53"
BLOCK_SIZE = 16
LEASE_S = 300.0
MAX_RUNNING, MAX_REQUESTS = 3, 32
"""Of the decode engine: requests in a step, and requests altogether."""
DECODE_MAX_TOKENS = 496
"""Of a prompt and its answer together on the decode engine, where they fill half the blocks."""

OPTIONS = {"lease_s": LEASE_S, "verify": True, "peer_timeout_s": 3}


_SEEDS = itertools.count(40_000)


def new_question(num_prompt_tokens: int, num_answer_tokens: int = 8) -> Question:
    """A question that no engine has seen, so that no prefix of it is there already."""
    return make_question(next(_SEEDS), num_prompt_tokens, num_answer_tokens)


@contextmanager
def streaming(server: Server, question: Question, **more: Any) -> Iterator[Iterator[str]]:
    """The lines of a streamed answer; the client leaves with the context."""
    with httpx.stream(
        "POST", f"{server.url}/v1/completions", json=body(question, stream=True, **more), timeout=60
    ) as answer:
        yield answer.iter_lines()


@dataclass(frozen=True)
class Pair:
    """Either engine hands out KV and pulls it, so that each failure policy is met."""

    prefill: Server
    """Has room; fails a request whose KV cannot be loaded."""
    decode: Server
    """Has little room; computes the prompt of a request whose KV cannot be loaded."""
    front: Server
    """The router from `prefill` to `decode`."""
    num_blocks: tuple[int, int] = (160, 64)
    """Of `prefill` and of `decode`."""

    def held(self) -> dict[str, float]:
        """Blocks in use, by engine."""
        return {
            server.name: blocks_in_use(server, num_blocks)
            for server, num_blocks in zip((self.prefill, self.decode), self.num_blocks, strict=True)
        }

    def wait_until_free(self, patience_s: float = 10) -> None:
        """Wait until neither engine holds a block."""
        wait_until(lambda: not any(self.held().values()), lambda: f"still held: {self.held()}", patience_s)

    def check_that_it_works_and_holds_nothing(self) -> None:
        """What must be true after every request, whatever became of it."""
        self.wait_until_free()
        question = new_question(50)
        answer = hand_over(self.prefill, self.decode, question)
        assert question.accepts(text_of(answer))
        assert answer["kv_transfer_params"]["tokens"] == 49
        self.wait_until_free()


@contextmanager
def running_pair(log_dir: Path) -> Iterator[Pair]:
    """Start the engines and the router; stop them in the end."""

    def serve(name: str, device: int, policy: str, num_blocks: int, max_tokens: int, *more: str) -> Server:
        config: dict[str, Any] = connector(
            "kv_both", kv_load_failure_policy=policy, kv_connector_extra_config=OPTIONS
        )
        options = (
            *("--block-size", str(BLOCK_SIZE), "--num-gpu-blocks-override", str(num_blocks)),
            *("--max-model-len", str(max_tokens), "--served-model-name", MODEL_NAME, *more),
        )
        server = engine(
            name, MODEL, devices=[device], log_dir=log_dir, kv_transfer_config=config, options=options
        )
        server.environment |= TASK_QUEUE | {"VLLM_ASCEND_KV_SECRET": SECRET}
        return server

    limits = ("--max-num-seqs", str(MAX_RUNNING), "--max-num-queued-reqs", str(MAX_REQUESTS))
    prefill = serve("prefill", 0, "fail", 160, 1024)
    decode = serve("decode", 1, "recompute", 64, DECODE_MAX_TOKENS, *limits)
    pair = Pair(prefill, decode, router([prefill], [decode], log_dir))
    servers = [pair.prefill, pair.decode, pair.front]
    with running(servers):
        yield pair
