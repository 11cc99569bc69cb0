# SPDX-License-Identifier: Apache-2.0
"""Thousands of requests of every kind at two engines, each answer compared with the known right one.

    python -m vllm_ascend.emulator python tests/disaggregated/soak.py --requests 2000

starts a prefill and a decode engine of random sizes, and a router; asks questions of the recall model, whose
right answers are known: of all lengths, with shared prefixes, streamed, several answers or prompts at once,
refused ones, by clients that leave, with loads that fail. With `--early` prompts are read while prefill
computes them. With `--kills 3` an engine is killed three times on the way and started again. It prints how
far it is, and at the end one line of JSON: what became of the requests, what both engines hold then, and how
memory, descriptors and threads of each process have grown since everything had been used once; those of an
engine that was killed, since a while after its start. The exit status tells whether all is well.

`tests/disaggregated/test_soak.py` runs a little of it.
"""

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import httpx

if __name__ == "__main__":
    # Where pyproject.toml tells pytest to look.
    _ROOT = Path(__file__).parents[2]
    sys.path[:0] = [
        str(_ROOT / path) for path in ("examples/disaggregated", "examples/recall_model", "tests")
    ]

from disaggregated.fleet import (
    MODEL,
    NUM_BLOCKS,
    TASK_QUEUE,
    blocks_in_use,
    body,
    connector,
    engine_options,
    metric,
    prefilled,
    same_table_other_order,
)
from disaggregated.footprints import Footprint, footprints
from recall import Question, make_question
from servers import Server, ServerFailed, engine, router, running

from vllm_ascend.kv_transfer.metrics import FAILURES

NUM_PREFIXES = 12
"""Tables that many questions share."""
SETTLES_S = 60.0
"""How long blocks may stay in use after the last answer."""
FEW_PRIMITIVES = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "16", "LRU_CACHE_CAPACITY": "16"}
"""For the engines. An emulated device computes with PyTorch's CPU kernels, which keep what oneDNN made for
each shape that they have met: of up to 1,024 shapes, a quarter to half a MiB each, in two caches. The memory
of an engine would show nothing else for its first thousands of requests, and no card has it."""


@dataclass(frozen=True)
class Engines:
    """What is soaked."""

    prefill: Server
    decode: Server
    front: Server
    num_blocks: tuple[int, int] = (NUM_BLOCKS, NUM_BLOCKS)
    """Of `prefill` and of `decode`."""

    def blocks_in_use(self) -> dict[str, float]:
        return {
            server.name: blocks_in_use(server, num_blocks)
            for server, num_blocks in zip((self.prefill, self.decode), self.num_blocks, strict=True)
        }


class Wrong(Exception):
    """An answer that is not the right one."""

    def __init__(self, question: Question, text: str) -> None:
        super().__init__(f"{text!r} is not {question.answer!r}; the prompt: {question.prompt}")
        self.question = question


@dataclass
class Tally:
    """What became of requests, by kind; any thread adds."""

    outcomes: Counter[str] = field(default_factory=Counter)
    kinds: Counter[str] = field(default_factory=Counter)
    complaints: list[str] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, kind: str, outcome: str, complaint: str = "") -> None:
        with self._lock:
            self.kinds[kind] += 1
            self.outcomes[outcome] += 1
            if complaint:
                self.complaints.append(f"{kind}: {complaint}"[:600])


@dataclass
class Outages:
    """When an engine was killed, and when it answered again. Clients ask nothing meanwhile."""

    spans: list[tuple[float, float]] = field(default_factory=list)
    victims: list[str] = field(default_factory=list)
    _all_up: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        self._all_up.set()

    def wait_for_end(self) -> None:
        self._all_up.wait()

    def kill(self, victim: Server, tell: Callable[[str], None]) -> None:
        """Kill every process of the engine and start it again."""
        tell(f"killing {victim.name}")
        self._all_up.clear()
        self.victims.append(victim.name)
        began_s = time.monotonic()
        # Until it is over, whoever asks whether a request met an outage is told yes.
        self.spans.append((began_s, float("inf")))
        os.killpg(victim.pid, signal.SIGKILL)
        try:
            victim.stop()
            victim.start().wait_ready()
        finally:
            self.spans[-1] = (began_s, time.monotonic())
            self._all_up.set()

    def met(self, began_s: float, ended_s: float) -> bool:
        """Whether an engine was down at some time in between."""
        return any(began_s <= end and ended_s >= begin for begin, end in self.spans)


