# SPDX-License-Identifier: Apache-2.0
"""What an engine's scheduler half has every rank's worker half do."""

from __future__ import annotations

from dataclasses import dataclass

from vllm_ascend.kv_transfer.messages import RemotePrefill


@dataclass(frozen=True)
class Pull:
    """One request's load or a part of it, as the scheduler half asks every rank's worker half for it.

    The parts of a load are read in their order. Only the last one, which may be empty, is followed by the
    question whether the lease held. A part that does not begin where the one before it ended begins anew,
    where the load begins: what was read before it does not count.
    """

    request_id: str
    remote: RemotePrefill
    local_blocks: tuple[tuple[int, ...], ...]
    """The request's blocks here, as `remote.remote_block_ids` are there."""
    load_start: int
    """Where the local prefix hit ends, and the load begins."""
    first_token: int
    """Where this part of it begins."""
    tokens: int
    """Tokens whose KV is to be read, from there on."""
    prompt_tokens: int
    is_last: bool = True


@dataclass(frozen=True)
class GiveUp:
    """No part of a request's load will come any more, since it failed or is not wanted."""

    request_id: str
    reason: str
    kind: str | None
    """Which failure it is, one of metrics.FAILURES; None: none, since the request has ended."""


@dataclass(frozen=True)
class ToSum:
    """A finished request whose KV every rank's worker half is to sum."""

    request_id: str
    blocks: tuple[tuple[int, ...], ...]
    """For each KV cache group, as `RemotePrefill.remote_block_ids`."""
    tokens: int
