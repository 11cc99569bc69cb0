# SPDX-License-Identifier: Apache-2.0
"""The command: options, the order of the checks, the exit status."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator

from vllm_ascend.doctor import machine, transfer
from vllm_ascend.doctor.findings import Finding, Grade
from vllm_ascend.kv_transfer.config import PROTOCOLS
from vllm_ascend.kv_transfer.mooncake import default_protocol

LOOPBACK = "127.0.0.1"
DEFAULT_PORT = 14579
"""vLLM's kv_port."""


def main(arguments: list[str]) -> int:
    """Print all findings. Returns 1 if any of them failed."""
    options = _parse(arguments)
    failed = 0
    for finding in _findings(options):
        print(*finding.lines(), sep="\n", flush=True)
        failed += finding.grade is Grade.FAIL
    print(f"{failed} problem{'' if failed == 1 else 's'} found")
    return int(failed > 0)


def _findings(options: argparse.Namespace) -> Iterator[Finding]:
    yield from machine.versions()
    runtime = machine.runtime()
    yield runtime
    has_device = runtime.grade is Grade.OK
    if has_device:
        device = machine.device(options.device)
        yield device
        has_device = device.grade is not Grade.FAIL
    yield transfer.environment()
    here = transfer.Here(
        options.host,
        options.port,
        options.protocol or default_protocol(),
        options.device if has_device else None,
    )
    yield transfer.port(here)
    yield from transfer.memory(here)
    if options.peer is not None:
        host, port = options.peer
        yield from transfer.peer(here, host, port)


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m vllm_ascend.doctor", description=__doc__)
    parser.add_argument("--peer", type=_address, metavar="HOST:PORT", help="a prefill engine's KV listener")
    parser.add_argument(
        "--host",
        default=os.environ.get("VLLM_HOST_IP") or LOOPBACK,
        help="this machine's address for peers (default: VLLM_HOST_IP, else 127.0.0.1)",
    )
    parser.add_argument("--port", type=int, default=DEFAULT_PORT, help="kv_port (default: 14579)")
    parser.add_argument("--protocol", choices=PROTOCOLS, help="of the transfer engine")
    parser.add_argument("--device", type=int, default=0, help="the NPU to try (default: 0)")
    return parser.parse_args(arguments)


def _address(text: str) -> tuple[str, int]:
    host, _, port = text.rpartition(":")
    if not host or not port.isdigit():
        raise argparse.ArgumentTypeError(f"{text!r} is not HOST:PORT, such as 10.0.0.5:14579")
    return host, int(port)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
