# SPDX-License-Identifier: Apache-2.0
"""Scheduler half of an engine that decodes: requests that bring KV, from their arrival to their end.

It tells vLLM how many tokens will come, hands the workers their pulls, and keeps and releases the blocks at
the prefill engines. Nothing here waits, and nothing raises for what a request brings: a request whose
parameters are of no use is computed locally.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, assert_never

from vllm.logger import init_logger

from vllm_ascend.errors import PeerNotAdmitted, WireError
from vllm_ascend.kv_transfer.blocks import NULL_BLOCK, Keeps, positions_of, state_block, tokens_seen
from vllm_ascend.kv_transfer.keeper import Keeper
from vllm_ascend.kv_transfer.messages import Pull, RemotePrefill
from vllm_ascend.kv_transfer.metrics import TransferNumbers, TransferStats, nothing_moved
from vllm_ascend.kv_transfer.prompts import digest_of
from vllm_ascend.kv_transfer.sharing import Prompt, SharedPrompts
from vllm_ascend.kv_transfer.topology import Span
from vllm_ascend.kv_transfer.trust import Trust

if TYPE_CHECKING:
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.request import Request

logger = init_logger(f"vllm.{__name__}")

Params = dict[str, Any]  # Any: kv_transfer_params are JSON


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
        if len(tokens) and digest_of(request, remote.remote_num_tokens) != remote.remote_prompt_digest:
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
