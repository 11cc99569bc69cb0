# SPDX-License-Identifier: Apache-2.0
"""An engine in a process of its own, which can be killed, frozen, and stopped at any moment of a transfer.

`Node` runs there: an engine that steps by itself and obeys. `Peer` is the handle on it. Processes are forked
from a server that has loaded vLLM, so that one more costs little.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, ClassVar, Concatenate, ParamSpec, TypeVar

import numpy as np
import torch
from connector.engines import Engine, admit, engine_config, prefilled
from connector.faults import FaultyConnector, Read
from connector.footprint import Footprint, footprint, grown_since
from vllm.config import VllmConfig

from vllm_ascend.errors import ReadFailed, ReadUnsettled
from vllm_ascend.kv_transfer.regroup import Fence, Regroup
from vllm_ascend.kv_transfer.transport import Copies, Session

P = ParamSpec("P")
R = TypeVar("R")

PATIENCE_S = 30.0
"""For what does not wait for a clock, on a machine that has other things to do."""


class Gate:
    """Holds the first thread that comes to the named place, until it is opened."""

    def __init__(self, place: str) -> None:
        self._place = place
        self.reached = threading.Event()
        self.opened = threading.Event()

    def pass_by(self, place: str) -> None:
        if place == self._place and not self.reached.is_set():
            self.reached.set()
            self.opened.wait(PATIENCE_S)


class Moments:
    """Where a transfer may be stopped; `gate` is the one that is set up."""

    gate: ClassVar[Gate] = Gate("nowhere")

    @classmethod
    def pass_by(cls, place: str) -> None:
        cls.gate.pass_by(place)


class StoppingFence(Fence):
    """Can be held as by a stream that is not done."""

    def wait(self) -> None:
        Moments.pass_by("queued")
        super().wait()


class StoppingRegroup(Regroup):
    """Can be stopped before and after."""

    def fence(self) -> Fence:
        event = torch.npu.Event()
        event.record()
        return StoppingFence(event)

    def run(self, local_blocks: Any, positions: Any, run_lengths: Any) -> None:
        Moments.pass_by("regrouping")
        super().run(local_blocks, positions, run_lengths)
        Moments.pass_by("before done")


class StoppingConnector(FaultyConnector):
    """The connector, stopped at will."""

    @classmethod
    def make_regroup(cls, kv_caches: Sequence[torch.Tensor]) -> Regroup:
        return StoppingRegroup(kv_caches)


def stop_within(read: Read, peer: Session, copies: Copies) -> None:
    """Half is read before the stop, half after it."""
    first, second = _halves(copies)
    read(peer, first)
    Moments.pass_by("reading")
    read(peer, second)


def fail_within(read: Read, peer: Session, copies: Copies) -> None:
    """An error after half was read, as a transfer engine returns it."""
    read(peer, _halves(copies)[0])
    raise ReadFailed("the transfer engine returned an error")


def write_late(read: Read, peer: Session, copies: Copies) -> None:
    """An error, while the bytes are still on their way; they come when the gate is opened."""
    ended = threading.Event()
    gate = Moments.gate

    def land() -> None:
        gate.pass_by("reading")
        read(peer, copies)
        ended.set()

    threading.Thread(target=land, name="late-write").start()
    raise ReadUnsettled("the transfer engine lost its patience", ended.is_set)


FAULTS = {"stop": stop_within, "fail": fail_within, "late": write_late}


class Node:
    """Lives in the peer's process. Public methods are for `Peer.do`."""

    def __init__(self, config: VllmConfig, num_kv_heads: int) -> None:
        self._engine = Engine(config, num_kv_heads, connector=StoppingConnector)
        self._transports = list(FaultyConnector.transports)
        self._stepping = True
        self._verdicts: dict[str, str] = {}
        self._freed: list[str] = []
        self._ended = False

    def run(self, commands: Connection) -> None:
        """Step and obey until closed or until nobody commands any more."""
        while not self._ended:
            if self._stepping:
                self.step()
            try:
                # A step takes a while where there is a model; without one, steps leave others the core.
                while commands.poll(0.001 if self._stepping else 0.05):
                    name, args = commands.recv()
                    commands.send(getattr(self, name)(*args))
            except EOFError:
                return

    def step(self) -> None:
        output = self._engine.step()
        for request_id in output.finished_recving or ():
            assert request_id not in self._verdicts, "told twice"
            self._verdicts[request_id] = "failed" if request_id in output.failed_recving else "loaded"
        for request_id in output.finished_sending or ():
            assert request_id not in self._freed, "freed twice"
            self._freed.append(request_id)

    def keep_stepping(self, wanted: bool) -> None:
        self._stepping = wanted

    def set_gate(self, place: str, fault: str | None) -> None:
        """Stop the next transfer at `place`; its reads go through `fault`."""
        Moments.gate = Gate(place)
        for transport in self._transports:
            transport.faults[:] = [FAULTS[fault]] if fault else []

    def sessions(self) -> list[str]:
        """Every rank's, as other engines reach its memory."""
        return [worker.get_handshake_metadata().regions.session for worker in self._engine.workers]

    def detour(self, by_session: dict[str, str]) -> None:
        """Read from the sessions that are keys through those that are values."""
        for transport in self._transports:
            transport.detours = {Session(true): Session(via) for true, via in by_session.items()}

    def at_gate(self) -> bool:
        return Moments.gate.reached.is_set()

    def open_gate(self) -> None:
        Moments.gate.opened.set()

    def prefill(self, request_id: str, num_tokens: int, blocks: list[int]) -> dict[str, Any]:
        """Finish a request whose KV is in `blocks`; what the router gets."""
        return prefilled(self._engine, request_id, num_tokens, blocks)

    def admit(self, request_id: str, num_tokens: int, blocks: list[int], params: dict[str, Any]) -> None:
        """A request to be read into `blocks`."""
        admit(self._engine, request_id, num_tokens, blocks, params)

    def fill(self, blocks: list[int], seed: int) -> None:
        """Give `blocks` to another request, which writes them."""
        torch.manual_seed(seed)
        for rank in range(self._engine.num_ranks):
            pages = self._engine.pages(rank)
            content = torch.randint(-(1 << 15), 1 << 15, pages[:, blocks].shape, dtype=torch.int16)
            pages[:, blocks] = content.to(pages.device)

    def kv(self, blocks: list[int]) -> np.ndarray:
        """All ranks' heads of `blocks`: [layer, block, K/V, token, head, dim]."""
        ranks = [self._engine.pages(rank).cpu()[:, blocks] for rank in range(self._engine.num_ranks)]
        return torch.cat(ranks, dim=4).numpy()

    def verdict(self, request_id: str) -> str | None:
        """`loaded` or `failed`, once vLLM was told."""
        return self._verdicts.get(request_id)

    def freed(self, request_id: str) -> bool:
        return request_id in self._freed

    def holds(self) -> bool:
        return self._engine.holds()

    def footprint(self) -> Footprint:
        return footprint()

    def grown_since(self, before: Footprint) -> dict[str, tuple[int, int]]:
        return grown_since(before)

    def threads(self) -> list[str]:
        return sorted(thread.name for thread in threading.enumerate())

    def close(self) -> None:
        self._engine.close()
        self._ended = True


