# SPDX-License-Identifier: Apache-2.0
"""Scheduler half of an engine that prefills: keeps finished requests' blocks under leases, and answers peers.

Nothing here waits but `rest`, and nothing raises for what a request or a peer brings.
"""

from __future__ import annotations

import itertools
import time
import uuid
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, assert_never

import msgspec
from vllm.logger import init_logger
from vllm.v1.request import RequestStatus

from vllm_ascend.errors import WireError
from vllm_ascend.kv_transfer.blocks import NULL_BLOCK, Keeps, state_block
from vllm_ascend.kv_transfer.handshake import Listener
from vllm_ascend.kv_transfer.lease import LeaseTable
from vllm_ascend.kv_transfer.messages import (
    Answer,
    AskForEngine,
    AskProgress,
    AskSums,
    Done,
    DoneNoted,
    Engine,
    Forgo,
    Question,
    Refused,
    Release,
    Released,
    RemotePrefill,
    Renew,
    Renewed,
    transfer_name_of,
)
from vllm_ascend.kv_transfer.metrics import TransferStats
from vllm_ascend.kv_transfer.named import Held, NamedRequests
from vllm_ascend.kv_transfer.orders import ToSum
from vllm_ascend.kv_transfer.prompts import digest_of, drop_last_token
from vllm_ascend.kv_transfer.sums import LayerSums, SumTable
from vllm_ascend.kv_transfer.trust import Trust

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.request import Request

logger = init_logger(f"vllm.{__name__}")

Params = dict[str, Any]  # Any: kv_transfer_params are JSON