# Kinds of requests. Each returns the outcome it is to have, or raises.


def _ask(engines: Engines, question: Question, **more: Any) -> dict[str, Any]:
    return engines.front.post("/v1/completions", body(question, **more), timeout_s=300)


def _check(question: Question, text: str) -> str:
    if not question.accepts(text):
        raise Wrong(question, text)
    return "right"


def _check_all(questions: Sequence[Question], answer: dict[str, Any]) -> str:
    choices = sorted(answer["choices"], key=lambda choice: choice["index"])
    for question, choice in zip(questions, choices, strict=True):
        _check(question, choice["text"])
    return "right"


def plain(engines: Engines, question: Question, rng: random.Random) -> str:
    return _check_all([question], _ask(engines, question))


def streamed(engines: Engines, question: Question, rng: random.Random) -> str:
    with _stream(engines, question) as texts:
        return _check(question, "".join(texts))


def first_token_only(engines: Engines, question: Question, rng: random.Random) -> str:
    first = Question(question.prompt, question.answer.split()[0], question.pair_positions[:1])
    return _check_all([first], _ask(engines, question, max_tokens=1))


def several_answers(engines: Engines, question: Question, rng: random.Random) -> str:
    count = rng.randint(2, 3)
    return _check_all([question] * count, _ask(engines, question, n=count, temperature=0.01))


def several_prompts(engines: Engines, question: Question, rng: random.Random) -> str:
    other = make_question(rng.randrange(2**40), 17 + rng.randrange(64), question.num_answer_tokens)
    return _check_all([question, other], _ask(engines, question, prompt=[question.prompt, other.prompt]))


def leaves_at_some_time(engines: Engines, question: Question, rng: random.Random) -> str:
    try:
        answer = httpx.post(
            f"{engines.front.url}/v1/completions",
            json=body(question, stream=rng.random() < 0.5),
            timeout=httpx.Timeout(300, read=10 ** rng.uniform(-3, 0)),
        )
    except httpx.ReadTimeout:
        return "left"
    answer.raise_for_status()
    return "right"  # it was faster than the client is impatient


def leaves_in_the_answer(engines: Engines, question: Question, rng: random.Random) -> str:
    with _stream(engines, question, max_tokens=64) as texts:
        for _ in zip(range(rng.randint(1, 6)), texts, strict=False):
            pass
    return "left"


def refused(engines: Engines, question: Question, rng: random.Random) -> str:
    params = prefilled(engines.prefill, question)
    wrong = rng.choice([{"temperature": -1}, {"max_tokens": 100_000}, {"model": "another"}])
    answer = httpx.post(
        f"{engines.decode.url}/v1/completions",
        json=body(question, kv_transfer_params=params, **wrong),
        timeout=300,
    )
    if answer.status_code not in (400, 404):
        raise ServerFailed(f"{wrong} was answered {answer.status_code}: {answer.text}")
    return "refused"


def load_fails(engines: Engines, question: Question, rng: random.Random) -> str:
    params = prefilled(engines.prefill, question)
    for brought in (params | {"remote_request_id": "released long ago"}, params):
        asked = body(question, kv_transfer_params=brought)
        _check_all([question], engines.decode.post("/v1/completions", asked, timeout_s=300))
    return "right"


KINDS: dict[Callable[[Engines, Question, random.Random], str], int] = {
    plain: 30,
    streamed: 20,
    first_token_only: 5,
    several_answers: 8,
    several_prompts: 4,
    leaves_at_some_time: 14,
    leaves_in_the_answer: 9,
    refused: 5,
    load_fails: 5,
}
"""How often each kind comes, of 100."""


@contextmanager
def _stream(engines: Engines, question: Question, **more: Any) -> Iterator[Iterator[str]]:
    url, json_body = f"{engines.front.url}/v1/completions", body(question, stream=True, **more)
    with httpx.stream("POST", url, json=json_body, timeout=300) as answer:
        yield _texts(answer)


def _texts(answer: httpx.Response) -> Iterator[str]:
    if answer.is_error:
        raise ServerFailed(f"answered {answer.status_code}: {answer.read().decode()}")
    for line in answer.iter_lines():
        if line.startswith("data: {"):
            part = json.loads(line.removeprefix("data: "))
            if "error" in part:
                raise ServerFailed(f"the stream ended with {part['error']}")
            yield part["choices"][0]["text"]


# The whole


