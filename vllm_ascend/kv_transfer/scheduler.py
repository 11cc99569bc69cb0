# SPDX-License-Identifier: Apache-2.0
"""Scheduler half: what to pull, and when blocks may be freed.

Two sides that share nothing. `PrefillSide` holds finished requests' blocks under leases and answers peers;
`DecodeSide` takes what a router brings, tells vLLM how many tokens will come, and hands the workers their
pulls. An engine has one or both. Nothing here waits, and nothing here raises for what a request brings: a
request whose parameters are of no use is computed locally.
"""

from __future__ import annotations

import itertools
import time
import uuid
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, assert_never

from vllm.logger import init_logger
from vllm.v1.request import RequestStatus

from vllm_ascend.errors import PeerNotAdmitted, WireError
from vllm_ascend.kv_transfer.blocks import NULL_BLOCK, Keeps, positions_of, state_block, tokens_seen
from vllm_ascend.kv_transfer.handshake import Listener
from vllm_ascend.kv_transfer.keeper import Keeper
from vllm_ascend.kv_transfer.lease import LeaseTable
from vllm_ascend.kv_transfer.messages import (
    Answer,
    AskForEngine,
    AskSums,
    Done,
    DoneNoted,
    Engine,
    Pull,
    Question,
    Refused,
    Release,
    Released,
    RemotePrefill,
    Renew,
    Renewed,
    ToSum,
    prompt_digest,
)
from vllm_ascend.kv_transfer.metrics import TransferNumbers, TransferStats, nothing_moved
from vllm_ascend.kv_transfer.sharing import Prompt, SharedPrompts
from vllm_ascend.kv_transfer.sums import LayerSums, SumTable
from vllm_ascend.kv_transfer.topology import Span
from vllm_ascend.kv_transfer.trust import Trust

if TYPE_CHECKING:
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.request import Request

logger = init_logger(f"vllm.{__name__}")

Params = dict[str, Any]  # Any: kv_transfer_params are JSON


_REST_PER_WORK = 2.0


