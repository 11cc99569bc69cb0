# SPDX-License-Identifier: Apache-2.0
"""Server processes for the quickstart and the tests: started, waited for, stopped with all they started.

A `Server` is a command that answers `GET /health` on a port. `engine()` makes the command of a `vllm serve`,
`router()` that of the proxy beside this file; `running()` starts several at once and stops them. Nothing here
knows what the servers do.
"""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import httpx

HOST = "127.0.0.1"
PROXY = Path(__file__).with_name("proxy.py")


class ServerFailed(Exception):
    """A server ended, answered with an error, or not in time; the message has the end of its log."""


@dataclass
class Server:
    """One process group with an HTTP port: `start`, `wait_ready`, `stop`; `running()` does all three."""

    name: str
    command: Sequence[str]
    port: int
    log_path: Path
    environment: dict[str, str] = field(default_factory=dict)
    ready_timeout_s: float = 600
    _process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"http://{HOST}:{self.port}"

    @property
    def pid(self) -> int:
        assert self._process is not None, f"{self.name} was not started"
        return self._process.pid

    def start(self) -> Self:
        with self.log_path.open("wb") as log:
            # A session of its own, so that stop() reaches every process of the group.
            self._process = subprocess.Popen(
                self.command,
                stdout=log,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env=os.environ | self.environment,
                start_new_session=True,
            )
        return self

    def ready(self) -> bool:
        """Whether the server answers now; raises ServerFailed when its process has ended."""
        assert self._process is not None, f"{self.name} was not started"
        if (code := self._process.poll()) is not None:
            raise ServerFailed(
                f"{self.name} ended with exit code {code} before it answered\n{self.log_end()}"
            )
        try:
            return httpx.get(f"{self.url}/health", timeout=2).is_success
        except httpx.TransportError:
            return False

    def post(self, path: str, body: dict[str, Any], timeout_s: float = 120) -> dict[str, Any]:
        """The JSON answer to `body`; raises ServerFailed on any status that is an error."""
        answer = httpx.post(self.url + path, json=body, timeout=timeout_s)
        if answer.is_error:
            raise ServerFailed(f"{self.name} answered {answer.status_code}: {answer.text}\n{self.log_end()}")
        parsed: dict[str, Any] = answer.json()
        return parsed

    def wait_ready(self) -> Self:
        wait_all([self])
        return self

    def stop(self, patience_s: float = 20) -> None:
        """End the whole process group; killed when it takes longer than `patience_s`. May be called twice."""
        if self._process is None:
            return
        self._signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):  # the kill below is the answer to it
            self._process.wait(patience_s)
        # Children may outlive their parent by a moment; nothing of the group may stay behind.
        deadline = time.monotonic() + 5
        while self._signal(0) and time.monotonic() < deadline:
            time.sleep(0.05)
        self._signal(signal.SIGKILL)
        self._process.wait()
        self._process = None

    def log_end(self, lines: int = 25) -> str:
        """The last lines that the server wrote."""
        return "\n".join(self.log_path.read_text(errors="replace").splitlines()[-lines:])

    def _signal(self, number: int) -> bool:
        """Send `number` to the group; False when nobody is left in it."""
        assert self._process is not None
        self._process.poll()  # a child that ended and was not waited for still counts as a member
        try:
            os.killpg(self._process.pid, number)
        except ProcessLookupError:
            return False
        return True


@contextlib.contextmanager
def running(servers: Sequence[Server], tell: Callable[[str], None] | None = None) -> Iterator[None]:
    """Start all servers at once, wait until every one answers, and stop them at the end, whatever ends it.

    Raises:
        ServerFailed: as `wait_all` does; nothing is left running then.
    """
    with started(servers):
        wait_all(servers, tell)
        yield


@contextlib.contextmanager
def started(servers: Sequence[Server]) -> Iterator[None]:
    """Start all servers at once, and stop them at the end, whatever ends it; nobody waits for an answer."""
    try:
        for server in servers:
            server.start()
        yield
    finally:
        for server in servers:
            server.stop()


def wait_all(servers: Sequence[Server], tell: Callable[[str], None] | None = None) -> None:
    """Wait until every server answers; `tell` is told, time and again, what is still waited for.

    Raises:
        ServerFailed: one of them ended, or did not answer within its `ready_timeout_s`.
    """
    started = time.monotonic()
    waiting = list(servers)
    while waiting:
        waiting = [server for server in waiting if not server.ready()]
        waited_s = time.monotonic() - started
        for server in waiting:
            if waited_s > server.ready_timeout_s:
                raise ServerFailed(
                    f"{server.name} did not answer within {server.ready_timeout_s:.0f} s\n{server.log_end()}"
                )
        if waiting:
            if tell is not None:
                tell(f"{waited_s:3.0f} s  waiting for {', '.join(server.name for server in waiting)}")
            time.sleep(0.5)


def free_port() -> int:
    """A TCP port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return probe.getsockname()[1]


def engine(
    name: str,
    model: str | Path,
    *,
    devices: Sequence[int],
    log_dir: Path,
    kv_transfer_config: dict[str, Any] | None = None,
    tp_size: int | None = None,
    emulator: Sequence[str] | None = ("--devices", "8", "--memory", "1GiB"),
    options: Sequence[str] = (),
) -> Server:
    """A `vllm serve` of `model` on `devices`.

    Args:
        devices: physical indices of the Ascend devices.
        tp_size: tensor-parallel size, by default the number of devices; `options` say what else they are for.
        kv_transfer_config: what `--kv-transfer-config` gets, or None for an ordinary engine.
        emulator: options of the emulated device, or None to run on real cards.
        options: more options for `vllm serve`.
    """
    port = free_port()
    launcher = [] if emulator is None else ["-m", "vllm_ascend.emulator", *emulator, sys.executable]
    command = [
        *(sys.executable, *launcher, "-m", "vllm.entrypoints.cli.main", "serve", str(model)),
        *("--host", HOST, "--port", str(port), "--tensor-parallel-size", str(tp_size or len(devices))),
        *options,
    ]
    if kv_transfer_config is not None:
        command += ["--kv-transfer-config", json.dumps(kv_transfer_config)]
    environment = {
        "ASCEND_RT_VISIBLE_DEVICES": ",".join(map(str, devices)),
        "OMP_NUM_THREADS": "1",  # ranks share the host's cores
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
    }
    if emulator is not None:
        # A thread of torch_npu's task queue looks for work every microsecond: a fifth of a core for each rank
        # that does nothing. An emulated device computes on the same cores.
        environment["TASK_QUEUE_ENABLE"] = "0"
    return Server(name, command, port, log_dir / f"{name}.log", environment)


def router(
    prefill: Sequence[Server],
    decode: Sequence[Server],
    log_dir: Path,
    name: str = "router",
    options: Sequence[str] = (),
) -> Server:
    """The proxy over engines made by `engine()`; `options`: more of its options."""
    port = free_port()
    command = [
        *(sys.executable, str(PROXY), "--host", HOST, "--port", str(port)),
        *("--prefill", *(f"{HOST}:{server.port}" for server in prefill)),
        *("--decode", *(f"{HOST}:{server.port}" for server in decode)),
        *options,
    ]
    # Plain HTTP: the emulator is not needed, and torch need not look for a device.
    environment = {"TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}
    return Server(name, command, port, log_dir / f"{name}.log", environment)
