# SPDX-License-Identifier: Apache-2.0
"""What of a prefilled prompt a request of this engine can use, and why it cannot use any."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from vllm_ascend.kv_transfer.blocks import NULL_BLOCK, Keeps, positions_of, tokens_seen
from vllm_ascend.kv_transfer.messages import RemotePrefill
from vllm_ascend.kv_transfer.prompts import digest_of
from vllm_ascend.kv_transfer.topology import Span

if TYPE_CHECKING:
    from vllm.v1.request import Request


def useful_tokens(request: Request, remote: RemotePrefill, keeps: Sequence[Keeps]) -> int:
    """Where the interval of prompt tokens ends whose KV is at the prefill engine and of use here.

    The last prompt token is not: decode runs it to get the next one, and computes its KV on the way.
    """
    rooms = [
        len(blocks) * remote.remote_block_size
        for group, blocks in zip(keeps, remote.remote_block_ids, strict=True)
        if not group.is_state
    ]
    return min(request.num_prompt_tokens - 1, remote.remote_num_tokens, *rooms)


def why_unusable(request: Request, remote: RemotePrefill, keeps: Sequence[Keeps]) -> str | None:
    """A sentence on why the prefill engine's blocks cannot be pulled, or None."""
    if complaint := why_other_groups(remote, keeps):
        return complaint
    tokens = Span(0, useful_tokens(request, remote, keeps))
    if len(tokens) and digest_of(request, remote.remote_num_tokens) != remote.remote_prompt_digest:
        return another_prompt(remote)
    for blocks, group in zip(remote.remote_block_ids, keeps, strict=True):
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


def why_other_groups(remote: RemotePrefill, keeps: Sequence[Keeps]) -> str | None:
    """A sentence on block lists that are not those of this engine's KV cache groups, or None."""
    found = len(remote.remote_block_ids)
    if found == len(keeps):
        return None
    return (
        f"prefill engine {remote.remote_engine_id} has {found} KV cache groups and this engine "
        f"{len(keeps)}; start both with the same model and options"
    )


def another_prompt(remote: RemotePrefill) -> str:
    """A sentence on a digest that is not that of the request's prompt."""
    return (
        f"prefill engine {remote.remote_engine_id} computed another prompt; send it one prompt per "
        f"request, and the same to both engines"
    )


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
