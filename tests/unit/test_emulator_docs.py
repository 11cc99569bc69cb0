# SPDX-License-Identifier: Apache-2.0
"""The tables of docs/emulator.md are those that the sources give."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
DESCRIBE = ROOT / "csrc" / "emulator" / "describe.py"


def test_the_tables_are_in_step_with_the_sources():
    result = subprocess.run([sys.executable, DESCRIBE, "--check"], check=False)
    assert result.returncode == 0, f"run `python {DESCRIBE.relative_to(ROOT)}`"


def test_the_tables_name_what_a_reader_looks_for():
    document = (ROOT / "docs" / "emulator.md").read_text()
    for row in (
        "| libascendcl | `aclrtMalloc` |",
        "| libascendcl | `aclrtMemcpyAsync` | Reads the source when its turn in the stream comes",
        "| libhccl | `HcclAllReduce` |",
        "- `atb::npu_paged_cache_load`\n",
        "- `npu::npu_fused_infer_attention_score`\n",
    ):
        assert row in document