def draw_question(rng: random.Random, longest_prompt: int) -> Question:
    """Of any length; every third shares its first blocks with others."""
    if rng.random() < 1 / 3:
        table = make_question(
            rng.randrange(NUM_PREFIXES), 17 + 2 * rng.randrange((longest_prompt - 17) // 2 + 1)
        )
        moved = 2 * rng.randrange(1, table.num_prompt_tokens // 2)
        return same_table_other_order(table, after_tokens=moved) if rng.random() < 0.7 else table
    return make_question(rng.randrange(2**40), rng.randint(17, longest_prompt))


@dataclass(frozen=True)
class Plan:
    """What is asked, and how; the same plan asks the same questions."""

    requests: int
    warm_up: int
    """Requests before, which bring every buffer and connection to its size."""
    seed: int
    at_once: int
    """Clients."""
    kills: int = 0
    longest_prompt: int = 512

    def kills_after(self) -> list[int]:
        """Numbers of requests after which an engine is killed."""
        return [self.warm_up + self.requests * turn // (self.kills + 1) for turn in range(1, self.kills + 1)]


def run(
    engines: Engines,
    plan: Plan,
    numbers: range,
    tally: Tally,
    outages: Outages,
    first: dict[str, Footprint],
    tell: Callable[[str], None],
) -> None:
    """Ask the questions of these numbers. The footprints of an engine that was killed are taken anew."""

    def one(number: int) -> None:
        outages.wait_for_end()
        began_s = time.monotonic()
        rng = random.Random(f"{plan.seed}/{number}")
        kind = rng.choices(list(KINDS), KINDS.values())[0]
        question = draw_question(rng, plan.longest_prompt)
        try:
            tally.add(kind.__name__, kind(engines, question, rng))
        except Wrong as error:
            # The model itself errs now and then; then an engine that has computed all is wrong, too.
            alone = engines.prefill.post("/v1/completions", body(error.question), timeout_s=300)
            if not error.question.accepts(alone["choices"][0]["text"]):
                tally.add(kind.__name__, "wrong without a transfer, too")
                return
            tell(f"WRONG: request {number}: {error}")
            tally.add(kind.__name__, "wrong", f"request {number}: {error}")
        except (ServerFailed, httpx.HTTPError) as error:
            if outages.met(began_s, time.monotonic()):
                tally.add(kind.__name__, "lost in an outage")
            else:
                tally.add(kind.__name__, "error", f"request {number}: {error!r}")

    began_s = time.monotonic()
    victims, warm = random.Random(plan.seed), dict[int, Server]()
    with ThreadPoolExecutor(plan.at_once) as pool:
        for number, _ in zip(numbers, pool.map(one, numbers), strict=True):
            if number in plan.kills_after():
                victim = victims.choice([engines.prefill, engines.decode])
                outages.kill(victim, tell)
                for name in [name for name in first if name.startswith(f"{victim.name}/")]:
                    del first[name]
                warm[number + plan.warm_up] = victim
            if number in warm:
                first |= footprints([warm[number]])
            if number % 50 == 0:
                tell(f"{time.monotonic() - began_s:5.0f} s  request {number}  {dict(tally.outcomes)}")


def settled(engines: Engines) -> dict[str, float]:
    """The blocks in use, once they are none, or after SETTLES_S."""
    deadline = time.monotonic() + SETTLES_S
    while any((held := engines.blocks_in_use()).values()) and time.monotonic() < deadline:
        time.sleep(0.2)
    return held


@dataclass(frozen=True)
class Verdict:
    """The last line."""

    requests: int
    outcomes: dict[str, int]
    kinds: dict[str, int]
    complaints: list[str]
    killed: list[str]
    """Engines, whose processes are compared with what they took some time after their last start."""
    blocks_in_use: dict[str, float]
    failed_loads: dict[str, float]
    """By the decode engine's own count; those that were asked for are of kind refused."""
    growth: dict[str, dict[str, list[int]]]
    """For each process: at first, in the end."""
    too_much: list[str]

    @property
    def good(self) -> bool:
        return not (self.complaints or any(self.blocks_in_use.values()) or self.too_much)


MAY_GROW = Footprint(memory_mib=48, descriptors=12, threads=4)
"""Of one process, whatever the number of requests: allocators keep some memory, pools some connections."""


def judge(
    engines: Engines,
    tally: Tally,
    outages: Outages,
    first: dict[str, Footprint],
    may_grow: Footprint,
) -> Verdict:
    """What became of it all, once the last answer is there."""
    held = settled(engines)
    last = footprints([engines.prefill, engines.decode, engines.front])
    measured = {name.partition("/")[0] for name in first}
    lived = {name for name in first.keys() | last.keys() if name.partition("/")[0] in measured}
    growth = {
        name: {unit: [getattr(first[name], unit), getattr(last[name], unit)] for unit in vars(may_grow)}
        for name in sorted(first.keys() & last.keys())
    }
    too_much = [f"{name} was not there before" for name in lived - first.keys()]
    too_much += [f"{name} has ended" for name in lived - last.keys()]
    too_much += [
        f"{name}: {unit} {then} -> {now}"
        for name, units in growth.items()
        for unit, (then, now) in units.items()
        if now - then > getattr(may_grow, unit)
    ]
    return Verdict(
        requests=sum(tally.outcomes.values()),
        outcomes=dict(tally.outcomes),
        kinds=dict(tally.kinds),
        complaints=tally.complaints[:20],
        killed=outages.victims,
        blocks_in_use=held,
        failed_loads={
            kind: metric(engines.decode, "vllm:ascend_kv_failures_total", kind=kind) for kind in FAILURES
        },
        growth=growth,
        too_much=sorted(too_much),
    )


def soak(
    engines: Engines, plan: Plan, tell: Callable[[str], None], may_grow: Footprint = MAY_GROW
) -> Verdict:
    """Ask all questions of the plan. Processes may grow by `may_grow` each after the first ones."""
    tally, outages = Tally(), Outages()
    run(engines, plan, range(plan.warm_up), tally, outages, {}, tell)
    settled(engines)
    first = footprints([engines.prefill, engines.decode, engines.front])
    run(engines, plan, range(plan.warm_up, plan.warm_up + plan.requests), tally, outages, first, tell)
    return judge(engines, tally, outages, first, may_grow)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--warm-up", type=int, default=200, help="requests before the first measurement")
    parser.add_argument("--kills", type=int, default=0, help="how often an engine is killed on the way")
    parser.add_argument("--at-once", type=int, default=8, help="clients")
    parser.add_argument("--seed", type=int, default=None, help="of questions and sizes; by default a new one")
    parser.add_argument(
        "--early", action="store_true", help="the router tells decode early, and prefill computes in chunks"
    )
    options = parser.parse_args()
    seed = random.randrange(2**20) if options.seed is None else options.seed
    rng = random.Random(seed)
    prefill_tp, decode_tp = rng.choice([(1, 1), (2, 1), (1, 2), (2, 2), (4, 1), (1, 4)])
    prefill_block, decode_block = rng.choice([16, 32, 64, 128]), rng.choice([16, 32, 64, 128])

    def tell(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    tell(
        f"seed {seed}: prefill TP {prefill_tp}, blocks of {prefill_block}; "
        f"decode TP {decode_tp}, blocks of {decode_block}"
    )
    log_dir = Path(tempfile.mkdtemp(prefix="soak-"))
    tell(f"logs in {log_dir}")
    # Blocks that a killed engine was to read are free when their leases end. Without kills no lease ends:
    # blocks are free because both sides said so.
    lease_s = 30 if options.kills else 300

    def serve(name: str, devices: range, role: str, block_size: int, *more: str) -> Server:
        config = connector(
            role,
            kv_load_failure_policy="recompute",
            kv_connector_extra_config={"verify": True, "lease_s": lease_s},
        )
        server = engine(
            name,
            MODEL,
            devices=devices,
            log_dir=log_dir,
            kv_transfer_config=config,
            options=(*engine_options(block_size), *more),
        )
        server.environment |= (
            TASK_QUEUE | FEW_PRIMITIVES | {"VLLM_ASCEND_KV_SECRET": "the secret of this soak"}
        )
        return server

    chunks = ("--max-num-batched-tokens", "64") if options.early else ()
    prefill = serve("prefill", range(prefill_tp), "kv_producer", prefill_block, *chunks)
    decode = serve("decode", range(prefill_tp, prefill_tp + decode_tp), "kv_consumer", decode_block)
    front = router([prefill], [decode], log_dir, options=["--early"] if options.early else [])
    engines = Engines(prefill, decode, front)
    servers = [prefill, decode, engines.front]
    with running(servers, tell):
        plan = Plan(options.requests, options.warm_up, seed, options.at_once, options.kills)
        verdict = soak(engines, plan, tell)
    print(json.dumps({"good": verdict.good, "seed": seed, **asdict(verdict)}), flush=True)
    sys.exit(0 if verdict.good else 1)


if __name__ == "__main__":
    main()
