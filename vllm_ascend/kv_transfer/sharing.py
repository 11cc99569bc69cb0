# SPDX-License-Identifier: Apache-2.0
"""Requests that bring the same prefilled prompt: one pulls it, the others find it here.

Several answers to one prompt (n > 1) are several requests of vLLM, and a router may hand on one answer of
prefill twice. Prefill gives the blocks away as soon as they were read, so a second read would come too late.
The others wait for the first, whose blocks are a prefix hit for them then; what is left of the prompt, less
than a block, they compute.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from enum import Enum, auto

REMEMBERED = 4096
"""How many prompts that were pulled are remembered: a second request for one comes soon or never."""


class Prompt(Enum):
    """What has become of a prefilled prompt at this engine."""

    THERE = auto()
    """At the prefill engine, for the taking."""
    PULLING = auto()
    """A request pulls it."""
    PULLED = auto()
    """It was pulled, and the prefill engine has let go of it."""


class SharedPrompts:
    """Who brings which prefilled prompt, by its `key`. For the engine's thread."""

    def __init__(self, remembered: int = REMEMBERED) -> None:
        self._remembered = remembered
        self._bringers: dict[Hashable, set[str]] = {}
        self._puller: dict[Hashable, str] = {}
        self._pulled: OrderedDict[Hashable, None] = OrderedDict()

    def state(self, prompt: Hashable) -> Prompt:
        """What a request that brings `prompt` can count on now."""
        if prompt in self._puller:
            return Prompt.PULLING
        return Prompt.PULLED if prompt in self._pulled else Prompt.THERE

    def bring(self, prompt: Hashable, request_id: str) -> None:
        """The request may pull it."""
        self._bringers.setdefault(prompt, set()).add(request_id)

    def pull(self, prompt: Hashable, request_id: str) -> None:
        """The request, one of those who bring it, begins to pull."""
        self._puller[prompt] = request_id

    def pulled(self, prompt: Hashable, loaded: bool) -> None:
        """The pull has ended. After one that failed the next may try, and learn for itself why not."""
        self.leave(prompt, self._puller.pop(prompt))
        if loaded:
            self._pulled[prompt] = None
            if len(self._pulled) > self._remembered:
                self._pulled.popitem(last=False)

    def leave(self, prompt: Hashable, request_id: str) -> None:
        """The request needs it no more."""
        bringers = self._bringers[prompt]
        bringers.remove(request_id)
        if not bringers:
            del self._bringers[prompt]

    def is_wanted(self, prompt: Hashable) -> bool:
        """Whether some request may pull it yet, or does."""
        return prompt in self._bringers
