# SPDX-License-Identifier: Apache-2.0
"""Requests that a router gave a name: how far each one is, for a decode engine that reads it as it grows.

The engine's thread notes what vLLM's scheduler does with them, the listener's answers who asks. A name is
for one request: the first that has it. A name that was given up may come later than the word of it; its
request then ends as one that nobody will read.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vllm.logger import init_logger

from vllm_ascend.kv_transfer.messages import (
    AskProgress,
    Ended,
    Gone,
    Growing,
    Progress,
    RemotePrefill,
    Unchanged,
    Unheard,
    Watch,
)
from vllm_ascend.kv_transfer.prompts import digest_of

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.request import Request

logger = init_logger(f"vllm.{__name__}")

REMEMBERED = 4096
"""How many names are remembered that nobody will read any more."""

BlockIds = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Held:
    """Blocks of a request, for each KV cache group, and what of its prompt is in them."""

    request_id: str
    blocks: BlockIds
    tokens: int
    digest: str | None
    lease: int


@dataclass
class _Prompt:
    """A request whose prompt is being computed."""

    name: str
    request: Request
    digest: str | None
    lease: int
    preemptions: int = 0
    blocks: BlockIds = ()
    scheduled_tokens: int = 0
    """Of the prompt, those that have a place in `blocks`."""
    tokens: int = 0
    """Those of them that are in memory."""


class NamedRequests:
    """The named requests of one prefill engine, and what is told of them."""

    def __init__(
        self,
        leases: Iterator[int],
        describe: Callable[[Held], RemotePrefill],
        block_size: int,
        grow: bool,
        remembered: int = REMEMBERED,
    ) -> None:
        """`leases` gives numbers above 0. `grow`: whether a prompt's blocks stay until it is computed."""
        self._leases = leases
        self._describe = describe
        self._block_size = block_size
        self._grow = grow
        self._remembered = remembered
        self._prompts: dict[str, _Prompt] = {}
        self._lock = threading.Lock()
        # From here on behind the lock. By name, but for `_names`, which are those of ended requests by id.
        self._told: dict[str, Growing | Ended] = {}
        self._gone: OrderedDict[str, Gone] = OrderedDict()
        self._names: dict[str, str] = {}

    # For the engine's thread

    def begin(self, name: str, request: Request) -> None:
        """The request has come, and nothing of it is computed."""
        prompt = _Prompt(name, request, digest_of(request, request.num_prompt_tokens), next(self._leases))
        with self._lock:
            if name in self._told:
                logger.warning(
                    "request %s has the transfer_name of another one, which alone is told under it; "
                    "give each request a name of its own",
                    request.request_id,
                )
                return
            self._prompts[request.request_id] = prompt
            if name not in self._gone:
                self._told[name] = self._growing(prompt)

    def scheduled(self, output: SchedulerOutput) -> None:
        """Note the blocks into which the step that is about to begin computes prompts."""
        for request_id, prompt in self._prompts.items():
            self._note_preemption(prompt)
            num_tokens = output.num_scheduled_tokens.get(request_id)
            if num_tokens is None or not self._grow:
                continue
            assert output.kv_connector_block_state is not None
            blocks = output.kv_connector_block_state.get_block_ids(request_id)
            assert blocks is not None, "it is scheduled in this step"
            prompt.blocks = tuple(tuple(of_group) for of_group in blocks)
            prompt.scheduled_tokens = prompt.request.num_computed_tokens + num_tokens

    def processed(self) -> None:
        """Note what the steps whose output has come back have computed.

        vLLM handles a step's output when the device is done with the step: it has the sampled tokens then, or
        has waited for their copy, and they come after all writes to the cache, on every rank. Until then the
        step's tokens count as in flight (`Request.num_in_flight_tokens`), with asynchronous scheduling and
        pipeline stages, too.
        """
        for prompt in self._prompts.values():
            self._note_preemption(prompt)
            request = prompt.request
            processed = max(0, request.num_computed_tokens - request.num_in_flight_tokens)
            tokens = min(processed, prompt.scheduled_tokens, request.num_prompt_tokens)
            if tokens > prompt.tokens:
                prompt.tokens = tokens
                self._tell(prompt)

    def lease_of(self, request_id: str) -> int | None:
        """The lease that the request's blocks have had so far; None: it has no name."""
        prompt = self._prompts.get(request_id)
        if prompt is None:
            return None
        self._note_preemption(prompt)
        return prompt.lease

    def computed(self, request_id: str, prefill: RemotePrefill) -> bool:
        """The prompt is there, and its blocks are held. Returns whether somebody may read it by its name."""
        prompt = self._prompts.pop(request_id)
        with self._lock:
            if prompt.name in self._gone:
                return False
            self._told[prompt.name] = Ended(prefill=prefill)
            self._names[request_id] = prompt.name
            return True

    def dropped(self, request_id: str) -> None:
        """The request ended before its prompt was there, or without a word for decode."""
        prompt = self._prompts.pop(request_id, None)
        if prompt is not None:
            with self._lock:
                self._forget(prompt.name, f"request {request_id} was aborted")

    def freed(self, request_ids: Iterable[str]) -> None:
        """The blocks of these were given away."""
        with self._lock:
            for request_id in request_ids:
                if (name := self._names.get(request_id)) is not None:
                    self._forget(name, f"the blocks of request {request_id} are not held any more")

    # For the listener's thread

    def answer(self, question: AskProgress) -> Progress:
        """How far they are."""
        with self._lock:
            return Progress(of=tuple(self._look_up(watch) for watch in question.watches))

    def forgo(self, names: Sequence[str]) -> list[str]:
        """Nobody will read these. Returns the ids of those that are computed, whose blocks are held."""
        with self._lock:
            computed = []
            for name in names:
                told = self._told.get(name)
                if isinstance(told, Ended):
                    computed.append(told.prefill.remote_request_id)
                self._forget(name, "decode gave it up")
            return computed

    def _note_preemption(self, prompt: _Prompt) -> None:
        """Of a request that was preempted nothing is in memory, and its blocks are given to others."""
        if prompt.request.num_preemptions != prompt.preemptions:
            prompt.preemptions = prompt.request.num_preemptions
            prompt.lease = next(self._leases)
            prompt.blocks, prompt.scheduled_tokens, prompt.tokens = (), 0, 0
            self._tell(prompt)

    def _tell(self, prompt: _Prompt) -> None:
        with self._lock:
            if prompt.name in self._told:
                self._told[prompt.name] = self._growing(prompt)

    def _growing(self, prompt: _Prompt) -> Growing:
        num_blocks = -(-prompt.tokens // self._block_size)
        blocks = tuple(of_group[:num_blocks] for of_group in prompt.blocks)
        held = Held(prompt.request.request_id, blocks, prompt.tokens, prompt.digest, prompt.lease)
        return Growing(so_far=self._describe(held), prompt_tokens=prompt.request.num_prompt_tokens)

    def _look_up(self, watch: Watch) -> Unheard | Unchanged | Growing | Ended | Gone:
        told = self._told.get(watch.name) or self._gone.get(watch.name) or Unheard()
        if isinstance(told, Growing):
            so_far = told.so_far
            if (so_far.remote_lease, so_far.remote_num_tokens) == (watch.lease, watch.tokens):
                return Unchanged()
        return told

    def _forget(self, name: str, reason: str) -> None:
        told = self._told.pop(name, None)
        if isinstance(told, Ended):
            self._names.pop(told.prefill.remote_request_id)
        self._gone[name] = Gone(reason=reason)
        if len(self._gone) > self._remembered:
            self._gone.popitem(last=False)