class Pace:
    """How long a step that has nothing to run should pause.

    While blocks are held or awaited vLLM steps without end, and an empty step costs every rank some work.
    Resting twice as long as the last one took leaves the host's cores to those who have something to do:
    the threads that read, or the engine beside this one that reads from it.
    """

    def __init__(self) -> None:
        self._rested_at_s = time.monotonic()

    def next_rest_s(self, longest_s: float) -> float:
        """Seconds to pause now, `longest_s` at the most."""
        worked_s = time.monotonic() - self._rested_at_s
        return min(longest_s, _REST_PER_WORK * worked_s)

    def rested(self) -> None:
        """The pause is over; the next step's work begins."""
        self._rested_at_s = time.monotonic()


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
        self._lease_numbers = itertools.count()
        self._pinned: dict[str, int] = {}
        self._reported: dict[str, int] = {}
        self._engine: Engine | None = None
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
            _drop_last_token(request)

    def finished(self, request: Request, block_ids: Sequence[Sequence[int]]) -> tuple[bool, Params | None]:
        """Whether to hold the finished request's blocks, and what to tell the router about them."""
        if request.status not in (RequestStatus.FINISHED_LENGTH_CAPPED, RequestStatus.FINISHED_STOPPED):
            return False, None
        self._leases.grant(request.request_id, self._lease_s, time.monotonic())
        self._pinned[request.request_id] = sum(
            block != NULL_BLOCK for blocks in block_ids for block in blocks
        )
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
        return True, {
            "do_remote_prefill": True,
            "do_remote_decode": False,
            "remote_engine_id": self.engine_id,
            "remote_request_id": request.request_id,
            "remote_host": self._listener.host,
            "remote_port": self._listener.port,
            "remote_block_ids": [list(blocks) for blocks in readable],
            "remote_num_tokens": num_tokens,
            "remote_block_size": self._block_size,
            "remote_lease": next(self._lease_numbers),
            "remote_lease_s": self._lease_s,
            "remote_prompt_digest": _digest(request, num_tokens),
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
        self._sums.drop(freed.read | freed.expired)
        for request_id in freed.read | freed.expired:
            del self._pinned[request_id]
        return freed.read | freed.expired

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
        levels = {"leases_held": len(self._pinned), "blocks_pinned": sum(self._pinned.values())}
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
            case _:
                assert_never(question)


class DecodeSide:
    """Requests whose prompt another engine has computed, from their arrival to their end."""

    def __init__(self, keeps: Sequence[Keeps], trust: Trust) -> None:
        """`keeps`: for each KV cache group, what of a request's tokens it keeps."""
        self._keeps = keeps
        self._trust = trust
        self._keeper = Keeper(trust)
        self._prompts = SharedPrompts()
        self._announced: dict[str, RemotePrefill] = {}
        self._pulling: dict[str, RemotePrefill] = {}
        self._ended_early: set[str] = set()
        self._num_declined = 0
        self._numbers: dict[str, TransferNumbers] = {}
        self._pulls: list[Pull] = []

    def announce(self, request: Request) -> None:
        """Note a request that brings `do_remote_prefill`, and keep its blocks at the prefill engine."""
        try:
            remote = RemotePrefill.parse(request.kv_transfer_params or {})
            self._trust.check_host(remote.remote_host)
        except (WireError, PeerNotAdmitted) as error:
            self._decline(request, error)
            return
        if complaint := self._unusable(request, remote):
            self._decline(request, complaint)
            self._release_unless_wanted(remote)
            return
        self._announced[request.request_id] = remote
        self._prompts.bring(remote, request.request_id)
        self._keeper.hold(remote)

    def tokens_to_pull(self, request: Request, num_computed_tokens: int) -> int | None:
        """Tokens beyond the local prefix hit whose KV is worth pulling; None while another request does."""
        remote = self._announced.get(request.request_id)
        if remote is None:
            return 0
        num_tokens = max(0, self._useful_tokens(request, remote) - num_computed_tokens)
        match self._prompts.state(remote):
            case Prompt.THERE:
                return num_tokens
            case Prompt.PULLING:
                return None if num_tokens else 0
            case Prompt.PULLED:
                return 0
            case state:
                assert_never(state)

    def allocated(self, request: Request, blocks: KVCacheBlocks, num_external_tokens: int) -> None:
        """Queue the pull for the next step; with nothing to pull, tell prefill to free its blocks."""
        remote = self._announced.pop(request.request_id, None)
        if remote is None:
            return
        if num_external_tokens == 0:
            self._numbers[request.request_id] = nothing_moved(request.num_prompt_tokens)
            self._leave(request, remote)
            return
        self._pulling[request.request_id] = remote
        self._prompts.pull(remote, request.request_id)
        useful = self._useful_tokens(request, remote)
        self._pulls.append(
            Pull(
                request_id=request.request_id,
                remote=remote,
                local_blocks=tuple(
                    tuple(ids)
                    if group.tokens_per_state is None
                    else (state_block(ids, useful, group.tokens_per_state),)
                    for group, ids in zip(self._keeps, blocks.get_block_ids(), strict=True)
                ),
                first_token=useful - num_external_tokens,
                tokens=num_external_tokens,
                prompt_tokens=request.num_prompt_tokens,
            )
        )

    @property
    def waits(self) -> bool:
        """Whether requests wait for their KV, so that the workers' results are awaited."""
        return bool(self._announced or self._pulling)

    def take_pulls(self) -> tuple[Pull, ...]:
        """What the workers are to read, since the last call."""
        pulls, self._pulls = tuple(self._pulls), []
        return pulls

    def add_numbers(self, numbers: Mapping[str, TransferNumbers]) -> None:
        """What ranks report of requests that they have read."""
        for request_id, of_rank in numbers.items():
            known = self._numbers.get(request_id)
            self._numbers[request_id] = of_rank if known is None else known.merged(of_rank)

    def loaded(self, request_id: str, failed: bool) -> None:
        """Every rank is done with the request, for better or worse."""
        remote = self._pulling.pop(request_id, None)
        if remote is not None:
            self._prompts.pulled(remote, loaded=not failed)
            self._keeper.drop(remote)
        if failed or request_id in self._ended_early:
            self._ended_early.discard(request_id)
            self._numbers.pop(request_id, None)
        elif request_id in self._numbers:
            logger.debug("request %s: %s", request_id, self._numbers[request_id])

    def finished(self, request: Request) -> Params | None:
        """The request ends, whatever its state. Returns what its transfer cost, for the client."""
        remote = self._announced.pop(request.request_id, None)
        if remote is not None:
            self._leave(request, remote)
        if request.request_id in self._pulling:
            # Its blocks stay allocated until every rank has reported, and so do our notes.
            self._ended_early.add(request.request_id)
            return None
        numbers = self._numbers.pop(request.request_id, None)
        if numbers is None:
            return None
        return numbers.as_params()

    def report(self, stats: TransferStats) -> None:
        """Add what was declined since the last call."""
        stats.count(declined=self._num_declined)
        self._num_declined = 0

    def close(self) -> None:
        """End the keeper. May be called twice."""
        self._keeper.close()

    def _leave(self, request: Request, remote: RemotePrefill) -> None:
        """The request has no use for what it brought."""
        self._prompts.leave(remote, request.request_id)
        self._release_unless_wanted(remote)

    def _release_unless_wanted(self, remote: RemotePrefill) -> None:
        if not self._prompts.is_wanted(remote):
            self._keeper.release(remote)

    def _decline(self, request: Request, reason: object) -> None:
        logger.warning("request %s is computed here: %s", request.request_id, reason)
        self._num_declined += 1

    def _useful_tokens(self, request: Request, remote: RemotePrefill) -> int:
        """Where the interval of prompt tokens ends whose KV is at the prefill engine and of use here.

        The last prompt token is not: decode runs it to get the next one, and computes its KV on the way.
        """
        rooms = [
            len(blocks) * remote.remote_block_size
            for group, blocks in zip(self._keeps, remote.remote_block_ids, strict=True)
            if not group.is_state
        ]
        return min(request.num_prompt_tokens - 1, remote.remote_num_tokens, *rooms)

    def _unusable(self, request: Request, remote: RemotePrefill) -> str | None:
        """A sentence on why the prefill engine's blocks cannot be pulled, or None."""
        found = len(remote.remote_block_ids)
        if found != len(self._keeps):
            return (
                f"prefill engine {remote.remote_engine_id} has {found} KV cache groups and this engine "
                f"{len(self._keeps)}; start both with the same model and options"
            )
        tokens = Span(0, self._useful_tokens(request, remote))
        if len(tokens) and _digest(request, remote.remote_num_tokens) != remote.remote_prompt_digest:
            return (
                f"prefill engine {remote.remote_engine_id} computed another prompt; send it one prompt per "
                f"request, and the same to both engines"
            )
        for blocks, group in zip(remote.remote_block_ids, self._keeps, strict=True):
            if group.is_state:
                if complaint := _unusable_state(request, remote, blocks):
                    return complaint
                continue
            at = positions_of(tokens_seen(tokens, group.window), remote.remote_block_size)
            if NULL_BLOCK in blocks[at.start : at.stop]:
                return (
                    f"prefill engine {remote.remote_engine_id} has given away blocks inside the sliding "
                    f"window; ask it for one token (max_tokens 1)"
                )
        return None


def _unusable_state(request: Request, remote: RemotePrefill, blocks: Sequence[int]) -> str | None:
    wanted = request.num_prompt_tokens - 1
    if wanted == 0:
        return None
    if len(blocks) != 1 or remote.remote_num_tokens != wanted:
        return (
            f"prefill engine {remote.remote_engine_id} has {len(blocks)} blocks of recurrent state after "
            f"{remote.remote_num_tokens} tokens and this engine needs the one after {wanted}; send both the "
            f"same prompt, and start them with the same model and options"
        )
    if blocks[0] == NULL_BLOCK:
        return (
            f"the recurrent state of prefill engine {remote.remote_engine_id} has gone on behind the prompt; "
            f"ask it for one token (max_tokens 1)"
        )
    return None


def _drop_last_token(request: Request) -> None:
    """End the request's prompt one token earlier, unless it has only one.

    vLLM has no call for this. Its `Request` keeps the prompt in several places, which must agree.
    """
    if request.num_prompt_tokens < 2:
        return
    # New ones: the output processor may hold the old, in the same process.
    for name in ("prompt_token_ids", "prompt_is_token_ids", "prompt_embeds"):
        if (prompt := getattr(request, name)) is not None:
            setattr(request, name, prompt[:-1])
    del request._all_token_ids[-1]
    request.num_prompt_tokens -= 1
    # The last block's hash may have counted the token.
    del request.block_hashes[-1:]
    request.update_block_hashes()


def _digest(request: Request, num_tokens: int) -> str | None:
    """What tells the request's first `num_tokens` prompt tokens from others; None if it brings embeddings."""
    token_ids = request.prompt_token_ids
    return None if token_ids is None else prompt_digest(token_ids[:num_tokens])