class PrefillSide:
    """Keeps what decode engines are to read, and answers them at one listener."""

    def __init__(
        self,
        engine_id: str,
        host: str,
        port: int,
        lease_s: float,
        tp_size: int,
        block_size: int,
        keeps: Sequence[Keeps],
        trust: Trust,
        verify: bool,
    ) -> None:
        """Bind the listener. Raises ConfigError if its address is taken or not of this machine."""
        # A restarted engine may get the same id and port; its predecessor's regions must not be read.
        self.engine_id = f"{engine_id}-{uuid.uuid4().hex[:8]}"
        self._lease_s = lease_s
        self._tp_size = tp_size
        self._block_size = block_size
        self._keeps = keeps
        self._verify = verify
        self._sums = SumTable()
        self._to_sum: list[ToSum] = []
        self._leases = LeaseTable()
        self._lease_numbers = itertools.count(1)
        self._pinned: dict[str, int] = {}
        self._num_pinned = 0
        self._reported: dict[str, int] = {}
        self._engine: Engine | None = None
        # Blocks left of a window, and those of states, change hands while a prompt is computed.
        grow = all(group.window is None and not group.is_state for group in keeps)
        self._named = NamedRequests(self._lease_numbers, self._describe, block_size, grow)
        self._listener = Listener(host, port, self._answer, trust)
        logger.info("KV listener of engine %s at %s:%d", self.engine_id, host, self._listener.port)
        if trust.keys is None:
            logger.warning(
                "the KV listener at %s:%d has no secret: who reaches it learns where KV is and can free it; "
                "set the same VLLM_ASCEND_KV_SECRET for engines that exchange KV",
                host,
                self._listener.port,
            )

    @property
    def port(self) -> int:
        """Where the listener is bound."""
        return self._listener.port

    def describe(self, engine: Engine) -> None:
        """What to answer when peers ask who this is."""
        self._engine = engine

    def announce(self, request: Request) -> None:
        """Note a request whose KV another engine will read, before any of it is computed.

        Decode runs the prompt's last token itself, and state cannot be taken back by a token as KV can. So
        with recurrent state the prompt ends one token earlier here.
        """
        # A request that is to compute its whole prompt, such as for its logprobs, does so at both engines.
        if any(group.is_state for group in self._keeps) and not request.skip_reading_prefix_cache:
            drop_last_token(request)
        try:
            name = transfer_name_of(request.kv_transfer_params or {})
        except WireError as error:
            logger.warning("nobody can read request %s before it ends: %s", request.request_id, error)
            return
        if name is not None:
            self._named.begin(name, request)

    def scheduled(self, output: SchedulerOutput) -> None:
        """What the step that is about to begin computes."""
        self._named.scheduled(output)

    def processed(self) -> None:
        """A step has ended, on every rank."""
        self._named.processed()

    def finished(self, request: Request, block_ids: Sequence[Sequence[int]]) -> tuple[bool, Params | None]:
        """Whether to hold the finished request's blocks, and what to tell the router about them."""
        if request.status not in (RequestStatus.FINISHED_LENGTH_CAPPED, RequestStatus.FINISHED_STOPPED):
            self._named.dropped(request.request_id)
            return False, None
        self._leases.grant(request.request_id, self._lease_s, time.monotonic())
        num_blocks = sum(len(blocks) - blocks.count(NULL_BLOCK) for blocks in block_ids)
        self._pinned[request.request_id] = num_blocks
        self._num_pinned += num_blocks
        num_tokens = min(request.num_computed_tokens, request.num_prompt_tokens)
        readable = tuple(
            self._readable(request, group, blocks)
            for group, blocks in zip(self._keeps, block_ids, strict=True)
        )
        if self._verify:
            # The last prompt token is never of use to decode, which computes its KV itself.
            has_state = any(group.is_state for group in self._keeps)
            useful = num_tokens if has_state else min(num_tokens, request.num_prompt_tokens - 1)
            self._sums.expect(request.request_id, useful)
            self._to_sum.append(ToSum(request.request_id, readable, useful))
        lease = self._named.lease_of(request.request_id)
        digest = digest_of(request, num_tokens)
        prefill = self._describe(
            Held(request.request_id, readable, num_tokens, digest, lease or next(self._lease_numbers))
        )
        if lease is not None and not self._named.computed(request.request_id, prefill):
            self._leases.release([request.request_id])
        return True, {
            "do_remote_prefill": True,
            "do_remote_decode": False,
            **msgspec.to_builtins(prefill),
            "remote_block_ids": [list(blocks) for blocks in readable],
            "tp_size": self._tp_size,
        }

    def take_freed(self) -> frozenset[str]:
        """Requests whose blocks may be freed now; each is returned once."""
        freed = self._leases.take_freed(time.monotonic())
        for request_id in freed.expired:
            logger.warning(
                "no decode engine read request %s within its lease of %g s; its blocks are freed",
                request_id,
                self._lease_s,
            )
        either = freed.read | freed.expired
        if either:
            self._sums.drop(either)
            self._named.freed(either)
        for request_id in either:
            self._num_pinned -= self._pinned.pop(request_id)
        return either

    def take_to_sum(self) -> tuple[ToSum, ...]:
        """Requests that the workers are to sum, since the last call."""
        to_sum, self._to_sum = tuple(self._to_sum), []
        return to_sum

    def add_sums(self, found: Mapping[str, Sequence[LayerSums]]) -> None:
        """What ranks report of requests that they have summed."""
        for request_id, layers in found.items():
            self._sums.add(request_id, layers)

    def report(self, stats: TransferStats) -> None:
        """Add what became of leases since the last call, and what is held now if that has changed."""
        stats.count(**self._leases.take_counts())
        levels = {"leases_held": len(self._pinned), "blocks_pinned": self._num_pinned}
        if levels != self._reported:
            self._reported = levels
            stats.level(**levels)

    def rest(self, longest_s: float) -> None:
        """Pause until blocks may be freed, for `longest_s` at the most; not at all when none are held."""
        self._leases.await_release(longest_s)

    def close(self) -> None:
        """Free the port. May be called twice."""
        self._listener.close()

    def _readable(self, request: Request, group: Keeps, blocks: Sequence[int]) -> tuple[int, ...]:
        """Of a finished request's blocks in a group, those that decode is told of."""
        if group.tokens_per_state is None:
            return tuple(blocks)
        if request.num_computed_tokens != request.num_prompt_tokens:
            return (NULL_BLOCK,)
        return (state_block(blocks, request.num_prompt_tokens, group.tokens_per_state),)

    def _describe(self, held: Held) -> RemotePrefill:
        return RemotePrefill(
            remote_engine_id=self.engine_id,
            remote_request_id=held.request_id,
            remote_host=self._listener.host,
            remote_port=self._listener.port,
            remote_block_ids=held.blocks,
            remote_num_tokens=held.tokens,
            remote_block_size=self._block_size,
            remote_lease=held.lease,
            remote_lease_s=self._lease_s,
            remote_prompt_digest=held.digest,
        )

    def _answer(self, question: Question) -> Answer:
        if self._engine is None:
            return Refused(reason="it is still starting; ask again")
        if isinstance(question, AskForEngine):
            return self._engine
        if question.engine_id != self.engine_id:
            return Refused(
                reason=f"it is {self.engine_id}, which replaced {question.engine_id}; send the prompt again"
            )
        match question:
            case Renew(request_ids=request_ids):
                return Renewed(lost=tuple(self._leases.renew(request_ids, time.monotonic())))
            case Done(request_id=request_id, reader=reader, num_readers=num_readers):
                return DoneNoted(held=self._leases.done(request_id, reader, num_readers))
            case Release(request_ids=request_ids):
                self._leases.release(request_ids)
                return Released()
            case AskSums():
                return self._sums.answer(question)
            case AskProgress():
                return self._named.answer(question)
            case Forgo(names=names):
                self._leases.release(self._named.forgo(names))
                return Released()
            case _:
                assert_never(question)
