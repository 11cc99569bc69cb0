# SPDX-License-Identifier: Apache-2.0
"""Fleets: `vllm serve` processes on emulated devices that one start brings up for many tests.

A fleet is a function that makes its servers, engines and routers; a test names it by `on_fleet`. Starting
takes most of the time, so an engine is both prefill and decode where it can be: every size is there once. A
load that fails is an error everywhere, since an engine that computes the prompt itself would hide it.
"""

import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families
from recall import Question
from servers import Server, engine, free_port, router

MODEL = Path(__file__).parents[2] / "examples" / "recall_model"
MODEL_NAME = "recall"
NUM_BLOCKS = 80
EMULATOR = ("--devices", "16", "--memory", "1GiB")
HEAD_MAJOR = ("--additional-config", '{"kv_cache_layout": "head_major"}')
TASK_QUEUE = {"TASK_QUEUE_ENABLE": "1"}
"""torch_npu's default, for engines that shall have it; `engine()` does without, to spare cores."""


@dataclass(frozen=True)
class Fleet:
    """Running servers, by name."""

    folder: Path
    """Their logs, and models that were made for them."""
    servers: dict[str, Server]

    def __getitem__(self, name: str) -> Server:
        return self.servers[name]


def on_fleet(make: Callable[[Path], list[Server]]) -> pytest.MarkDecorator:
    """A test is given, as `fleet`, what `make` returns for a folder, running."""
    return pytest.mark.parametrize("fleet", [make], indirect=True, scope="package", ids=[make.__name__])


def recall_fleet(folder: Path) -> list[Server]:
    """The recall model in every size, each engine feeding each; and one that serves something else."""
    # Of the other layout, too, so that whoever feeds it or is fed by it converts.
    in_stages = ("--pipeline-parallel-size", "2", *HEAD_MAJOR)
    # vLLM would start an API server for each rank. Sizes as deployments of earlier releases give them.
    replicated = ("--data-parallel-size", "2", "--api-server-count", "1", "--served-model-name", "other")
    sizes = {"prefill": {"tp_size": 1, "dp_size": 2}}
    one = member("one", folder, [0])
    two = member("two", folder, [1, 2])
    # A block at a time, so that long prompts are read while they are computed.
    chunks = ("--max-num-batched-tokens", "128")
    four = member("four", folder, [3, 4, 5, 6], role="kv_producer", options=chunks)
    ranks = {"kv_port": free_port(), "kv_connector_extra_config": sizes}
    return [
        *(one, two, four),
        member("staged", folder, [7, 8], block_size=64, tp_size=1, options=in_stages),
        member("replicated", folder, [9, 10], tp_size=1, options=replicated, **ranks),
        router([two], [one], folder, name="two-to-one"),
        router([four], [two], folder, name="four-to-two"),
        router([four], [two], folder, name="four-to-two, early", options=["--early"]),
    ]


def member(
    name: str,
    folder: Path,
    devices: Sequence[int],
    *,
    role: str = "kv_both",
    block_size: int = 128,
    model: Path = MODEL,
    tp_size: int | None = None,
    options: Sequence[str] = (),
    emulator: Sequence[str] = EMULATOR,
    **transfer: Any,
) -> Server:
    """An engine of a fleet; `transfer` goes to its `--kv-transfer-config`."""
    return engine(
        name,
        model,
        devices=devices,
        tp_size=tp_size,
        log_dir=folder,
        kv_transfer_config=connector(role, kv_load_failure_policy="fail", **transfer),
        emulator=emulator,
        options=(*engine_options(block_size), *options),
    )


def connector(role: str, **more: Any) -> dict[str, Any]:
    """A `--kv-transfer-config` on any free port."""
    return {"kv_connector": "MooncakeConnectorV1", "kv_role": role, "kv_port": 0} | more


def engine_options(block_size: int) -> tuple[str, ...]:
    return (
        *("--block-size", str(block_size), "--max-model-len", "1024"),
        *("--num-gpu-blocks-override", str(NUM_BLOCKS), "--max-num-seqs", "16"),
        *("--served-model-name", MODEL_NAME),
    )


def complete(server: Server, question: Question, **more: Any) -> dict[str, Any]:
    """The server's answer to a question, greedy, to its full length."""
    return server.post("/v1/completions", body(question, **more))


def prefilled(prefill: Server, question: Question, **more: Any) -> dict[str, Any]:
    """Have the prompt computed and held: the `kv_transfer_params` that a router hands to a decode engine."""
    ask = {"do_remote_decode": True, "do_remote_prefill": False}
    answer = complete(prefill, question, max_tokens=1, kv_transfer_params=ask, **more)
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


def log_probabilities_of(answer: dict[str, Any]) -> list[float]:
    """Of an answer that was asked with `logprobs=0`: those of its tokens."""
    numbers: list[float] = answer["choices"][0]["logprobs"]["token_logprobs"]
    return numbers


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
