# SPDX-License-Identifier: Apache-2.0
"""What the router says to engines, also when a client leaves, whenever that is; the engines only note it."""

import json
import socket
import threading
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from disaggregated.fleet import wait_until
from servers import HOST, Server, router, running

AT = {"remote_engine_id": "e", "remote_host": "10.0.0.1", "remote_port": 20001}
PARAMS = {"remote_request_id": "held"} | AT
PATIENCE_S = 10.0


@dataclass
class Notes:
    """What a stand-in for an engine was asked, and how far it answers before it waits."""

    asked: list[dict[str, Any]] = field(default_factory=list)
    chunks: tuple[bytes, ...] = ()
    """Sent before it waits."""
    params: dict[str, Any] = field(default_factory=lambda: PARAMS)
    status: int = 200
    waits: threading.Event = field(default_factory=threading.Event)
    """Set once it does."""
    goes_on: threading.Event = field(default_factory=threading.Event)


class Engine(ThreadingHTTPServer):
    """Answers completions with `params`, when its notes say so; refuses a model of another name at once."""

    daemon_threads = True

    def __init__(self, notes: Notes) -> None:
        super().__init__((HOST, 0), Handler)
        self.notes = notes
        self.port: int = self.server_address[1]
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def handle_error(self, *_: object) -> None:
        """The router hangs up on engines here; that is no news."""


