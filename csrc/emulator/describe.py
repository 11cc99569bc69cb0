# SPDX-License-Identifier: Apache-2.0
"""Writes the tables of `docs/emulator.md` from the sources, so that they name what is there and nothing else.

`python csrc/emulator/describe.py` writes them; with `--check` it ends with status 1 if that would change the
document. A call's words in the table are the comment above its definition.
"""

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

EMULATOR = Path(__file__).parent
DOCUMENT = EMULATOR.parents[1] / "docs" / "emulator.md"

LIBRARIES = {
    "libascendcl": "acl/*.cpp",
    "libacl_op_compiler": "op_compiler/*.cpp",
    "libhccl": "hccl/*.cpp",
    "libhcomm": "hccl/hcomm/*.cpp",
    "libopapi": "opapi/*.cpp",
}

_ENTRY_POINTS = re.compile(r'^extern "C" \{\n(.*?)^\}  // extern "C"$', re.MULTILINE | re.DOTALL)
_DEFINITION = re.compile(
    r"(?P<comment>(?:^//[^\n]*\n)*)"
    r"^(?!return|using|static)[\w:][\w: *]*?\b(?P<name>(?:acl|Hccl|Msprof)\w+)\(",
    re.MULTILINE,
)
_OPERATOR = re.compile(r'\b(?P<space>npu|atb)\.Implement\(\s*(?:"(?P<literal>[\w.]+)"|(?P<constant>k\w+))')
_CONSTANT = re.compile(r'constexpr (?:const char\* |char )(?P<name>k\w+)(?:\[\])? = "(?P<value>[\w.]+)";')
_REFUSED = re.compile(r"^(?P<library>[a-z_]+) +[a-z]+ +(?P<symbol>\w+)$", re.MULTILINE)


class Call(NamedTuple):
    """An entry point of a library, and what its source says about it (empty: it does what CANN says)."""

    name: str
    remark: str


def main(arguments: list[str]) -> int:
    before = DOCUMENT.read_text()
    after = with_tables(before)
    if "--check" in arguments:
        return int(before != after)
    DOCUMENT.write_text(after)
    return 0


def with_tables(document: str) -> str:
    """`document` with the text between each pair of markers made anew."""
    tables = {"calls": _calls_table(), "operators": _operators_table(), "refused": _refused_table()}
    for name, table in tables.items():
        start, end = f"<!-- {name}: written by csrc/emulator/describe.py -->\n", f"<!-- end of {name} -->\n"
        head, rest = document.split(start)
        tail = rest.split(end)[1]
        document = head + start + table + end + tail
    return document


def calls(pattern: str) -> list[Call]:
    """The entry points that the sources matching `pattern` define, by name."""
    found = [call for path in EMULATOR.glob(pattern) for call in _calls_in(path.read_text())]
    return sorted(found)


def _calls_in(source: str) -> Iterator[Call]:
    for block in _ENTRY_POINTS.finditer(source):
        for match in _DEFINITION.finditer(block[1]):
            lines = [line.lstrip("/").strip() for line in match["comment"].splitlines()]
            yield Call(match["name"], " ".join(lines))


def operators() -> list[str]:
    """The operators of torch_npu that the kernel library implements, as namespace::name."""
    found = set()
    for path in EMULATOR.glob("aten/op_*.cpp"):
        source = path.read_text()
        constants = {match["name"]: match["value"] for match in _CONSTANT.finditer(source)}
        for match in _OPERATOR.finditer(source):
            name = match["literal"] or constants[match["constant"]]
            found.add(f"{match['space']}::{name.split('.')[0]}")
    return sorted(found)


def _calls_table() -> str:
    lines = ["| library | call | where it differs from a card, or what it settles |", "|---|---|---|"]
    for library, pattern in LIBRARIES.items():
        lines += [f"| {library} | `{call.name}` | {call.remark} |" for call in calls(pattern)]
    return "\n".join(lines) + "\n"


def _operators_table() -> str:
    return "".join(f"- `{name}`\n" for name in operators())


def _refused_table() -> str:
    symbols = (EMULATOR / "unsupported" / "symbols.txt").read_text()
    by_library: dict[str, list[str]] = {}
    for match in _REFUSED.finditer(symbols):
        by_library.setdefault(f"lib{match['library']}", []).append(match["symbol"])
    lines = ["| library | symbols |", "|---|---|"]
    for library, names in by_library.items():
        lines.append(f"| {library} | {', '.join(f'`{name}`' for name in names)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
