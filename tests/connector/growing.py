# SPDX-License-Identifier: Apache-2.0
"""Prompts that a prefill engine computes chunk by chunk, as vLLM's scheduler tells the connector of them."""

from __future__ import annotations

import dataclasses
import itertools
import json
from typing import Any

import torch
from connector.engines import Blocks, Engine, request
from vllm.v1.core.kv_cache_manager import KVCacheBlocks
from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.core.sched.output import KVConnectorBlockState, SchedulerOutput
from vllm.v1.request import Request, RequestStatus

_numbers = itertools.count()


class Prompt:
    """A request on its way through a prefill engine whose blocks hold anything before they are computed."""

    def __init__(self, engine: Engine, num_tokens: int, blocks: Blocks, name: str | None = None) -> None:
        self.engine = engine
        number = next(_numbers)
        self.name = name or f"name {number}"
        self.request_id = f"p{number}"
        asks = {"do_remote_decode": True, "do_remote_prefill": False, "transfer_name": self.name}
        self.request = request(self.request_id, num_tokens, asks)
        self.blocks = blocks if isinstance(blocks, tuple) else (blocks,)
        engine.scheduler.on_new_request(self.request)

    def schedule(self, num_tokens: int) -> None:
        """A step begins that computes so many more tokens."""
        state = KVConnectorBlockState({self.request_id}, lambda _: self.blocks, {})
        scheduled = dataclasses.replace(
            SchedulerOutput.make_empty(),
            num_scheduled_tokens={self.request_id: num_tokens},
            total_num_scheduled_tokens=num_tokens,
            kv_connector_block_state=state,
        )
        self.engine.step(scheduled)
        self.request.num_computed_tokens += num_tokens
        self.request.num_in_flight_tokens += num_tokens

    def process(self, num_tokens: int) -> None:
        """The output of a step comes that has computed so many tokens."""
        self.request.num_in_flight_tokens -= num_tokens
        self.engine.step()

    def compute(self, num_tokens: int) -> None:
        """A step, from its begin to its output."""
        self.write(num_tokens)
        self.schedule(num_tokens)
        self.process(num_tokens)

    def write(self, num_tokens: int) -> None:
        """What a step writes: the blocks of the next `num_tokens`, of every rank."""
        start = self.request.num_computed_tokens
        size = self.engine.block_size
        overwrite(self.engine, self.blocks[0][start // size : -(-(start + num_tokens) // size)])

    def preempt(self, blocks: Blocks) -> None:
        """Its blocks go to others, who write them; it gets these when it is scheduled again."""
        self.request.num_computed_tokens = 0
        self.request.num_preemptions += 1
        self.engine.step()
        overwrite(self.engine, self.blocks[0])
        self.blocks = blocks if isinstance(blocks, tuple) else (blocks,)

    def end(self) -> dict[str, Any]:
        """The prompt is computed; what the router gets."""
        assert self.request.num_computed_tokens == self.request.num_prompt_tokens
        self.request.status = RequestStatus.FINISHED_LENGTH_CAPPED
        held, params = self.engine.scheduler.request_finished_all_groups(self.request, self.blocks)
        assert held
        answer: dict[str, Any] = json.loads(json.dumps(params))
        return answer

    def abort(self) -> None:
        self.request.status = RequestStatus.FINISHED_ABORTED
        assert self.engine.scheduler.request_finished_all_groups(self.request, self.blocks) == (False, None)

    def finish(self) -> dict[str, Any]:
        """Compute what is left, and end."""
        if left := self.request.num_prompt_tokens - self.request.num_computed_tokens:
            self.compute(left)
        return self.end()


def overwrite(engine: Engine, blocks: list[int]) -> None:
    """Give blocks of every rank other content."""
    for rank in range(engine.num_ranks):
        for layer in engine.layers(rank):
            pages = engine.layer(rank, layer)
            per_block = engine.block_size // engine.page_size
            for block in blocks:
                part = pages[block * per_block : (block + 1) * per_block]
                # Small numbers, which every element type can hold.
                part.copy_(torch.randint(0x3C00, 0x3FFF, part.shape, dtype=part.dtype))


def early_params(learned: dict[str, Any], name: str) -> dict[str, Any]:
    """What a router sends to decode that has `learned` of the prefill engine by an earlier answer."""
    at = {key: learned[key] for key in ("remote_engine_id", "remote_host", "remote_port")}
    return {"do_remote_prefill": True, "do_remote_decode": False, "transfer_name": name, **at}


def admit_when_ready(
    engine: Engine, request_id: str, num_tokens: int, blocks: Blocks, params: dict[str, Any], cached: int = 0
) -> tuple[Request, int]:
    """Admit a request on the decode engine once something of its prompt is there; the tokens to be pulled."""
    wanted = request(request_id, num_tokens, params)
    engine.scheduler.on_new_request(wanted)
    return wanted, allocate_when_ready(engine, wanted, blocks, cached)


def allocate_when_ready(engine: Engine, wanted: Request, blocks: Blocks, cached: int = 0) -> int:
    """The rest of it, for a request that has come."""
    num_external: int | None = None

    def asked(_: object) -> bool:
        nonlocal num_external
        num_external = engine.scheduler.get_num_new_matched_tokens(wanted, cached)[0]
        return num_external is not None

    engine.step_until(asked)
    assert num_external is not None
    by_group = blocks if isinstance(blocks, tuple) else (blocks,)
    allocated = KVCacheBlocks(tuple([KVCacheBlock(block) for block in group] for group in by_group))
    engine.scheduler.update_state_after_alloc(wanted, allocated, num_external)
    return num_external


def kv_of(engine: Engine, blocks: list[int], num_tokens: int, layer: int = 0) -> torch.Tensor:
    """A layer of the request's first tokens, all ranks' heads: bits [plane, token, head, dim]."""
    ranks = [engine.kv(rank, layer) for rank in range(engine.num_ranks) if layer in engine.layers(rank)]
    by_head = torch.cat(ranks[: engine.tp_size], dim=2)
    slots = [block * engine.block_size + i for block in blocks for i in range(engine.block_size)]
    return by_head[:, slots[:num_tokens]]
