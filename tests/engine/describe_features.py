# SPDX-License-Identifier: Apache-2.0
"""Writes the table of `docs/features.md`: what users of vLLM expect, and the test that shows or refuses it.

With PYTHONPATH=tests, `python -m engine.describe_features` does so; `test_features.py` fails where that would
change the document, or where a test is not there.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
DOCUMENT = ROOT / "docs" / "features.md"
_START = "<!-- features: written by tests/engine/describe_features.py -->\n"
_END = "<!-- end of features -->\n"

_FEATURES = "engine/test_features.py"
_REFUSALS = "engine/test_refusals.py"
_TRANSFORMERS = "engine/test_against_transformers.py"


@dataclass(frozen=True)
class Feature:
    """A feature of vLLM, and what this release does with it."""

    name: str
    shown: str
    """What it is compared with, and how close; or how it is refused."""
    test: str
    """A file below `tests` and a function in it."""

    def file_and_function(self) -> tuple[Path, str]:
        file, function = self.test.split("::")
        return ROOT / "tests" / file, function


FEATURES = (
    Feature(
        "Log-probabilities, of the prompt too",
        "transformers, within 0.001; the best tokens are the same",
        f"{_FEATURES}::test_log_probabilities",
    ),
    Feature(
        "Several samples (`n`), seeds, `top_k`",
        "three different ones, each with transformers' log-probabilities within 0.001",
        f"{_FEATURES}::test_several_samples",
    ),
    Feature(
        "Repetition, presence and frequency penalties",
        "their formulas over transformers' logits; the same tokens",
        f"{_FEATURES}::test_penalties",
    ),
    Feature("Stop tokens", "the first of them ends the answer", f"{_FEATURES}::test_stop_tokens"),
    Feature("Stop strings", "an answer known beforehand ends there", f"{_FEATURES}::test_stop_strings"),
    Feature(
        "Structured output: choices",
        "the allowed token to which transformers gives most, beside a request without constraint",
        f"{_FEATURES}::test_a_choice_is_the_likeliest_of_those_allowed",
    ),
    Feature(
        "Structured output: regular expressions",
        "the answer matches",
        f"{_FEATURES}::test_a_regular_expression_is_kept_to",
    ),
    Feature(
        "LoRA of mixtures of experts",
        "refused by name at the start",
        f"{_REFUSALS}::test_adapters_of_experts_are_refused",
    ),
    Feature(
        "LoRA",
        "transformers with merged weights; two adapters and none in one batch; the same tokens",
        f"{_FEATURES}::test_adapters_in_one_batch",
    ),
    Feature(
        "Speculative decoding: n-gram",
        "transformers; the same tokens, with drafts kept and drafts rejected",
        f"{_FEATURES}::test_drafts_from_the_prompt_change_no_token",
    ),
    Feature(
        "Speculative decoding: draft model",
        "transformers; the same tokens, with drafts kept and drafts rejected",
        f"{_FEATURES}::test_a_drafter_changes_no_token",
    ),
    Feature(
        "Speculative decoding: EAGLE, MTP",
        "transformers; the same tokens, and as many drafts kept as with a head of transformers' modules",
        f"{_FEATURES}::test_a_head_changes_no_token_and_its_drafts_are_kept",
    ),
    Feature(
        "Speculative decoding: n-gram on a decode engine that pulls KV",
        "right answers known beforehand, with drafts kept and drafts rejected",
        "disaggregated/test_drafts.py::test_answers_are_right_with_drafts_kept_and_rejected",
    ),
    Feature(
        "Speculative decoding: EAGLE-3, Medusa, suffix and others; parallel drafting; other ways to "
        "reject; beside a KV connector otherwise",
        "refused by name at the start",
        f"{_REFUSALS}::test_options_are_refused_by_name",
    ),
    Feature(
        "Embeddings by OpenAI's API (`/v1/embeddings`), scores and ranks by them (`/score`, `/rerank`)",
        "transformers; cosine distance below 0.0001, the same ranks",
        "engine/test_pooling_server.py::test_embeddings_are_those_of_transformers",
    ),
    Feature(
        "Pictures in prompts, their prefixes cached by what they show",
        "transformers, three architectures; the same tokens, log-probabilities within 0.001",
        "engine/test_pictures.py::test_tokens_and_log_probabilities_are_those_of_transformers",
    ),
    Feature(
        "Recordings, to which a decoder listens through an encoder",
        "transformers, one architecture; the same tokens, log-probabilities within 0.001",
        "engine/test_pictures.py::test_tokens_and_log_probabilities_are_those_of_transformers",
    ),
    Feature(
        "Pictures in chat requests, of one engine and through two",
        "transformers; the same tokens",
        "disaggregated/test_pictures.py::test_two_engines_answer_as_transformers_does",
    ),
    Feature("Priority scheduling", "the lowest number is served first", f"{_FEATURES}::test_priorities"),
    Feature(
        "Asynchronous scheduling",
        "the default, and so in every comparison; switched off for the recall model in `test_features.py`",
        f"{_TRANSFORMERS}::test_greedy_tokens_are_those_of_transformers",
    ),
    Feature("`vllm bench latency`", "it measures", "engine/test_bench.py::test_latency"),
    Feature(
        "`vllm bench serve`",
        "all requests are completed, with all their tokens",
        "disaggregated/test_topologies.py::test_vllm_bench_serve_measures_an_engine",
    ),
    Feature("Sleep mode", "refused by vLLM at the start", f"{_REFUSALS}::test_sleep_mode_is_refused_by_vllm"),
    Feature(
        "Graphs, compilation, quantised weights",
        "refused by name at the start",
        f"{_REFUSALS}::test_options_are_refused_by_name",
    ),
)


def main() -> None:
    DOCUMENT.write_text(with_table(DOCUMENT.read_text()))


def with_table(document: str) -> str:
    """`document` with what stands between the two markers made anew."""
    head, rest = document.split(_START)
    return head + _START + _table() + _END + rest.split(_END)[1]


def _table() -> str:
    lines = ["| feature | compared with, and how close | test in `tests` |", "|---|---|---|"]
    for feature in FEATURES:
        lines.append(f"| {feature.name} | {feature.shown} | `{feature.test}` |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
