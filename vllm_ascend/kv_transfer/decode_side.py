# SPDX-License-Identifier: Apache-2.0
"""Scheduler half of an engine that decodes: requests that bring KV, from their arrival to their end.

It tells vLLM how many tokens will come, hands the workers their pulls, and keeps and releases the blocks at
the prefill engines. Nothing here waits, and nothing raises for what a request brings: a request whose
parameters are of no use is computed locally.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from vllm.logger import init_logger

from vllm_ascend.errors import PeerNotAdmitted, WireError
from vllm_ascend.kv_transfer.blocks import Keeps
from vllm_ascend.kv_transfer.early import EarlyLoads, local_blocks
from vllm_ascend.kv_transfer.follower import Follower
from vllm_ascend.kv_transfer.keeper import Keeper
from vllm_ascend.kv_transfer.messages import NamedPrefill, RemotePrefill
from vllm_ascend.kv_transfer.metrics import TransferNumbers, TransferStats, nothing_moved
from vllm_ascend.kv_transfer.orders import GiveUp, Pull
from vllm_ascend.kv_transfer.sharing import Prompt, SharedPrompts
from vllm_ascend.kv_transfer.trust import Trust
from vllm_ascend.kv_transfer.usable import useful_tokens, why_unusable

if TYPE_CHECKING:
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.request import Request

logger = init_logger(f"vllm.{__name__}")

Params = dict[str, Any]  # Any: kv_transfer_params are JSON


class DecodeSide:
    """Requests whose prompt another engine computes or has computed, from their arrival to their end."""

    def __init__(
        self, keeps: Sequence[Keeps], block_size: int, patience_s: float, unheard_s: float, trust: Trust
    ) -> None:
        """`keeps`: for each KV cache group, what of a request's tokens it keeps.

        `patience_s` and `unheard_s` are those of `Follower`.
        """
        self._keeps = keeps
        self._trust = trust
        self._keeper = Keeper(trust)
        self._early = EarlyLoads(Follower(patience_s, unheard_s, trust), self._keeper, keeps, block_size)
        self._prompts = SharedPrompts()
        self._announced: dict[str, RemotePrefill | NamedPrefill] = {}
        self._pulling: dict[str, RemotePrefill | NamedPrefill] = {}
        self._ended_early: set[str] = set()
        self._num_declined = 0
        self._numbers: dict[str, TransferNumbers] = {}
        self._pulls: list[Pull] = []

    def announce(self, request: Request) -> None:
        """Note a request that brings `do_remote_prefill`, and keep its blocks at the prefill engine."""
        params = request.kv_transfer_params or {}
        remote: RemotePrefill | NamedPrefill
        try:
            remote = (NamedPrefill if "transfer_name" in params else RemotePrefill).parse(params)
            self._trust.check_host(remote.remote_host)
        except (WireError, PeerNotAdmitted) as error:
            self._decline(request, error)
            return
        if isinstance(remote, NamedPrefill):
            self._early.follow(remote)
        elif complaint := why_unusable(request, remote, self._keeps):
            self._decline(request, complaint)
            self._release_unless_wanted(remote)
            return
        else:
            self._keeper.hold(remote)
        self._announced[request.request_id] = remote
        self._prompts.bring(remote.key, request.request_id)

    def tokens_to_pull(self, request: Request, num_computed_tokens: int) -> int | None:
        """Tokens beyond the local prefix hit whose KV is worth pulling.

        None while another request pulls them, or nothing of them is computed yet.
        """
        remote = self._announced.get(request.request_id)
        if remote is None:
            return 0
        prompt = self._prompts.state(remote.key)
        if prompt is Prompt.PULLED:
            return 0
        if isinstance(remote, NamedPrefill):
            useful = self._early.useful_tokens(request, remote, num_computed_tokens)
            if isinstance(useful, str):
                self._decline(request, useful)
                del self._announced[request.request_id]
                self._leave(request, remote)
                return 0
        else:
            useful = useful_tokens(request, remote, self._keeps)
        if useful is None:
            return None
        num_tokens = max(0, useful - num_computed_tokens)
        return None if num_tokens and prompt is Prompt.PULLING else num_tokens

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
        self._prompts.pull(remote.key, request.request_id)
        if isinstance(remote, NamedPrefill):
            self._early.begin(request, remote, blocks.get_block_ids(), num_external_tokens)
            return
        useful = useful_tokens(request, remote, self._keeps)
        self._pulls.append(
            Pull(
                request_id=request.request_id,
                remote=remote,
                local_blocks=local_blocks(blocks.get_block_ids(), useful, self._keeps),
                load_start=useful - num_external_tokens,
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
        pulls, self._pulls = (*self._pulls, *self._early.take_parts()), []
        return pulls

    def take_given_up(self) -> tuple[GiveUp, ...]:
        """Of which requests the workers have read parts and will get no more, since the last call."""
        return self._early.take_given_up()

    def failed_somewhere(self, request_ids: Iterable[str]) -> None:
        """A rank could not read a part of these: the others need not go on."""
        for request_id in request_ids:
            self._early.stop(request_id, "another rank of this engine could not read it", "read")

    def add_numbers(self, numbers: Mapping[str, TransferNumbers]) -> None:
        """What ranks report of requests that they have read."""
        for request_id, of_rank in numbers.items():
            known = self._numbers.get(request_id)
            self._numbers[request_id] = of_rank if known is None else known.merged(of_rank)

    def loaded(self, request_id: str, failed: bool) -> None:
        """Every rank is done with the request, for better or worse."""
        remote = self._pulling.pop(request_id, None)
        if remote is not None:
            self._prompts.pulled(remote.key, loaded=not failed)
            self._let_go(request_id, remote, loaded=not failed)
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
            self._early.stop(request.request_id, "its request has ended", None)
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
        """End the threads. May be called twice."""
        self._early.close()
        self._keeper.close()

    def _let_go(self, request_id: str, remote: RemotePrefill | NamedPrefill, loaded: bool) -> None:
        """Every rank is done with the request's load."""
        if isinstance(remote, RemotePrefill):
            self._keeper.drop(remote)
            return
        # The ranks may all have failed before the last part was asked for; they forget the request now.
        self._early.stop(request_id, "no rank could read it", None)
        if not loaded:
            # Not every rank has said done: that is for the last part, to which some have not come.
            self._release_unless_wanted(remote)
        elif not self._prompts.is_wanted(remote.key):
            self._early.drop(remote)

    def _leave(self, request: Request, remote: RemotePrefill | NamedPrefill) -> None:
        """The request has no use for what it brought."""
        self._prompts.leave(remote.key, request.request_id)
        self._early.leave(request.request_id)
        self._release_unless_wanted(remote)

    def _release_unless_wanted(self, remote: RemotePrefill | NamedPrefill) -> None:
        if self._prompts.is_wanted(remote.key):
            return
        if isinstance(remote, NamedPrefill):
            self._early.forgo(remote)
        else:
            self._keeper.release(remote)

    def _decline(self, request: Request, reason: object) -> None:
        logger.warning("request %s is computed here: %s", request.request_id, reason)
        self._num_declined += 1
