# SPDX-License-Identifier: Apache-2.0
"""Writes the table of `docs/models.md` from `families`, so that it names what is compared and nothing else.

With PYTHONPATH=tests:examples/recall_model, `python -m vllm_ascend.emulator python -m engine.describe_models`
does so; `test_families.py` fails where that would change the document.
"""

from __future__ import annotations

from pathlib import Path

from engine.families import FAMILIES, LOG_PROBABILITY_TOLERANCE, NUM_NEW_TOKENS, PROMPT_LENGTHS
from engine.pictures import DISAGGREGATED, QUESTIONS, SEEING
from engine.pictures import NUM_NEW_TOKENS as NUM_NEW_TOKENS_ABOUT_PICTURES

DOCUMENT = Path(__file__).parents[2] / "docs" / "models.md"
_START = "<!-- models: written by tests/engine/describe_models.py -->\n"
_END = "<!-- end of models -->\n"


def main() -> None:
    DOCUMENT.write_text(with_table(DOCUMENT.read_text()))


def with_table(document: str) -> str:
    """`document` with what stands between the two markers made anew."""
    head, rest = document.split(_START)
    return head + _START + _table() + _END + rest.split(_END)[1]


def _table() -> str:
    close = (
        f"the same {len(PROMPT_LENGTHS)} × {NUM_NEW_TOKENS} greedy tokens, "
        f"log-probabilities within {LOG_PROBABILITY_TOLERANCE:g}"
    )
    lines = [
        f"{len(FAMILIES)} architectures, each against transformers in float32: {close}.",
        "",
        "| architecture | what it has that not every one has | on |",
        "|---|---|---|",
    ]
    for name, family in FAMILIES.items():
        lines.append(f"| {name} | {family.shows} | {', '.join(('one NPU', *family.spread))} |")
    asked = f"{len(QUESTIONS)} × {NUM_NEW_TOKENS_ABOUT_PICTURES} tokens, asked twice"
    lines += [
        "",
        f"{len(SEEING)} that see, compared in the same way ({asked}), with up to two pictures in a prompt:",
        "",
        "| architecture | what it has that not every one has | on |",
        "|---|---|---|",
    ]
    for name, model in SEEING.items():
        places = "one NPU, TP 2 → 1" if name == DISAGGREGATED else "one NPU"
        lines.append(f"| {name} | {model.shows} | {places} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
