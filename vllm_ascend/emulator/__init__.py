# SPDX-License-Identifier: Apache-2.0
"""Where the emulated CANN is: the libraries that `csrc/emulator` builds and that stand in for CANN's own.

They are found through the environment and never installed where they could shadow a real CANN. What they
emulate, how truly, and what they refuse is in `docs/emulator.md`.
"""

from pathlib import Path

LIBRARY_DIR = Path(__file__).parent / "lib"

LIBRARIES = (
    "libascendcl.so",
    "libhccl.so",
    "libhcomm.so",
    "libacl_op_compiler.so",
    "libopapi.so",
    "libge_runner.so",
    "libgraph.so",
    "libacl_tdt_channel.so",
    "libatb.so",
    "libascend_emulator_kernels.so",
)
"""What torch_npu links to or loads by name, and the operators that libascendcl loads."""


def missing_libraries(directory: Path = LIBRARY_DIR) -> list[str]:
    """Names of the libraries that are not built, in the order of LIBRARIES."""
    return [name for name in LIBRARIES if not (directory / name).is_file()]
