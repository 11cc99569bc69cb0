# SPDX-License-Identifier: Apache-2.0
"""Writes `docs/operators.md`: every torch_npu operator that the plugin calls, from where, and its test.

`python tests/device/describe_operators.py` does so. The calls are read from the sources; TESTS names, for
each operator, the test that compares it with a plain formula. `tests/unit/test_operators.py` fails where one
is missing.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
PLUGIN = ROOT / "vllm_ascend"
DOCUMENT = ROOT / "docs" / "operators.md"

TESTS = {
    "_npu_paged_attention_mla": "test_operators_latent.py::test_decode_over_joint_rows",
    "_npu_reshape_and_cache": (
        "test_operators_cache.py::test_store_puts_rows_at_their_slots_and_skips_negative_ones"
    ),
    "_npu_reshape_and_cache_siso": "test_operators_cache.py::test_store_one_cache",
    "npu_add_rms_norm": "test_operators_norm.py::test_add_rms_norm",
    "npu_attention_update": (
        "test_operators_latent.py::test_merging_attention_over_pieces_is_attention_over_all"
    ),
    "npu_clipped_swiglu": "test_operators_activation.py::test_clipped_swiglu_of_neighbours",
    "npu_fused_infer_attention_score": "test_operators_attention.py::test_causal_over_a_paged_cache",
    "npu_fused_infer_attention_score_v2": "test_operators_attention.py::test_version_2",
    "npu_fusion_attention": (
        "test_operators_fusion_attention.py::test_every_row_sees_every_key_of_its_sequence"
    ),
    "npu_grouped_matmul": "test_operators_grouped_matmul.py::test_every_group_has_its_own_matrix",
    "npu_moe_gating_top_k": "test_operators_routing.py::test_gating",
    "npu_moe_init_routing_v2": "test_operators_routing.py::test_rows_are_sorted_by_expert",
    "npu_moe_token_unpermute": "test_operators_routing.py::test_rows_of_a_token_are_added_by_weight",
    "npu_paged_cache_load": "test_operators_cache.py::test_load",
    "npu_rms_norm": "test_operators_norm.py::test_rms_norm",
    "npu_rotary_mul": "test_operators_rotary.py::test_rotary_mul",
    "npu_swiglu": "test_operators_activation.py::test_swiglu",
}
"""By operator: a file of this folder, and a function in it."""

_HEAD = """# Operators

Every operator of torch_npu that the plugin calls, and the test in `tests/device` that compares it with a
plain formula, on a card as on the emulated device. What else torch computes (ATen's operators) is compared
with the CPU in `tests/device/test_aten.py`. Written by `tests/device/describe_operators.py`.

| operator | called in `vllm_ascend` | compared in `tests/device` |
|---|---|---|
"""


def main() -> None:
    DOCUMENT.write_text(document())


def document() -> str:
    lines = [
        f"| `{operator}` | {', '.join(f'`{file}`' for file in files)} | `{TESTS.get(operator, '')}` |\n"
        for operator, files in called().items()
    ]
    return _HEAD + "".join(lines)


def called() -> dict[str, list[str]]:
    """By operator, the files of the plugin that name it; both in order."""
    found: dict[str, list[str]] = {}
    for path in sorted(PLUGIN.rglob("*.py")):
        for operator in sorted(set(_operators(ast.parse(path.read_text())))):
            found.setdefault(operator, []).append(path.relative_to(PLUGIN).as_posix())
    return dict(sorted(found.items()))


def _operators(tree: ast.AST) -> Iterator[str]:
    """Names behind torch_npu, torch.ops.npu or torch.ops.atb, whether called there or handed on."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "torch_npu":
            raise ValueError(
                f"line {node.lineno} imports names from torch_npu; import torch_npu, and name it there"
            )
        if isinstance(node, ast.Attribute):
            match ast.unparse(node.value).split("."):
                case ["torch_npu"] if node.attr != "npu":
                    yield node.attr
                case ["torch", "ops", "npu" | "atb"] | ["torch_npu", "atb"]:
                    yield node.attr


if __name__ == "__main__":
    main()