class Handler(BaseHTTPRequestHandler):
    server: Engine

    def do_GET(self) -> None:
        self._reply(200, b"{}")

    def do_POST(self) -> None:
        notes = self.server.notes
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        notes.asked.append(asked)
        if asked["model"] != "m":
            self._reply(404, b"{}")
            return
        if notes.chunks:
            self.send_response(200)
            self.send_header("Content-Type", "text/event-stream")
            self.end_headers()
            for chunk in notes.chunks:
                self.wfile.write(chunk)
                self.wfile.flush()
        notes.waits.set()
        notes.goes_on.wait(PATIENCE_S)
        if not notes.chunks:
            self._reply(notes.status, json.dumps({"kv_transfer_params": notes.params}).encode())

    def log_message(self, format: str, *args: object) -> None:
        """Not to stderr."""

    def _reply(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@dataclass
class Engines:
    prefill: Notes
    decode: Notes
    front: Server
    early: Server
    """The router that sends requests to both at once."""


@pytest.fixture(scope="module")
def stand_ins(log_dir) -> Iterator[tuple[Engine, Engine, Server, Server]]:
    with Engine(Notes()) as prefill, Engine(Notes()) as decode:
        # The router asks of an engine its port alone.
        servers = [Server(name, [], engine.port, log_dir) for name, engine in (("p", prefill), ("d", decode))]
        try:
            front = router(servers[:1], servers[1:], log_dir)
            early = router(servers[:1], servers[1:], log_dir, "early", ["--early"])
            with running([front, early]):
                yield prefill, decode, front, early
        finally:
            prefill.shutdown()
            decode.shutdown()


@pytest.fixture
def engines(stand_ins: tuple[Engine, Engine, Server, Server]) -> Iterator[Engines]:
    prefill, decode, *fronts = stand_ins
    prefill.notes, decode.notes = Notes(), Notes()
    yield Engines(prefill.notes, decode.notes, *fronts)
    prefill.notes.goes_on.set()
    decode.notes.goes_on.set()


@pytest.fixture
def known(stand_ins: tuple[Engine, Engine, Server, Server], engines: Engines) -> Engines:
    """The early router has had an answer of the prefill engine."""
    prefill, decode, *_ = stand_ins
    engines.prefill.goes_on.set()
    engines.decode.goes_on.set()
    with closing(ask(engines.early)) as line:
        assert status_of(line) == 200
    prefill.notes, decode.notes = engines.prefill, engines.decode = Notes(), Notes()
    return engines


def ask(front: Server, **more: Any) -> socket.socket:
    """Ask the router; the answer is to be read from the socket."""
    line = socket.create_connection((HOST, front.port), timeout=PATIENCE_S)
    body = json.dumps({"model": "m", "prompt": "1 2", "max_tokens": 8} | more).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: h\r\nContent-Length: {len(body)}\r\nConnection: close\r\n"
    line.sendall(f"{head}Content-Type: application/json\r\n\r\n".encode() + body)
    return line


def status_of(line: socket.socket) -> int:
    """Of the answer, when it has ended: who hangs up before that is a client that leaves."""
    answer = b"".join(iter(lambda: line.recv(4096), b""))
    return int(answer.split()[1])


def given_up(notes: Notes, params: dict[str, Any] = PARAMS) -> bool:
    """Whether what was asked last must be refused, so that the blocks are freed."""
    last = notes.asked[-1] if notes.asked else {"model": "m"}
    return last["model"] != "m" and last["kv_transfer_params"] == params


def wait_until_given_up(notes: Notes) -> None:
    wait_until(lambda: given_up(notes), lambda: f"asked of decode: {notes.asked}", PATIENCE_S)


def test_while_prefill_computes(engines: Engines):
    engines.decode.goes_on.set()
    with closing(ask(engines.front)):
        assert engines.prefill.waits.wait(PATIENCE_S)
    engines.prefill.goes_on.set()
    wait_until_given_up(engines.decode)


@pytest.mark.parametrize("stream", [False, True])
def test_before_decode_has_begun_to_answer(engines: Engines, stream: bool):
    engines.prefill.goes_on.set()
    with closing(ask(engines.front, stream=stream)):
        assert engines.decode.waits.wait(PATIENCE_S)
    wait_until_given_up(engines.decode)
    assert len(engines.decode.asked) == 2


def test_in_the_middle_of_an_answer(engines: Engines):
    engines.prefill.goes_on.set()
    engines.decode.chunks = (b"data: one\n\n",)
    with closing(ask(engines.front, stream=True)) as line:
        assert engines.decode.waits.wait(PATIENCE_S)
        text = b""
        while b"data: one" not in text:
            text += line.recv(4096)
    wait_until_given_up(engines.decode)


def test_a_client_that_stays_gives_nothing_up(engines: Engines):
    engines.prefill.goes_on.set()
    engines.decode.goes_on.set()
    with closing(ask(engines.front, n=3)) as line:
        assert status_of(line) == 200
    assert [asked["model"] for asked in engines.decode.asked] == ["m"]
    assert [asked.get("n") for asked in (*engines.prefill.asked, *engines.decode.asked)] == [None, 3]


def test_several_prompts_go_to_decode_alone(engines: Engines):
    engines.decode.goes_on.set()
    with closing(ask(engines.front, prompt=["1 2", "3 4"])) as line:
        assert status_of(line) == 200
    assert (len(engines.prefill.asked), len(engines.decode.asked)) == (0, 1)
    assert "kv_transfer_params" not in engines.decode.asked[0]


def name_of(asked: dict[str, Any]) -> str:
    name: str = asked["kv_transfer_params"]["transfer_name"]
    return name


def wait_for_both(engines: Engines) -> None:
    """Until both are computing."""
    assert engines.prefill.waits.wait(PATIENCE_S)
    assert engines.decode.waits.wait(PATIENCE_S)


def test_early_both_get_the_request_at_once_under_one_name(known: Engines):
    with closing(ask(known.early, n=3)) as line:
        wait_for_both(known)
        (there,), (here,) = known.prefill.asked, known.decode.asked
        assert there["kv_transfer_params"]["do_remote_decode"]
        assert there["max_tokens"] == 1
        assert here["kv_transfer_params"] == {
            "do_remote_prefill": True,
            "do_remote_decode": False,
            "transfer_name": name_of(there),
            **AT,
        }
        assert (there.get("n"), here["n"]) == (None, 3)
        known.decode.goes_on.set()
        known.prefill.goes_on.set()
        assert status_of(line) == 200
    assert [len(notes.asked) for notes in (known.prefill, known.decode)] == [1, 1]


def test_early_each_request_has_a_name_of_its_own(known: Engines):
    known.decode.goes_on.set()
    known.prefill.goes_on.set()
    for _ in range(2):
        with closing(ask(known.early)) as line:
            assert status_of(line) == 200
    assert len({name_of(asked) for asked in known.prefill.asked}) == 2


def test_early_what_prefill_refuses_is_refused_while_decode_waits(known: Engines):
    known.prefill.status = 400
    with closing(ask(known.early)) as line:
        wait_for_both(known)
        known.prefill.goes_on.set()
        assert status_of(line) == 400


def test_early_what_decode_refuses_is_refused_while_prefill_computes(known: Engines):
    known.decode.status = 400
    with closing(ask(known.early)) as line:
        wait_for_both(known)
        known.decode.goes_on.set()
        assert status_of(line) == 400


def test_early_a_client_that_leaves_frees_both(known: Engines):
    with closing(ask(known.early)):
        wait_for_both(known)
    told = known.decode.asked[0]["kv_transfer_params"]
    wait_until(lambda: given_up(known.decode, told), lambda: f"asked of decode: {known.decode.asked}")


def test_early_decode_is_asked_again_when_another_engine_has_answered(known: Engines):
    # One that was restarted, at the same listener.
    known.prefill.params = PARAMS | {"remote_engine_id": "its successor"}
    with closing(ask(known.early)) as line:
        wait_for_both(known)
        known.prefill.goes_on.set()
        wait_until(lambda: len(known.decode.asked) == 2, lambda: f"asked of decode: {known.decode.asked}")
        assert known.decode.asked[1]["kv_transfer_params"] == known.prefill.params
        known.decode.goes_on.set()
        assert status_of(line) == 200


def test_early_a_server_with_several_engines_is_asked_first(known: Engines, log_dir):
    known.decode.goes_on.set()
    known.prefill.goes_on.set()
    servers = [Server("s", [], port, log_dir) for port in ports_behind(known.early)]
    with running([front := router(servers[:1], servers[1:], log_dir, "of several", ["--early"])]):
        for port in (20001, 20002, 20001):
            known.prefill.params = PARAMS | {"remote_port": port, "remote_engine_id": f"e_dp{port}"}
            with closing(ask(front)) as line:
                assert status_of(line) == 200
    assert ["transfer_name" in asked["kv_transfer_params"] for asked in known.prefill.asked] == [
        *(False, True, False)
    ]


def ports_behind(front: Server) -> list[int]:
    """Those of the engines that a router was started with."""
    return [int(word.rpartition(":")[2]) for word in front.command if word.startswith(f"{HOST}:")]