class Peer:
    """A node's process. Restarted, it has the same port."""

    def __init__(self, model: str, num_kv_heads: int, tp_size: int, role: str, extra: dict[str, Any]) -> None:
        self._args = (model, num_kv_heads, tp_size, role, extra)
        self.port = _free_port()
        self._forks = multiprocessing.get_context("forkserver")
        self._forks.set_forkserver_preload(["torch_npu", "vllm_ascend.kv_transfer.connector"])
        self.start()

    def start(self) -> None:
        self._commands, theirs = self._forks.Pipe()
        self._process = self._forks.Process(target=_serve, args=(theirs, self.port, *self._args))
        self._process.start()
        theirs.close()

    def do(self, method: Callable[Concatenate[Node, P], R], *args: P.args, **_: P.kwargs) -> R:
        """The node's answer."""
        self._commands.send((method.__name__, args))
        assert self._commands.poll(2 * PATIENCE_S), f"{method.__name__} is not answered"
        answer: R = self._commands.recv()
        return answer

    def until(
        self, met: Callable[Concatenate[Node, P], Any], *args: P.args, within_s: float = PATIENCE_S
    ) -> Any:
        """Ask again and again until the answer is one; fails after `within_s`."""
        deadline = time.monotonic() + within_s
        while time.monotonic() < deadline:
            if (answer := self.do(met, *args)) not in (None, False):
                return answer
            time.sleep(0.005)
        raise AssertionError(f"no {met.__name__}{args} within {within_s:g} s")

    def kill(self) -> None:
        self._process.kill()
        self._process.join()

    @contextlib.contextmanager
    def frozen(self) -> Iterator[None]:
        """Inside, none of its threads runs."""
        assert self._process.pid is not None
        os.kill(self._process.pid, signal.SIGSTOP)
        try:
            # The signal stops the others once one thread has taken it, which may have to wait for a core.
            deadline = time.monotonic() + PATIENCE_S
            while not _is_stopped(self._process.pid):
                assert time.monotonic() < deadline, "the process does not stop"
                time.sleep(0.001)
            yield
        finally:
            os.kill(self._process.pid, signal.SIGCONT)

    def close(self) -> int | None:
        """End in order; the exit code, None if it had to be killed. The port must be free then."""
        self.do(Node.close)
        self._process.join(PATIENCE_S)
        code = self._process.exitcode
        self.kill()
        with socket.create_server(("127.0.0.1", self.port)):
            return code


def _serve(
    commands: Connection,
    port: int,
    model: str,
    num_kv_heads: int,
    tp_size: int,
    role: str,
    extra: dict[str, Any],
) -> None:
    from vllm.plugins import load_general_plugins

    load_general_plugins()
    config = engine_config(Path(model), tp_size, role, extra, kv_port=port)
    Node(config, num_kv_heads).run(commands)


def _halves(copies: Copies) -> list[Copies]:
    return list(copies.batches((len(copies) + 1) // 2))


def _is_stopped(pid: int) -> bool:
    """Whether every thread is, see proc_pid_stat(5): the state follows the name, which may hold anything."""
    try:
        stats = [stat.read_text() for stat in Path(f"/proc/{pid}/task").glob("*/stat")]
    except (FileNotFoundError, ProcessLookupError):
        # A thread has just ended.
        return False
    return all(stat.rpartition(")")[2].split()[0] == "T" for stat in stats)


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port: int = free.getsockname()[1]
    return port
