# SPDX-License-Identifier: Apache-2.0
"""Requests that bring the same prefilled prompt: one pulls it, the others find it here.

Several answers to one prompt (n > 1) are several requests of vLLM, and a router may hand on one answer of
prefill twice. Prefill gives the blocks away as soon as they were read, so a second read would come too late.
The others wait for the first, whose blocks are a prefix hit for them then; what is left of the prompt, less
than a block, they compute.
"""

from __future__ import annotations

from collections import OrderedDict
from enum import Enum, auto

from vllm_ascend.kv_transfer.messages import RemotePrefill

REMEMBERED = 4096
"""How many prompts that were pulled are remembered: a second request for one comes soon or never."""

_Key = tuple[str, int]


class Prompt(Enum):
    """What has become of a prefilled prompt at this engine."""

    THERE = auto()
    """At the prefill engine, for the taking."""
    PULLING = auto()
    """A request pulls it."""
    PULLED = auto()
    """It was pulled, and the prefill engine has let go of it."""


class SharedPrompts:
    """Who brings which prefilled prompt. For the engine's thread."""

    def __init__(self, remembered: int = REMEMBERED) -> None:
        self._remembered = remembered
        self._bringers: dict[_Key, set[str]] = {}
        self._puller: dict[_Key, str] = {}
        self._pulled: OrderedDict[_Key, None] = OrderedDict()

    def state(self, remote: RemotePrefill) -> Prompt:
        """What a request that brings `remote` can count on now."""
        key = _key(remote)
        if key in self._puller:
            return Prompt.PULLING
        return Prompt.PULLED if key in self._pulled else Prompt.THERE

    def bring(self, remote: RemotePrefill, request_id: str) -> None:
        """The request may pull it."""
        self._bringers.setdefault(_key(remote), set()).add(request_id)

    def pull(self, remote: RemotePrefill, request_id: str) -> None:
        """The request, one of those who bring it, begins to pull."""
        self._puller[_key(remote)] = request_id

    def pulled(self, remote: RemotePrefill, loaded: bool) -> None:
        """The pull has ended. After one that failed the next may try, and learn for itself why not."""
        key = _key(remote)
        self.leave(remote, self._puller.pop(key))
        if loaded:
            self._pulled[key] = None
            if len(self._pulled) > self._remembered:
                self._pulled.popitem(last=False)

    def leave(self, remote: RemotePrefill, request_id: str) -> None:
        """The request needs it no more."""
        bringers = self._bringers[_key(remote)]
        bringers.remove(request_id)
        if not bringers:
            del self._bringers[_key(remote)]

    def is_wanted(self, remote: RemotePrefill) -> bool:
        """Whether some request may pull it yet, or does."""
        return _key(remote) in self._bringers


def _key(remote: RemotePrefill) -> _Key:
    return remote.remote_engine_id, remote.remote_lease
