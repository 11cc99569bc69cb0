# SPDX-License-Identifier: Apache-2.0
"""`python -m vllm_ascend.emulator`: what it tells the command, and what it refuses, in one sentence each."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import vllm_ascend.emulator
from vllm_ascend.emulator import LIBRARY_DIR

PACKAGE_DIR = Path(vllm_ascend.emulator.__file__).parent
PRINT_ENVIRONMENT = "import json, os; print(json.dumps(dict(os.environ)))"


def launch(
    *arguments: str, cwd: Path | None = None, base: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Runs the launcher with `arguments`; its environment is `base`, or this process's own."""
    return subprocess.run(
        [sys.executable, "-m", "vllm_ascend.emulator", *arguments],
        cwd=cwd,
        env=dict(os.environ) if base is None else base,
        capture_output=True,
        text=True,
        timeout=120,
    )


def bare_environment() -> dict[str, str]:
    """This process's environment as it was before any launcher."""
    return {
        name: value
        for name, value in os.environ.items()
        if name != "LD_LIBRARY_PATH" and not name.startswith("ASCEND_EMULATOR_")
    }


def test_options_reach_the_command():
    options = ["--devices", "3", "--memory", "512MiB", "--soc", "Ascend910B1", "--allow-fp32"]
    base = {**bare_environment(), "LD_LIBRARY_PATH": "/somewhere/else"}
    result = launch(*options, "python", "-c", PRINT_ENVIRONMENT, base=base)
    seen = json.loads(result.stdout)
    assert seen["ASCEND_EMULATOR_DEVICES"] == "3"
    assert seen["ASCEND_EMULATOR_MEMORY"] == "536870912"
    assert seen["ASCEND_EMULATOR_SOC"] == "Ascend910B1"
    assert seen["ASCEND_EMULATOR_ALLOW_FP32"] == "1"
    assert seen["LD_LIBRARY_PATH"] == f"{LIBRARY_DIR}:/somewhere/else"


def test_defaults_are_eight_devices_of_4_gib_that_refuse_fp32():
    result = launch(
        "python", "-c", PRINT_ENVIRONMENT, base={**bare_environment(), "ASCEND_EMULATOR_ALLOW_FP32": "1"}
    )
    seen = json.loads(result.stdout)
    assert seen["ASCEND_EMULATOR_DEVICES"] == "8"
    assert seen["ASCEND_EMULATOR_MEMORY"] == "4294967296"
    assert seen["ASCEND_EMULATOR_SOC"] == "Ascend910B3"
    assert seen["LD_LIBRARY_PATH"] == str(LIBRARY_DIR)
    assert "ASCEND_EMULATOR_ALLOW_FP32" not in seen


def test_nothing_else_of_the_environment_is_touched():
    base = {**bare_environment(), "OMP_NUM_THREADS": "3", "TASK_QUEUE_ENABLE": "2"}
    seen = json.loads(launch("python", "-c", PRINT_ENVIRONMENT, base=base).stdout)
    ours = {"LD_LIBRARY_PATH", "ASCEND_EMULATOR_DEVICES", "ASCEND_EMULATOR_MEMORY", "ASCEND_EMULATOR_SOC"}
    # Python itself may add LC_CTYPE when it starts in the C locale.
    assert {name: value for name, value in seen.items() if name not in ours | {"LC_CTYPE"}} == {
        name: value for name, value in base.items() if name != "LC_CTYPE"
    }


def test_python_means_the_interpreter_that_runs_the_launcher():
    result = launch("python", "-c", "import sys; print(sys.executable)")
    assert result.stdout.strip() == sys.executable


def test_the_commands_own_options_and_exit_status_pass_through():
    result = launch("--", "python", "-c", "import sys; print(sys.argv[1:]); sys.exit(7)", "--devices", "99")
    assert result.stdout == "['--devices', '99']\n"
    assert result.returncode == 7


