# SPDX-License-Identifier: Apache-2.0
"""What is told of growing prompts, held against vLLM's own scheduler, which preempts them.

The scheduler runs with a cache that is too small for its requests. A model is played by a table of who wrote
what into each slot, and when: a step writes when its output comes, and with asynchronous scheduling the next
step is scheduled before. Whatever is told must be in the table, and stay there until the request has ended
under the lease that was told.
"""

from __future__ import annotations

import random
from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from connector.engines import BLOCK_SIZE, Engine, cache_config, engine_config, model_folder, running
from connector.topologies import Model
from servers import free_port
from vllm.sampling_params import SamplingParams
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.outputs import KVConnectorOutput, ModelRunnerOutput
from vllm.v1.request import Request
from vllm.v1.structured_output import StructuredOutputManager

from vllm_ascend.kv_transfer.handshake import Channel
from vllm_ascend.kv_transfer.messages import (
    AskForEngine,
    AskProgress,
    Ended,
    Forgo,
    Growing,
    Progress,
    RemotePrefill,
    Unheard,
    Watch,
)
from vllm_ascend.kv_transfer.messages import Engine as Description

HEADS = 4
NUM_BLOCKS = 14
STEP_TOKENS = 20
NUM_PROMPTS = 80
Token = tuple[str, int]
"""A request, and which of its tokens."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_folder(tmp_path_factory.mktemp("model"), HEADS)


@pytest.fixture(scope="module")
def registered(folder: Path) -> Iterator[Any]:
    """What a rank has registered."""
    engine = Engine(engine_config(folder, 1, "kv_producer"), HEADS)
    with running(engine):
        yield engine.workers[0].get_handshake_metadata()


@dataclass
class Play:
    """A scheduler, and the steps that it has scheduled and whose output has not come."""

    scheduler: Scheduler
    slots: dict[int, Token] = field(default_factory=dict)
    """What is in the cache."""
    under_way: deque[tuple[SchedulerOutput, dict[int, Token], set[str]]] = field(default_factory=deque)

    def add(self, request_id: str, num_tokens: int, max_tokens: int, params: dict[str, Any] | None) -> None:
        extra = {"kv_transfer_params": params} if params else None
        sampling = SamplingParams(max_tokens=max_tokens, ignore_eos=True, extra_args=extra)
        self.scheduler.add_request(Request(request_id, list(range(num_tokens)), sampling, None))

    def schedule(self) -> None:
        """A step begins."""
        output = self.scheduler.schedule()
        writes: dict[int, Token] = {}
        for name, count in output.num_scheduled_tokens.items():
            request = self.scheduler.requests[name]
            (blocks,) = self.scheduler.kv_cache_manager.get_block_ids(name)
            stop = request.num_computed_tokens
            for token in range(stop - count, stop):
                writes[blocks[token // BLOCK_SIZE] * BLOCK_SIZE + token % BLOCK_SIZE] = (name, token)
        sampling = {
            name for name in output.num_scheduled_tokens if not self.scheduler.requests[name].is_prefill_chunk
        }
        self.under_way.append((output, writes, sampling))

    def finish_step(self) -> None:
        """The oldest step has written, and its output comes."""
        output, writes, sampling = self.under_way.popleft()
        self.slots |= writes
        names = list(output.num_scheduled_tokens)
        metadata = output.kv_connector_metadata
        self.scheduler.update_from_output(
            output,
            ModelRunnerOutput(
                req_ids=names,
                req_id_to_index={name: index for index, name in enumerate(names)},
                sampled_token_ids=[[1] if name in sampling else [] for name in names],
                kv_connector_output=KVConnectorOutput(finished_sending=set(metadata.freed)),
            ),
        )


@pytest.mark.parametrize(
    ("kind", "ahead"), [(Scheduler, 0), (AsyncScheduler, 1)], ids=["synchronous", "asynchronous"]
)
def test_what_is_told_is_in_memory_until_the_request_ends_under_its_lease(folder, registered, kind, ahead):
    port = free_port()
    config = engine_config(folder, 1, "kv_producer", kv_port=port)
    config.scheduler_config.max_num_batched_tokens = STEP_TOKENS
    config.cache_config.enable_prefix_caching = False
    config.cache_config.num_gpu_blocks = NUM_BLOCKS
    cache = cache_config(Model(HEADS), 1, num_blocks=NUM_BLOCKS)
    scheduler = kind(config, cache, StructuredOutputManager(config), BLOCK_SIZE, BLOCK_SIZE)
    scheduler.connector.set_xfer_handshake_metadata_pp_aware({(0, 0): registered})
    channel = Channel("127.0.0.1", port, timeout_s=5)
    try:
        witness = Witness(Play(scheduler), channel)
        witness.watch(ahead)
    finally:
        channel.close()
        scheduler.connector.shutdown()
    assert not witness.told
    # Prompts were told of in several parts, and the cache was too small for all of them.
    assert witness.seen["tokens"] > 2 * NUM_PROMPTS
    assert witness.seen["another lease"] > 1


class Witness:
    """Asks how far prompts are after each step, and holds it against what is in the cache."""

    def __init__(self, play: Play, channel: Channel) -> None:
        self._play, self._channel = play, channel
        engine = channel.ask(AskForEngine())
        assert isinstance(engine, Description)
        self._engine_id = engine.engine_id
        self.told = {f"n{index}": [] for index in range(NUM_PROMPTS)}
        """By the names of prompts that have not ended, what was told of each."""
        self.seen: Counter[str] = Counter()

    def watch(self, ahead: int) -> None:
        """Run all prompts, among others whose answers take the cache's blocks one by one."""
        chance = random.Random(1)
        to_come = list(self.told)
        for step in range(4000):
            if to_come and step % 4 == 0:
                name = to_come.pop()
                asks = {"do_remote_decode": True, "transfer_name": name}
                self._play.add(name, chance.randint(40, 120), 1, asks)
            if to_come and step % 6 == 0:
                self._play.add(f"other {step}", 20, chance.randint(20, 120), None)
            self._play.schedule()
            while len(self._play.under_way) > ahead:
                self._play.finish_step()
                self._check_all()
            if not self.told:
                return

    def _check_all(self) -> None:
        names = tuple(self.told)
        watches = tuple(Watch(name=name, lease=0, tokens=0) for name in names)
        answer = self._channel.ask(AskProgress(engine_id=self._engine_id, watches=watches))
        assert isinstance(answer, Progress)
        for name, found in zip(names, answer.of, strict=True):
            if isinstance(found, Growing):
                self._check_in_memory(name, found.so_far)
                self._note(self.told[name], found.so_far)
            elif isinstance(found, Ended):
                self._check_in_memory(name, found.prefill)
                check_unbroken(self.told.pop(name), found.prefill)
                self._channel.ask(Forgo(engine_id=self._engine_id, names=(name,)))
            else:
                assert found == Unheard()

    def _check_in_memory(self, name: str, told: RemotePrefill) -> None:
        """Every token that is told is in its slot."""
        (blocks,) = told.remote_block_ids or ((),)
        for token in range(told.remote_num_tokens):
            slot = blocks[token // BLOCK_SIZE] * BLOCK_SIZE + token % BLOCK_SIZE
            assert self._play.slots.get(slot) == (name, token)

    def _note(self, told: list[RemotePrefill], so_far: RemotePrefill) -> None:
        if told and so_far.remote_lease != told[-1].remote_lease:
            self.seen["another lease"] += 1
        if so_far.remote_num_tokens and (not told or so_far != told[-1]):
            self.seen["tokens"] += 1
        told.append(so_far)


def check_unbroken(told: list[RemotePrefill], ended: RemotePrefill) -> None:
    """What was told under the last lease is where it was."""
    (blocks,) = ended.remote_block_ids
    tokens = 0
    for one in told:
        if one.remote_lease == ended.remote_lease and one.remote_num_tokens:
            assert one.remote_num_tokens >= tokens
            tokens = one.remote_num_tokens
            (of_then,) = one.remote_block_ids
            assert of_then == blocks[: len(of_then)]
