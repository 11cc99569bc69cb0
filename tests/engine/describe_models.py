# SPDX-License-Identifier: Apache-2.0
"""Writes the tables of `docs/models.md` from `families` and `pooling`, so that they name what is compared.

With PYTHONPATH=tests:examples/recall_model, `python -m vllm_ascend.emulator python -m engine.describe_models`
does so; `test_families.py` fails where that would change the document.
"""

from __future__ import annotations

from pathlib import Path

from engine import pooling
from engine.families import FAMILIES, LOG_PROBABILITY_TOLERANCE, NUM_NEW_TOKENS, PROMPT_LENGTHS
from engine.hearing import HEARING
from engine.pictures import DISAGGREGATED, QUESTIONS, SEEING
from engine.pooling import COSINE_DISTANCE_TOLERANCE, POOLING_FAMILIES, SCORE_TOLERANCE
from engine.sensing import NUM_NEW_TOKENS as NUM_NEW_TOKENS_OF_SENSING

DOCUMENT = Path(__file__).parents[2] / "docs" / "models.md"


def main() -> None:
    DOCUMENT.write_text(with_table(DOCUMENT.read_text()))


def with_table(document: str) -> str:
    """`document` with what stands between each pair of markers made anew."""
    for name, table in {"models": _generating(), "pooling models": _pooling()}.items():
        start, end = (
            f"<!-- {name}: written by tests/engine/describe_models.py -->\n",
            f"<!-- end of {name} -->\n",
        )
        head, rest = document.split(start)
        document = head + start + table + end + rest.split(end)[1]
    return document


def _generating() -> str:
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
    senses = f"{len(SEEING)} that see, with up to two pictures in a prompt, and {len(HEARING)} that hears"
    asked = f"{len(QUESTIONS)} × {NUM_NEW_TOKENS_OF_SENSING} tokens, asked twice"
    lines += [
        "",
        f"{senses}, compared in the same way ({asked}):",
        "",
        "| architecture | what it has that not every one has | on |",
        "|---|---|---|",
    ]
    for name, model in {**SEEING, **HEARING}.items():
        places = "one NPU, TP 2 → 1" if name == DISAGGREGATED else "one NPU"
        lines.append(f"| {name} | {model.shows} | {places} |")
    return "\n".join(lines) + "\n"


def _pooling() -> str:
    close = {
        "embed": f"embedding, cosine distance below {COSINE_DISTANCE_TOLERANCE:g}",
        "classify": f"scores within {SCORE_TOLERANCE:g}",
        "token_classify": f"scores of each token within {SCORE_TOLERANCE:g}",
    }
    lengths = pooling.PROMPT_LENGTHS
    prompts = f"{len(lengths)} prompts of {min(lengths)} to {max(lengths)} tokens"
    lines = [
        f"{len(POOLING_FAMILIES)} architectures, each against transformers in float32 on {prompts}.",
        "",
        "| architecture | what it has that not every one has | how close | on |",
        "|---|---|---|---|",
    ]
    for name, family in POOLING_FAMILIES.items():
        on = ", ".join(("one NPU", *family.spread))
        lines.append(f"| {name} | {family.shows} | {close[family.task]} | {on} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
