# SPDX-License-Identifier: Apache-2.0
"""What the doctor says: one finding per thing looked at."""

from __future__ import annotations

import enum
from collections.abc import Iterable
from dataclasses import dataclass

_NAME_WIDTH = 12


class Grade(enum.Enum):
    """How bad it is."""

    OK = "ok"
    WARN = "warn"
    FAIL = "FAIL"


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    grade: Grade
    subject: str
    """One or two words, such as `torch_npu`."""
    found: str
    cure: str = ""
    """What to do, unless it is ok."""

    def lines(self) -> Iterable[str]:
        """As they are printed."""
        yield f"{self.grade.value:<4}  {self.subject:<{_NAME_WIDTH}}  {self.found}"
        if self.cure:
            yield f"{'':<4}  {'':<{_NAME_WIDTH}}  -> {self.cure}"


def ok(subject: str, found: str) -> Finding:
    return Finding(Grade.OK, subject, found)


def warn(subject: str, found: str, cure: str) -> Finding:
    return Finding(Grade.WARN, subject, found, cure)


def fail(subject: str, found: str, cure: str) -> Finding:
    return Finding(Grade.FAIL, subject, found, cure)


def from_sentence(subject: str, sentence: object) -> Finding:
    """A failure told by one of this package's errors: what was found, a semicolon, what to change."""
    found, _, cure = str(sentence).rpartition("; ")
    return fail(subject, found or cure, cure)
