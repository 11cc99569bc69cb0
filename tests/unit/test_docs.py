# SPDX-License-Identifier: Apache-2.0
"""What the documents point at exists."""

import re
from pathlib import Path

import pytest
from connector.topologies import PAGE, TABLE, page_with_table

ROOT = Path(__file__).parents[2]
# In folders that begin with a dot, tools keep documents of their own.
OURS = [ROOT / "README.md", *sorted(ROOT.glob("[!.]*/**/*.md"))]
# A word in backticks that begins with one of our folders is a path.
NAMED_PATH = re.compile(r"`((?:vllm_ascend|csrc|tests|examples|docs|\.setup|\.ci)/[\w./-]*)`")
NAMED_TEST = re.compile(r"`(tests/[\w/]+\.py)::(\w+)`")
LINK = re.compile(r"\]\(([^)#:]+)(?:#[^)]*)?\)")


@pytest.mark.parametrize("document", OURS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_and_named_files_exist(document: Path):
    text = document.read_text()
    gone = [link for link in LINK.findall(text) if not (document.parent / link).exists()]
    gone += [name for name in NAMED_PATH.findall(text) if not (ROOT / name).exists()]
    assert gone == []


@pytest.mark.parametrize("document", OURS, ids=lambda path: str(path.relative_to(ROOT)))
def test_named_tests_exist(document: Path):
    named = NAMED_TEST.findall(document.read_text())
    assert [f"{file}::{test}" for file, test in named if not _has_test(ROOT / file, test)] == []


def test_every_failure_that_users_report_has_a_test():
    lines = (ROOT / "docs" / "faults.md").read_text().splitlines()
    failures = [line for line in lines if re.match(r"\| \d+\. ", line)]
    assert len(failures) == 15
    assert [line for line in failures if not NAMED_TEST.search(line)] == []


def _has_test(file: Path, test: str) -> bool:
    return file.exists() and re.search(rf"^def {test}\(", file.read_text(), re.MULTILINE) is not None


def test_the_architecture_page_names_files():
    assert len(NAMED_PATH.findall((ROOT / "docs" / "architecture.md").read_text())) > 10


def test_the_page_on_kv_transfer_shows_the_pairs_of_engines_that_are_compared():
    page = PAGE.read_text()
    assert page == page_with_table(page), "run python tests/connector/topologies.py"
    assert len(TABLE) == len(set(TABLE)) >= 40
