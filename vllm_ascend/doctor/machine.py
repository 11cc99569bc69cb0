# SPDX-License-Identifier: Apache-2.0
"""Versions, the CANN runtime and the device."""

from __future__ import annotations

import ctypes
import platform
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from vllm_ascend.doctor.findings import Finding, fail, ok, warn

_RUNTIME = "libascendcl.so"
_TRANSFER_ENGINES = ("mooncake-transfer-engine-non-cuda", "mooncake-transfer-engine-npu")


def versions() -> Iterator[Finding]:
    """This package, what it pins, and what is installed instead."""
    yield ok("machine", f"{platform.platform()}, {platform.machine()}, Python {platform.python_version()}")
    try:
        yield ok("vllm-ascend", metadata.version("vllm-ascend"))
        pins = metadata.requires("vllm-ascend") or []
    except metadata.PackageNotFoundError:
        yield fail(
            "vllm-ascend", "not installed, only importable", "bash .setup/install.sh, or pip install ."
        )
        return
    for pin in pins:
        requirement, _, marker = pin.partition(";")
        if not marker:
            yield _pinned(requirement.strip())
    yield _transfer_engine(pins)


def _pinned(requirement: str) -> Finding:
    name, _, wanted = requirement.partition("==")
    found = _version(name)
    if found is None:
        return fail(name, f"not installed, needs {wanted}", f"pip install {requirement}")
    # A build says where it is from after a plus sign.
    if found.partition("+")[0] != wanted:
        return fail(name, f"{found} is installed, needs {wanted}", f"pip install {requirement}")
    return ok(name, found)


def _transfer_engine(pins: list[str]) -> Finding:
    wanted = {pin.partition("==")[0]: pin.partition("==")[2].partition(";")[0].strip() for pin in pins}
    installed = {name: found for name in _TRANSFER_ENGINES if (found := _version(name)) is not None}
    if len(installed) != 1:
        return fail(
            "Mooncake",
            f"{' and '.join(installed) or 'no build'} is installed, needs {' or '.join(_TRANSFER_ENGINES)}",
            "pip install mooncake-transfer-engine-npu on Ascend cards, -non-cuda elsewhere; uninstall others",
        )
    ((name, found),) = installed.items()
    if found != wanted[name]:
        return fail(
            "Mooncake", f"{name} {found}, needs {wanted[name]}", f"pip install {name}=={wanted[name]}"
        )
    return ok("Mooncake", f"{name} {found}")


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def runtime() -> Finding:
    """The CANN runtime, which torch_npu links: CANN's own, or the emulated one."""
    try:
        ctypes.CDLL(_RUNTIME)
    except OSError as error:
        return fail(
            "CANN",
            str(error),
            "on a card, source set_env.sh of CANN (/usr/local/Ascend/ascend-toolkit); without one, run this "
            "and vllm through python -m vllm_ascend.emulator",
        )
    mapped = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines()}
    (path,) = (name for name in mapped if Path(name).name.startswith(_RUNTIME))
    return ok("CANN", path)


def device(index: int) -> Finding:
    """torch_npu and one NPU: whether it computes."""
    try:
        # torch loads torch_npu, and that the runtime.
        import torch
        import torch_npu
    except (ImportError, OSError, RuntimeError) as error:
        return fail("torch_npu", _first_line(error), "cure what is above; then pip install torch_npu anew")
    count = torch_npu.npu.device_count()
    if index >= count:
        return fail(
            "device",
            f"{count} NPUs are visible, so there is no npu:{index}",
            "npu-smi info shows the host's cards; ASCEND_RT_VISIBLE_DEVICES chooses among them",
        )
    try:
        total = (torch.ones(1024, device=f"npu:{index}") * 2).sum().item()
        free_bytes, all_bytes = torch_npu.npu.mem_get_info(index)
    except RuntimeError as error:
        return fail(
            "device", _first_line(error), "end what else uses the card, or choose another with --device"
        )
    name = torch_npu.npu.get_device_name(index)
    sizes = f"{free_bytes / 2**30:.1f} of {all_bytes / 2**30:.1f} GiB free"
    if total != 2048:
        return fail("device", f"npu:{index} {name} adds 1024 twos to {total}", "reset or replace the card")
    if free_bytes < all_bytes / 10:
        return warn("device", f"npu:{index} {name}, {sizes}", "end what else uses the card")
    return ok("device", f"{count} visible; npu:{index} {name} computes, {sizes}")


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0]
