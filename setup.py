# SPDX-License-Identifier: Apache-2.0
"""Runs CMake for `csrc` and packages what it built; all else about the package is in pyproject.toml."""

import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
# One build for the package and for `ctest --test-dir build`: the operators take minutes to compile.
BUILD_DIR = ROOT / "build"
LIBRARY_DIR = Path("vllm_ascend", "emulator", "lib")


class BuildWithCMake(build_ext):
    """Builds the emulator's libraries: into the tree for an editable install, else into the wheel."""

    def run(self) -> None:
        options = {
            "CMAKE_BUILD_TYPE": "Release",
            # Named each time: an isolated build's ninja and Python are gone when the next reads the cache.
            "CMAKE_MAKE_PROGRAM": shutil.which("ninja"),
            "Python3_EXECUTABLE": sys.executable,
            "ASCEND_EMULATOR_OUTPUT_DIR": self._output_dir(),
            "VLLM_ASCEND_CPP_TESTS": "ON" if self._in_tree else "OFF",
        }
        definitions = [f"-D{name}={value}" for name, value in options.items()]
        subprocess.run(["cmake", "-S", ROOT, "-B", BUILD_DIR, "-G", "Ninja", *definitions], check=True)
        subprocess.run(["cmake", "--build", BUILD_DIR], check=True)

    def get_outputs(self) -> list[str]:
        return [str(path) for path in sorted(self._output_dir().glob("*.so"))]

    def get_output_mapping(self) -> dict[str, str]:
        return {}

    @property
    def _in_tree(self) -> bool:
        return bool(self.inplace or self.editable_mode)

    def _output_dir(self) -> Path:
        return (ROOT if self._in_tree else Path(self.build_lib).resolve()) / LIBRARY_DIR


# The extension has no sources of its own; it makes the wheel one for this platform.
setup(
    ext_modules=[Extension("vllm_ascend.emulator.lib", sources=[])],
    cmdclass={"build_ext": BuildWithCMake},
)
