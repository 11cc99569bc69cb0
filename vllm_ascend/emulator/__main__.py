# SPDX-License-Identifier: Apache-2.0
"""`python -m vllm_ascend.emulator [options] CMD…`: runs CMD on emulated Ascend devices.

It sets the environment and becomes CMD. The libraries have to be found before CMD's process starts, because
`import torch` loads torch_npu, which links to them by name; so this cannot be a call inside a running Python.
"""

import argparse
import os
import re
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from vllm_ascend.emulator import LIBRARY_DIR, missing_libraries

MAX_DEVICES = 64
MIN_MEMORY_BYTES = 1 << 20
MAX_MEMORY_BYTES = 1 << 40
SOC_NAMES = ("Ascend910B1", "Ascend910B2", "Ascend910B2C", "Ascend910B3", "Ascend910B4")
"""Names that torch_npu knows and whose operators follow the rules that the emulator follows."""

_UNITS = {"": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}


@dataclass(frozen=True)
class Machine:
    """What is emulated: `num_devices` cards of the chip `soc_name` with `memory_bytes` each."""

    num_devices: int
    memory_bytes: int
    soc_name: str
    allow_fp32: bool


def main(arguments: Sequence[str]) -> NoReturn:
    """Becomes the command in `arguments`; ends with status 2 and one sentence if that is not possible."""
    options, unknown = _parser().parse_known_args(arguments)
    if unknown:
        _refuse(f"there is no option {unknown[0]}; see --help")
    machine = Machine(options.devices, options.memory, options.soc, options.allow_fp32)
    missing = missing_libraries()
    if missing:
        _refuse(
            f"{', '.join(missing)} not found in {LIBRARY_DIR}; "
            "build with `cmake -S . -B build -G Ninja && cmake --build build`"
        )
    command = _resolve(options.command)
    if shutil.which(command[0]) is None:
        _refuse(f"there is no program {command[0]!r} to run; give one that is on PATH, or its path")
    os.execvpe(command[0], command, environment(machine, os.environ, LIBRARY_DIR))


def environment(machine: Machine, base: Mapping[str, str], library_dir: Path) -> dict[str, str]:
    """`base` with what the emulated libraries read, and with `library_dir` in front of LD_LIBRARY_PATH."""
    result = dict(base)
    search_path = [str(library_dir), *filter(None, [base.get("LD_LIBRARY_PATH")])]
    result["LD_LIBRARY_PATH"] = os.pathsep.join(search_path)
    result["ASCEND_EMULATOR_DEVICES"] = str(machine.num_devices)
    result["ASCEND_EMULATOR_MEMORY"] = str(machine.memory_bytes)
    result["ASCEND_EMULATOR_SOC"] = machine.soc_name
    result.pop("ASCEND_EMULATOR_ALLOW_FP32", None)
    if machine.allow_fp32:
        result["ASCEND_EMULATOR_ALLOW_FP32"] = "1"
    return result


def memory_bytes(text: str) -> int:
    """Bytes in `text`: a whole number, alone or with KiB, MiB or GiB. Raises argparse.ArgumentTypeError."""
    match = re.fullmatch(r"(\d+)\s*([KMG]iB)?", text)
    size = int(match[1]) * _UNITS[match[2] or ""] if match else 0
    if not MIN_MEMORY_BYTES <= size <= MAX_MEMORY_BYTES:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a size from 1MiB to 1024GiB; "
            "write a whole number of bytes, KiB, MiB or GiB, as in 4GiB"
        )
    return size


def num_devices(text: str) -> int:
    """The number of devices in `text`. Raises argparse.ArgumentTypeError."""
    if not (text.isdecimal() and 1 <= int(text) <= MAX_DEVICES):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of devices; use 1 to {MAX_DEVICES}")
    return int(text)


def soc_name(text: str) -> str:
    """`text`, if it names a chip that is emulated. Raises argparse.ArgumentTypeError."""
    if text not in SOC_NAMES:
        names = f"{', '.join(SOC_NAMES[:-1])} or {SOC_NAMES[-1]}"
        raise argparse.ArgumentTypeError(f"{text!r} is not a chip that is emulated; use {names}")
    return text


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="python -m vllm_ascend.emulator",
        usage="%(prog)s [--devices N] [--memory SIZE] [--soc NAME] [--allow-fp32] CMD [ARGUMENT…]",
        description="Run CMD on emulated Ascend devices; see docs/emulator.md.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--devices", type=num_devices, default=8, metavar="N", help="devices in the machine (8)"
    )
    parser.add_argument(
        "--memory",
        type=memory_bytes,
        default=4 << 30,
        metavar="SIZE",
        help="memory of each device, taken from the host's as it is used (4GiB)",
    )
    parser.add_argument(
        "--soc", type=soc_name, default="Ascend910B3", metavar="NAME", help="the chip's name (Ascend910B3)"
    )
    parser.add_argument(
        "--allow-fp32",
        action="store_true",
        help="let operators that take only 16-bit types on the card take fp32 too",
    )
    parser.add_argument(
        "command", nargs=argparse.REMAINDER, metavar="CMD", help="the program and its arguments"
    )
    return parser


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        _refuse(message)


def _resolve(command: list[str]) -> list[str]:
    """`command` with `python` meaning the interpreter that runs this, which has torch_npu."""
    if command[:1] == ["--"]:
        command = command[1:]
    if not command:
        _refuse("there is no command to run; give one, as in `python -m vllm_ascend.emulator python x.py`")
    if command[0] in ("python", "python3"):
        return [sys.executable, *command[1:]]
    return command


def _refuse(sentence: str) -> NoReturn:
    print(f"vllm_ascend.emulator: {sentence}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    main(sys.argv[1:])
