# SPDX-License-Identifier: Apache-2.0
"""What is particular to the emulator: operators it lacks say so, those that compute nothing work, and float32
is taken where the launcher was told so."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch_npu
from device.operator_support import EMULATED, FLOAT32_ALLOWED

pytestmark = pytest.mark.skipif(not EMULATED, reason="about the emulator")


def test_an_operator_that_is_not_emulated_says_its_name() -> None:
    x = torch.ones(2, 8, dtype=torch.bfloat16, device="npu")
    with pytest.raises(
        NotImplementedError, match=r"npu::npu_top_k_top_p is not emulated; see docs/emulator\.md"
    ):
        torch_npu.npu_top_k_top_p(x)


def test_so_does_an_operator_of_atb() -> None:
    x = torch.ones(2, 8, dtype=torch.bfloat16, device="npu")
    with pytest.raises(NotImplementedError, match="atb::_npu_flash_attention_unpad is not emulated"):
        torch_npu._npu_flash_attention_unpad(x, x, x, x, 1.0, 1, 1, x)


def test_formats_are_torch_npu_s_own() -> None:
    x = torch.ones(16, 16, dtype=torch.bfloat16, device="npu")
    assert torch_npu.get_npu_format(x) == torch_npu.get_npu_format(torch_npu.npu_format_cast(x, 2))


def test_casts_that_torch_npu_calls() -> None:
    x = torch.tensor([True, False], device="npu")
    assert torch_npu.npu_dtype_cast(x, torch.int32).cpu().tolist() == [1, 0]


@pytest.mark.skipif(FLOAT32_ALLOWED, reason="this is that run")
def test_float32_where_it_is_allowed() -> None:
    """The tables of the operators on a KV cache once more, with float32 in them."""
    here = Path(__file__).parent
    files = [here / f"test_operators_{family}.py" for family in ("attention", "cache", "latent")]
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-k", "float32", *map(str, files)],
        env=os.environ | {"ASCEND_EMULATOR_ALLOW_FP32": "1"},
        cwd=here.parent.parent,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert " passed" in result.stdout
