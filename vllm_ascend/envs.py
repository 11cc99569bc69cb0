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
from pathlib import Path
from typing import Generic, TypeVar

from vllm_ascend.errors import ConfigError

T_co = TypeVar("T_co", covariant=True)

PREFIX = "VLLM_ASCEND_"


@dataclass(frozen=True)
class Variable(Generic[T_co]):
    """One environment variable, named `VLLM_ASCEND_...`."""

    name: str
    default: T_co
    meaning: str
    """What it does, in a sentence, with its unit: the text of docs/configuration.md."""
    parse: Callable[[str], T_co]
    """From the text in the environment to a value; raises ValueError saying what is accepted."""

    hidden: bool = False
    """Whether the value must not appear in a message."""

    def get(self) -> T_co:
        """The value in the environment, or the default. Raises ConfigError for an unusable value."""
        text = os.environ.get(self.name)
        if text is None:
            return self.default
        try:
            return self.parse(text)
        except ValueError as error:
            shown = self.name if self.hidden else f"{self.name}={text!r}"
            raise ConfigError(f"{shown} cannot be used: {error}") from error


def _secret(text: str) -> str:
    secret = text.strip()
    if len(secret) < _SHORTEST_SECRET:
        raise ValueError(
            f"a secret has at least {_SHORTEST_SECRET} characters and this one {len(secret)}; make one with "
            f"`openssl rand -hex 32`"
        )
    return secret


def _secret_in_file(text: str) -> str:
    try:
        return _secret(Path(text).read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"it cannot be read ({error.strerror})") from error


_SHORTEST_SECRET = 16

KV_SECRET: Variable[str | None] = Variable(
    "VLLM_ASCEND_KV_SECRET",
    None,
    "Secret of engines that exchange KV, 16 characters or more: only who knows it is answered, in cipher.",
    _secret,
    hidden=True,
)
KV_SECRET_FILE: Variable[str | None] = Variable(
    "VLLM_ASCEND_KV_SECRET_FILE",
    None,
    "A file that holds the secret, instead of VLLM_ASCEND_KV_SECRET.",
    _secret_in_file,
)

VARIABLES: tuple[Variable[object], ...] = (KV_SECRET, KV_SECRET_FILE)
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
