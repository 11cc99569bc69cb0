# SPDX-License-Identifier: Apache-2.0
"""Disaggregated serving next to one ordinary engine: the same questions, the same answers, and what it moved.

Starts a prefill engine (tensor parallel 2), a decode engine (tensor parallel 1), the router and one ordinary
engine, all serving the recall model, whose answers only the prompt's KV cache can tell. Asks both sides the
same questions through the OpenAI API, prints each answer with what the decode engine pulled for it, and ends
with one line of verdict. Exit code 0 when every answer agrees and is right, 1 otherwise.
"""

import argparse
import shutil
import signal
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
MODEL = HERE / "recall_model"
sys.path[:0] = [str(HERE / "disaggregated"), str(MODEL)]

from recall import Question, make_question  # noqa: E402  (found through the two folders above)
from servers import Server, ServerFailed, engine, router, running  # noqa: E402

# One block of 128 tokens, its edges, and several blocks with and without a part of one at the end.
PROMPT_TOKENS = (17, 127, 128, 129, 200, 256, 300, 385, 448, 512)
ANSWER_TOKENS = 16
ENGINE_OPTIONS = ("--block-size", "128", "--max-model-len", "1024", "--num-gpu-blocks-override", "64")
PULLED = ("tokens", "blocks", "bytes", "descriptors", "sources", "transfer_ms", "regroup_ms")


@dataclass(frozen=True)
class Outcome:
    """One question, answered by both sides. `pulled`: what the decode engine says of the transfer."""

    question: Question
    disaggregated: str
    ordinary: str
    pulled: dict[str, Any]

    @property
    def verdict(self) -> str:
        if self.disaggregated != self.ordinary:
            return "DIFFERS"
        return "same, right" if self.question.accepts(self.ordinary) else "same, WRONG"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--on-cards", action="store_true", help="use this machine's NPUs, not emulated ones")
    options = parser.parse_args()
    log_dir = Path(tempfile.mkdtemp(prefix="vllm-ascend-quickstart-"))
    servers = _servers(log_dir, on_cards=options.on_cards)
    # Being told to end must stop the servers too: as an exception it ends `running` below.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    prefill, decode, ordinary, front = servers
    print(f"starting {', '.join(server.name for server in servers)}")
    show = _Progress()
    try:
        with running(servers, tell=show):
            show.end("all servers answer")
            outcomes = _ask(front, ordinary)
            print("stopping every process")
    except ServerFailed as error:
        print(f"\n{error}\nThe logs are in {log_dir}", file=sys.stderr)
        return 1
    agreed = [outcome for outcome in outcomes if outcome.verdict == "same, right"]
    print(
        f"VERDICT: {len(agreed)} of {len(outcomes)} answers right and equal, "
        f"prefill on {prefill.name}, decode on {decode.name}"
    )
    if len(agreed) < len(outcomes):
        print(f"The logs are in {log_dir}", file=sys.stderr)
        return 1
    shutil.rmtree(log_dir)
    return 0


def _servers(log_dir: Path, on_cards: bool) -> list[Server]:
    emulator = None if on_cards else ("--devices", "8", "--memory", "1GiB")

    def serve(name: str, devices: Sequence[int], **more: Any) -> Server:
        return engine(
            name, MODEL, devices=devices, log_dir=log_dir, emulator=emulator, options=ENGINE_OPTIONS, **more
        )

    def connector(role: str) -> dict[str, Any]:
        # Port 0 takes a free one. What serves for good names its own, as examples/disaggregated does.
        return {"kv_connector": "MooncakeConnectorV1", "kv_role": role, "kv_port": 0}

    prefill = serve("prefill-tp2", [0, 1], kv_transfer_config=connector("kv_producer"))
    decode = serve("decode-tp1", [2], kv_transfer_config=connector("kv_consumer"))
    ordinary = serve("ordinary-tp1", [3])
    return [prefill, decode, ordinary, router([prefill], [decode], log_dir)]


class _Progress:
    """One line that changes on a terminal; elsewhere a line each time that something else is waited for."""

    def __init__(self) -> None:
        self._on_terminal = sys.stdout.isatty()
        self._awaited = ""

    def __call__(self, line: str) -> None:
        _, _, awaited = line.partition("waiting for")
        if self._on_terminal:
            print(f"\r\033[K{line}", end="", flush=True)
        elif awaited != self._awaited:
            print(line, flush=True)
        self._awaited = awaited

    def end(self, line: str) -> None:
        print(f"\r\033[K{line}" if self._on_terminal else line, flush=True)


def _ask(front: Server, ordinary: Server) -> list[Outcome]:
    outcomes = []
    print(f"{'prompt':>7} {'verdict':11} " + " ".join(f"{name:>11}" for name in PULLED) + "  answer")
    for seed, num_prompt_tokens in enumerate(PROMPT_TOKENS):
        question = make_question(seed, num_prompt_tokens, ANSWER_TOKENS)
        pulled_answer = _complete(front, question)
        outcome = Outcome(
            question,
            disaggregated=pulled_answer["choices"][0]["text"],
            ordinary=_complete(ordinary, question)["choices"][0]["text"],
            pulled=pulled_answer.get("kv_transfer_params") or {},
        )
        outcomes.append(outcome)
        numbers = " ".join(f"{_cell(outcome.pulled.get(name)):>11}" for name in PULLED)
        print(f"{num_prompt_tokens:>7} {outcome.verdict:11} {numbers}  {outcome.disaggregated.strip()}")
        if outcome.disaggregated != outcome.ordinary:
            print(f"{'':>7} the ordinary engine says: {outcome.ordinary.strip()}")
    return outcomes


def _cell(value: Any) -> str:
    match value:
        case None:
            return "-"
        case float():
            return f"{value:.1f}"
        case list():
            return ",".join(map(str, value))
        case _:
            return str(value)


def _complete(server: Server, question: Question) -> dict[str, Any]:
    body = {
        "model": str(MODEL),
        "prompt": question.prompt,
        "max_tokens": question.num_answer_tokens,
        "temperature": 0,
        "ignore_eos": True,
    }
    return server.post("/v1/completions", body)


if __name__ == "__main__":
    sys.exit(main())
