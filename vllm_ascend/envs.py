# SPDX-License-Identifier: Apache-2.0
"""Every VLLM_ASCEND_* environment variable: type, default, meaning, check.

A variable is read where it is used, never at import, through the constant below that stands for it:

    SOME_LIMIT.get()

`check_all` reads them all. vLLM's platform hook calls it when an engine is configured, so that a value which
cannot be used, or a name with a typing error, ends the engine before it has started.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

from vllm_ascend.errors import ConfigError

T = TypeVar("T")

PREFIX = "VLLM_ASCEND_"


@dataclass(frozen=True)
class Variable(Generic[T]):
    """One environment variable, named `VLLM_ASCEND_...`."""

    name: str
    default: T
    meaning: str
    """What it does, in a sentence, with its unit: the text of docs/configuration.md."""
    parse: Callable[[str], T]
    """From the text in the environment to a value; raises ValueError saying what is accepted."""

    def get(self) -> T:
        """The value in the environment, or the default. Raises ConfigError for an unusable value."""
        text = os.environ.get(self.name)
        if text is None:
            return self.default
        try:
            return self.parse(text)
        except ValueError as error:
            raise ConfigError(f"{self.name}={text!r} cannot be used: {error}") from error


VARIABLES: tuple[Variable[object], ...] = ()
"""All of them, in the order of docs/configuration.md."""


def check_all() -> None:
    """Raise ConfigError for the first VLLM_ASCEND_* variable that is unknown or has an unusable value."""
    known = {variable.name: variable for variable in VARIABLES}
    for name in sorted(os.environ):
        if not name.startswith(PREFIX):
            continue
        if name not in known:
            raise ConfigError(
                f"{name} is not a variable of vllm-ascend; known are: {', '.join(known) or 'none'}. Unset it"
            )
        known[name].get()
