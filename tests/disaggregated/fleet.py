# SPDX-License-Identifier: Apache-2.0
"""`vllm serve` processes on emulated devices, the real router, the recall model: one start, many tests."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from recall import Question
from servers import Server, engine, router, running

MODEL = Path(__file__).parents[2] / "examples" / "recall_model"
MODEL_NAME = "recall"
NUM_BLOCKS = 80


def connector(role: str, **more: Any) -> dict[str, Any]:
    """A `--kv-transfer-config` on any free port."""
    return {"kv_connector": "MooncakeConnectorV1", "kv_role": role, "kv_port": 0} | more


def engine_options(block_size: int) -> tuple[str, ...]:
    return (
        *("--block-size", str(block_size), "--max-model-len", "1024"),
        *("--num-gpu-blocks-override", str(NUM_BLOCKS), "--max-num-seqs", "16"),
        *("--served-model-name", MODEL_NAME),
    )


@dataclass(frozen=True)
class Fleet:
    """A prefill engine, a decode engine, the router before them, and one ordinary engine to compare with."""

    model: Path
    block_size: int
    prefill: Server
    decode: Server
    front: Server
    ordinary: Server

    @property
    def servers(self) -> list[Server]:
        return [self.prefill, self.decode, self.ordinary, self.front]


def start_fleet(
    log_dir: Path, prefill_tp: int, decode_tp: int, block_size: int, model: Path = MODEL
) -> Iterator[Fleet]:
    """Start a fleet, yield it, stop every process of it."""
    options = engine_options(block_size)
    log_dir = log_dir / f"tp-{prefill_tp}-to-{decode_tp}"
    log_dir.mkdir()

    def serve(name: str, devices: Sequence[int], role: str | None = None) -> Server:
        config = None if role is None else connector(role)
        return engine(
            name, model, devices=devices, log_dir=log_dir, kv_transfer_config=config, options=options
        )

    prefill = serve("prefill", range(prefill_tp), "kv_producer")
    decode = serve("decode", range(prefill_tp, prefill_tp + decode_tp), "kv_consumer")
    ordinary = serve("ordinary", [7])
    fleet = Fleet(model, block_size, prefill, decode, router([prefill], [decode], log_dir), ordinary)
    with running(fleet.servers):
        yield fleet


def complete(server: Server, question: Question, **more: Any) -> dict[str, Any]:
    """The server's answer to a question, greedy, to its full length."""
    return server.post("/v1/completions", body(question, **more))


def hand_over(prefill: Server, decode: Server, question: Question) -> dict[str, Any]:
    """What the router does, for one pair of engines: the answer of `decode`."""
    ask = {"do_remote_decode": True, "do_remote_prefill": False}
    prefilled = prefill.post("/v1/completions", body(question, max_tokens=1, kv_transfer_params=ask))
    return complete(decode, question, kv_transfer_params=prefilled["kv_transfer_params"])


def body(question: Question, **more: Any) -> dict[str, Any]:
    return {
        "model": MODEL_NAME,
        "prompt": question.prompt,
        "max_tokens": question.num_answer_tokens,
        "temperature": 0,
        "ignore_eos": True,
    } | more


def text_of(answer: dict[str, Any]) -> str:
    text: str = answer["choices"][0]["text"]
    return text


def blocks_in_use(server: Server) -> float:
    """Blocks that requests of the server hold now, by its own metric."""
    for line in httpx.get(f"{server.url}/metrics").text.splitlines():
        if line.startswith("vllm:kv_cache_usage_perc"):
            return round(float(line.split()[-1]) * (NUM_BLOCKS - 1), 3)
    raise AssertionError(f"{server.name} shows no vllm:kv_cache_usage_perc")
