# SPDX-License-Identifier: Apache-2.0
"""What is not emulated says its own name and fails, however it is reached."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from vllm_ascend.emulator import LIBRARY_DIR

SYMBOLS_FILE = Path(__file__).parents[2] / "csrc" / "emulator" / "unsupported" / "symbols.txt"
SYMBOLS = re.findall(r"^([a-z_]+) +([a-z]+) +(\w+)$", SYMBOLS_FILE.read_text(), flags=re.MULTILINE)
FEATURE_NOT_SUPPORTED = 207000
"""ACL_ERROR_RT_FEATURE_NOT_SUPPORT of acl/error_codes/rt_error_codes.h."""


def run_emulated(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs `code` in a new Python on two emulated devices, with `environment` added to this process's own."""
    launcher = [sys.executable, "-m", "vllm_ascend.emulator", "--devices", "2", "--memory", "256MiB"]
    return subprocess.run(
        [*launcher, "python", "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


def call_by_name(library: str, symbol: str) -> subprocess.CompletedProcess[str]:
    """Calls `symbol` without arguments and prints the 32-bit number that it returns."""
    code = f"import ctypes; print(ctypes.CDLL('lib{library}.so').{symbol}())"
    return run_emulated(code)


def test_every_symbol_that_torch_npu_links_to_is_there():
    # The loader then resolves every symbol at once, and names the first that is missing.
    result = run_emulated("import torch_npu", LD_BIND_NOW="1")
    assert result.returncode == 0, result.stderr


def test_every_listed_symbol_names_itself_and_fails():
    answers = {"status": FEATURE_NOT_SUPPORTED, "null": 0, "undefined": -1}
    answering = [(library, kind, symbol) for library, kind, symbol in SYMBOLS if kind in answers]
    calls = "; ".join(f"print(ctypes.CDLL('lib{library}.so').{symbol}())" for library, _, symbol in answering)
    result = run_emulated(f"import ctypes; {calls}")
    assert result.returncode == 0, result.stderr
    assert [int(line) for line in result.stdout.split()] == [answers[kind] for _, kind, _ in answering]
    sentences = result.stderr.splitlines()
    assert len(sentences) == len(answering)
    for (_, _, symbol), sentence in zip(answering, sentences, strict=True):
        assert sentence.startswith("ascend emulator: ")
        assert sentence.endswith(" is not emulated; see docs/emulator.md")
        if not symbol.startswith("_Z"):
            assert sentence.split()[2] == symbol


def test_a_cpp_symbol_names_itself_readably():
    result = call_by_name("atb", "_ZN3atb13CreateContextEPPNS_7ContextE")
    assert result.stderr == (
        "ascend emulator: atb::CreateContext(atb::Context**) is not emulated; see docs/emulator.md\n"
    )


def test_a_symbol_that_cannot_report_ends_the_process():
    result = call_by_name("atb", "_ZN3atb5Utils13GetTensorSizeERKNS_6TensorE")
    assert result.returncode < 0
    assert "atb::Utils::GetTensorSize(atb::Tensor const&) is not emulated" in result.stderr


@pytest.mark.parametrize(
    ("code", "name"),
    [
        pytest.param(
            "import torch_npu; torch_npu.npu_geglu(torch.ones(4, 8, device='npu', dtype=torch.float16))",
            "npu::npu_geglu is not emulated",
            id="an operator of torch_npu",
        ),
        pytest.param(
            "graph = torch.npu.NPUGraph()\nwith torch.npu.graph(graph): torch.ones(1, device='npu')",
            "Failed to find function aclrtSetStreamAttribute",
            id="capturing a graph",
        ),
        pytest.param(
            "torch.npu.Event(interprocess=True).ipc_handle()",
            "aclrtIpcGetEventHandle does not exist",
            id="an event shared between processes",
        ),
        pytest.param(
            "torch.npu.utilization()",
            "Failed to find function aclrtGetDeviceUtilizationRate",
            id="a gauge of the card",
        ),
    ],
)
def test_an_unknown_call_from_python_names_itself(code: str, name: str):
    result = run_emulated(f"import torch; torch.npu.set_device(0)\n{code}")
    assert result.returncode == 1
    assert name in result.stderr


def test_what_torch_npu_looks_up_by_name_is_absent_unless_it_is_emulated():
    # A symbol that is there selects torch_npu's newer code for it, so these must not be.
    names = [
        "aclmdlRICaptureBegin",
        "aclrtIpcMemGetExportKey",
        "aclrtValueWait",
        "aclprofInit",
        "aclrtHostRegister",
    ]
    checks = ", ".join(f"hasattr(library, '{name}')" for name in names)
    result = run_emulated(f"import ctypes; library = ctypes.CDLL('libascendcl.so'); print(any([{checks}]))")
    assert result.stdout == "False\n", result.stderr


def test_the_libraries_are_where_the_launcher_looks():
    assert (LIBRARY_DIR / "libascendcl.so").is_file()