@pytest.mark.parametrize(
    ("text", "expected_bytes"),
    [("1048576", 1 << 20), ("1024KiB", 1 << 20), ("1MiB", 1 << 20), ("2GiB", 2 << 30), ("3 GiB", 3 << 30)],
)
def test_sizes(text: str, expected_bytes: int):
    result = launch("--memory", text, "python", "-c", PRINT_ENVIRONMENT)
    assert json.loads(result.stdout)["ASCEND_EMULATOR_MEMORY"] == str(expected_bytes)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        pytest.param(
            [],
            "there is no command to run; give one, as in `python -m vllm_ascend.emulator python x.py`",
            id="no command",
        ),
        pytest.param(
            ["no-such-program-anywhere"],
            "there is no program 'no-such-program-anywhere' to run; give one that is on PATH, or its path",
            id="a command that is not there",
        ),
        pytest.param(
            ["--devices", "0", "true"],
            "argument --devices: '0' is not a number of devices; use 1 to 64",
            id="no devices",
        ),
        pytest.param(
            ["--devices", "many", "true"],
            "argument --devices: 'many' is not a number of devices; use 1 to 64",
            id="devices in words",
        ),
        pytest.param(
            ["--memory", "4GB", "true"],
            "argument --memory: '4GB' is not a size from 1MiB to 1024GiB; "
            "write a whole number of bytes, KiB, MiB or GiB, as in 4GiB",
            id="a unit that is not binary",
        ),
        pytest.param(
            ["--memory", "100KiB", "true"],
            "argument --memory: '100KiB' is not a size from 1MiB to 1024GiB; "
            "write a whole number of bytes, KiB, MiB or GiB, as in 4GiB",
            id="too little memory",
        ),
        pytest.param(
            ["--soc", "Ascend310P3", "true"],
            "argument --soc: 'Ascend310P3' is not a chip that is emulated; "
            "use Ascend910B1, Ascend910B2, Ascend910B2C, Ascend910B3 or Ascend910B4",
            id="another chip",
        ),
        pytest.param(
            ["--device", "2", "true"], "there is no option --device; see --help", id="an option misspelt"
        ),
    ],
)
def test_a_mistake_is_refused_in_one_sentence(arguments: list[str], sentence: str):
    result = launch(*arguments)
    assert result.stderr == f"vllm_ascend.emulator: {sentence}\n"
    assert result.returncode == 2


def test_without_the_libraries_it_says_what_to_build(tmp_path: Path):
    package = tmp_path / "vllm_ascend" / "emulator"
    package.mkdir(parents=True)
    for source in PACKAGE_DIR.glob("*.py"):
        shutil.copy(source, package)
    base = {**bare_environment(), "PYTHONPATH": str(tmp_path)}
    result = launch("true", cwd=tmp_path, base=base)
    assert result.returncode == 2
    assert result.stderr.startswith("vllm_ascend.emulator: libascendcl.so, libhccl.so, ")
    assert result.stderr.endswith(
        f"not found in {package / 'lib'}; build with `cmake -S . -B build -G Ninja && cmake --build build`\n"
    )


def test_without_the_operators_the_device_does_not_start(tmp_path: Path):
    for library in LIBRARY_DIR.glob("*.so"):
        if library.name != "libascend_emulator_kernels.so":
            shutil.copy(library, tmp_path)
    result = subprocess.run(
        [sys.executable, "-c", "import torch; torch.npu.set_device(0)"],
        env={**bare_environment(), "LD_LIBRARY_PATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 1
    assert "ascend emulator: the operators cannot be loaded" in result.stderr
    assert "libascend_emulator_kernels.so" in result.stderr


@pytest.mark.parametrize(
    ("variable", "value", "sentence"),
    [
        (
            "ASCEND_EMULATOR_DEVICES",
            "0",
            "ASCEND_EMULATOR_DEVICES is '0'; set it to a whole number from 1 to 64",
        ),
        (
            "ASCEND_EMULATOR_MEMORY",
            "4GiB",
            "ASCEND_EMULATOR_MEMORY is '4GiB'; set it to a whole number from 1048576 to 1099511627776",
        ),
    ],
)
def test_a_bad_variable_is_refused_where_the_launcher_was_not_used(variable: str, value: str, sentence: str):
    code = "import ctypes; print(ctypes.CDLL('libascendcl.so').aclInit(None))"
    result = subprocess.run(
        [sys.executable, "-c", code],
        env={**bare_environment(), "LD_LIBRARY_PATH": str(LIBRARY_DIR), variable: value},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.stderr == f"ascend emulator: {sentence}\n"
    assert result.stdout == "100000\n"
