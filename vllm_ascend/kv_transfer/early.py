# SPDX-License-Identifier: Apache-2.0
"""Loads that begin while the prefill engine computes their prompt: what of them is asked for, and when.

A request brings the name that its router gave it there. It waits until something of the prompt is in memory,
is given its blocks then, and is read in parts as more of it is. The last part goes out when the whole prompt
is there, and is an ordinary pull of what is left. What was read under another lease of the prefill engine's
blocks does not count: a request that is preempted there is read from its first token again.

For the engine's thread. A load that has begun ends with its last part or with a `GiveUp`, never with both.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, assert_never

from vllm_ascend.kv_transfer.blocks import Keeps, state_block
from vllm_ascend.kv_transfer.follower import Follower, Lost, News
from vllm_ascend.kv_transfer.growth import Growth
from vllm_ascend.kv_transfer.keeper import Keeper
from vllm_ascend.kv_transfer.messages import Ended, Growing, NamedPrefill, RemotePrefill
from vllm_ascend.kv_transfer.orders import GiveUp, Pull
from vllm_ascend.kv_transfer.prompts import digest_of
from vllm_ascend.kv_transfer.topology import Span
from vllm_ascend.kv_transfer.usable import another_prompt, useful_tokens, why_other_groups, why_unusable

if TYPE_CHECKING:
    from vllm.v1.request import Request


@dataclass
class _Load:
    """A request that has its blocks."""

    request: Request
    named: NamedPrefill
    local_blocks: tuple[tuple[int, ...], ...]
    growth: Growth


class EarlyLoads:
    """Requests that bring a name, and what was heard of each."""

    def __init__(self, follower: Follower, keeper: Keeper, keeps: Sequence[Keeps], block_size: int) -> None:
        self._follower = follower
        self._keeper = keeper
        self._keeps = keeps
        self._block_size = block_size
        self._heard: dict[Hashable, News | None] = {}
        self._checked: dict[str, str | None] = {}
        self._loads: dict[str, _Load] = {}
        self._given_up: list[GiveUp] = []

    def follow(self, named: NamedPrefill) -> None:
        """A request brings it."""
        if named.key not in self._heard:
            self._heard[named.key] = None
            self._follower.follow(named)

    def drop(self, named: NamedPrefill) -> None:
        """It was read."""
        heard = self._heard.pop(named.key, None)
        if isinstance(heard, Ended):
            self._keeper.drop(heard.prefill)
        else:
            self._follower.drop(named)

    def forgo(self, named: NamedPrefill) -> None:
        """No request wants it any more."""
        heard = self._heard.pop(named.key, None)
        if isinstance(heard, Ended):
            self._keeper.release(heard.prefill)
        else:
            self._follower.forgo(named)

    def useful_tokens(
        self, request: Request, named: NamedPrefill, num_computed_tokens: int
    ) -> int | str | None:
        """Where the interval of prompt tokens ends that will be there to be pulled.

        None: nothing behind the local prefix hit can be read yet. A sentence: why it is of no use.
        """
        if num_computed_tokens >= request.num_prompt_tokens - 1:
            return num_computed_tokens
        self._hear()
        heard = self._heard[named.key]
        match heard:
            case None:
                return None
            case Lost():
                # A load that fails, so that it ends as loads that fail do at this engine.
                return self._stop(request, heard)
            case Ended():
                return self._complaint(request, heard) or self._stop(request, heard)
            case Growing(so_far=so_far):
                stop = self._stop(request, heard)
                if stop <= num_computed_tokens:
                    return stop
                growth = Growth.begun(Span(num_computed_tokens, stop), self._block_size)
                if not len(_readable(growth, so_far)):
                    return None
                return self._complaint(request, heard) or stop
            case _:
                assert_never(heard)

    def leave(self, request_id: str) -> None:
        """The request, which has no blocks, has no use for what it brought."""
        self._checked.pop(request_id, None)

    def begin(
        self, request: Request, named: NamedPrefill, block_ids: Sequence[Sequence[int]], num_tokens: int
    ) -> None:
        """The request has its blocks: read `num_tokens` of the prompt into them, the last that are useful."""
        stop = self._stop(request, self._heard[named.key])
        growth = Growth.begun(Span(stop - num_tokens, stop), self._block_size)
        blocks = local_blocks(block_ids, stop, self._keeps)
        self._loads[request.request_id] = _Load(request, named, blocks, growth)
        self._checked.pop(request.request_id, None)

    def take_parts(self) -> list[Pull]:
        """What the ranks are to read, since the last call."""
        # Also of requests that vLLM has no room for, and asks nothing about: their leases are to be kept.
        self._hear()
        return [part for load in list(self._loads.values()) if (part := self._next_part(load)) is not None]

    def take_given_up(self) -> tuple[GiveUp, ...]:
        """Which loads the ranks are to end, since the last call. To be called after `take_parts`."""
        given_up, self._given_up = tuple(self._given_up), []
        return given_up

    def stop(self, request_id: str, reason: str, kind: str | None) -> None:
        """Ask for no more of the request, if its last part was not asked for yet; see `GiveUp`."""
        if self._loads.pop(request_id, None) is not None:
            self._given_up.append(GiveUp(request_id, reason, kind))

    def close(self) -> None:
        """End the follower. May be called twice."""
        self._follower.close()

    def _hear(self) -> None:
        for named, news in self._follower.take_news():
            # Of a name that nobody wants any more there may be news on the way.
            if named.key in self._heard:
                self._heard[named.key] = news
                if isinstance(news, Ended):
                    self._keeper.hold(news.prefill)

    def _next_part(self, load: _Load) -> Pull | None:
        heard = self._heard[load.named.key]
        request_id = load.request.request_id
        match heard:
            case Growing(so_far=so_far):
                part = _readable(load.growth, so_far)
                if not len(part):
                    return None
                if complaint := why_other_groups(so_far, self._keeps):
                    self.stop(request_id, complaint, "mismatch")
                    return None
                load.growth = load.growth.after(so_far.remote_lease, part)
                return _pull(load, so_far, part, is_last=False)
            case Ended(prefill=prefill):
                if complaint := self._complaint_at_end(load, prefill):
                    self.stop(request_id, complaint, "read")
                    return None
                del self._loads[request_id]
                return _pull(load, prefill, load.growth.rest(prefill.remote_lease), is_last=True)
            case Lost(reason=reason, kind=kind):
                self.stop(request_id, reason, kind)
                return None
            case None:
                raise AssertionError(f"the load of {request_id} began before anything was heard of it")
            case _:
                assert_never(heard)

    def _stop(self, request: Request, heard: News | None) -> int:
        """Where the useful tokens end, by what was heard."""
        match heard:
            case Growing(prompt_tokens=prompt_tokens):
                return min(request.num_prompt_tokens - 1, prompt_tokens)
            case Ended(prefill=prefill):
                return useful_tokens(request, prefill, self._keeps)
            case _:
                return request.num_prompt_tokens - 1

    def _complaint(self, request: Request, heard: Growing | Ended) -> str | None:
        """Why what was heard of is of no use to the request, found out once."""
        if request.request_id not in self._checked:
            self._checked[request.request_id] = self._complaint_about(request, heard)
        return self._checked[request.request_id]

    def _complaint_about(self, request: Request, heard: Growing | Ended) -> str | None:
        if isinstance(heard, Ended):
            return why_unusable(request, heard.prefill, self._keeps)
        if complaint := why_other_groups(heard.so_far, self._keeps):
            return complaint
        if digest_of(request, heard.prompt_tokens) != heard.so_far.remote_prompt_digest:
            return another_prompt(heard.so_far)
        return None

    def _complaint_at_end(self, load: _Load, prefill: RemotePrefill) -> str | None:
        """Why the load cannot be finished, or None."""
        if complaint := why_unusable(load.request, prefill, self._keeps):
            return complaint
        found, wanted = useful_tokens(load.request, prefill, self._keeps), load.growth.wanted.stop
        if found < wanted:
            return (
                f"prefill engine {prefill.remote_engine_id} has the KV of {found} tokens and said that there "
                f"would be {wanted}; send both engines the same prompt"
            )
        return None


def local_blocks(
    block_ids: Sequence[Sequence[int]], num_tokens: int, keeps: Sequence[Keeps]
) -> tuple[tuple[int, ...], ...]:
    """Of a request's blocks in each KV cache group, those that are written when `num_tokens` are pulled."""
    return tuple(
        tuple(ids)
        if group.tokens_per_state is None
        else (state_block(ids, num_tokens, group.tokens_per_state),)
        for group, ids in zip(keeps, block_ids, strict=True)
    )


def _readable(growth: Growth, so_far: RemotePrefill) -> Span:
    return growth.readable(so_far.remote_lease, so_far.remote_num_tokens, so_far.remote_block_size)


def _pull(load: _Load, remote: RemotePrefill, part: Span, is_last: bool) -> Pull:
    return Pull(
        request_id=load.request.request_id,
        remote=remote,
        local_blocks=load.local_blocks,
        load_start=load.growth.wanted.start,
        first_token=part.start,
        tokens=len(part),
        prompt_tokens=load.request.num_prompt_tokens,
        is_last=is_last,
    )
