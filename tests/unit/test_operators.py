# SPDX-License-Identifier: Apache-2.0
"""Every operator that the plugin calls is compared with a plain formula, and docs/operators.md says where."""

from __future__ import annotations

import ast

import pytest
from device.describe_operators import DOCUMENT, ROOT, TESTS, called, document


def test_every_operator_that_is_called_has_a_test_and_no_other_is_listed() -> None:
    assert list(TESTS) == list(called()), "tests/device/describe_operators.py has the list"


@pytest.mark.parametrize("operator", TESTS)
def test_the_test_is_there_and_calls_the_operator(operator: str) -> None:
    file, function = TESTS[operator].split("::")
    functions = {
        node.name: {name.attr for name in ast.walk(node) if isinstance(name, ast.Attribute)}
        | {name.id for name in ast.walk(node) if isinstance(name, ast.Name)}
        for node in ast.walk(ast.parse((ROOT / "tests" / "device" / file).read_text()))
        if isinstance(node, ast.FunctionDef)
    }
    names = functions[function]
    # Itself, or through a helper of its file.
    assert operator in names.union(*(functions[name] for name in names if name in functions))


def test_the_table_is_in_step() -> None:
    assert document() == DOCUMENT.read_text(), "run `python tests/device/describe_operators.py`"
