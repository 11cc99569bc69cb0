# SPDX-License-Identifier: Apache-2.0
"""VLLM_ASCEND_* variables: default, value, and the refusal of what cannot be used."""

from pathlib import Path

import pytest

from vllm_ascend.envs import VARIABLES, Variable, check_all
from vllm_ascend.errors import ConfigError

SECONDS = Variable("VLLM_ASCEND_SECONDS", 3, "How long, in seconds.", int)


def test_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLLM_ASCEND_SECONDS", raising=False)
    assert SECONDS.get() == 3


def test_value(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_ASCEND_SECONDS", "12")
    assert SECONDS.get() == 12


def test_unusable_value_is_named_with_its_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_ASCEND_SECONDS", "soon")
    with pytest.raises(ConfigError, match="VLLM_ASCEND_SECONDS='soon' cannot be used"):
        SECONDS.get()


def test_unknown_name_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_ASCEND_SECUNDS", "12")
    with pytest.raises(ConfigError, match="VLLM_ASCEND_SECUNDS is not a variable of vllm-ascend"):
        check_all()


def test_a_hidden_value_is_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden = Variable(
        "VLLM_ASCEND_SECONDS", 3, "How long, in seconds.", lambda text: int(text[:0]), hidden=True
    )
    monkeypatch.setenv("VLLM_ASCEND_SECONDS", "soon")
    with pytest.raises(ConfigError, match="VLLM_ASCEND_SECONDS cannot be used") as error:
        hidden.get()
    assert "soon" not in str(error.value)


def test_the_docs_list_every_variable_with_its_meaning() -> None:
    docs = (Path(__file__).parents[2] / "docs" / "configuration.md").read_text()
    for variable in VARIABLES:
        assert f"| `{variable.name}` | {variable.meaning} |" in docs


def test_every_variable_has_the_prefix_and_a_meaning() -> None:
    for variable in VARIABLES:
        assert variable.name.startswith("VLLM_ASCEND_")
        assert variable.meaning.endswith(".")
