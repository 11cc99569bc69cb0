# SPDX-License-Identifier: Apache-2.0
"""`vllm serve` processes on emulated devices, the real router, the recall model: one start, many tests."""

import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from prometheus_client.parser import text_string_to_metric_families
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


def prefilled(prefill: Server, question: Question) -> dict[str, Any]:
    """Have the prompt computed and held: the `kv_transfer_params` that a router hands to a decode engine."""
    ask = {"do_remote_decode": True, "do_remote_prefill": False}
    answer = prefill.post("/v1/completions", body(question, max_tokens=1, kv_transfer_params=ask))
    params: dict[str, Any] = answer["kv_transfer_params"]
    return params


def hand_over(prefill: Server, decode: Server, question: Question, **more: Any) -> dict[str, Any]:
    """What the router does, for one pair of engines: the answer of `decode`."""
    return complete(decode, question, kv_transfer_params=prefilled(prefill, question), **more)


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


def blocks_in_use(server: Server, num_blocks: int = NUM_BLOCKS) -> float:
    """Blocks that requests of the server hold now, by its own metric; `num_blocks`: how many it has."""
    return round(metric(server, "vllm:kv_cache_usage_perc") * (num_blocks - 1), 3)


def metric(server: Server, name: str, **labels: str) -> float:
    """What the server's /metrics shows under `name`, summed over the samples that have these labels."""
    shown = httpx.get(f"{server.url}/metrics", timeout=30).text.splitlines()
    values = [
        sample.value
        for family in text_string_to_metric_families("\n".join(filter(re.compile(name).match, shown)))
        for sample in family.samples
        if sample.name == name and labels.items() <= sample.labels.items()
    ]
    if not values:
        raise AssertionError(f"{server.name} shows no {name} with {labels}")
    return sum(values)


def wait_until(reached: Callable[[], bool], complaint: Callable[[], str], patience_s: float = 10) -> None:
    """Return once `reached()`; fail with `complaint()` when that takes longer."""
    deadline = time.monotonic() + patience_s
    while not reached():
        assert time.monotonic() < deadline, complaint()
        time.sleep(0.05)


def wait_for(server: Server, name: str, value: float, **labels: str) -> None:
    """Wait until the metric has this value."""
    wait_until(
        lambda: metric(server, name, **labels) == value,
        lambda: f"{server.name}: {name} is {metric(server, name, **labels)}, not {value}",
    )


def same_table_other_order(question: Question, after_tokens: int) -> Question:
    """The same pairs in another order from `after_tokens` on: same answer, other KV there."""
    words = question.prompt.split()
    kept, moved, start = words[:after_tokens], words[after_tokens:-1], words[-1:]
    assert len(moved) % 2 == 0
    return Question(" ".join(kept + moved[2:] + moved[:2] + start), question.answer, ())
