# SPDX-License-Identifier: Apache-2.0
"""Wires that can be cut and healed: forwarders of TCP connections, before a listener or a transfer engine."""

from __future__ import annotations

import contextlib
import re
import selectors
import socket
import threading
from collections.abc import Callable
from typing import Any


class Line:
    """The wire to a port: `cut`, nothing passes; `heal`ed, what was kept and what is new does."""

    def __init__(self, port: int, edit: Callable[[bytes], bytes] = bytes) -> None:
        """`edit`: what becomes of bytes on their way back to the caller."""
        self._to = port
        self._edit = edit
        self._door = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._door.getsockname()[1]
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._door, selectors.EVENT_READ, None)
        self._whole = threading.Event()
        self._whole.set()
        self._ended = False
        self._thread = threading.Thread(target=self._forward, name="line")
        self._thread.start()

    def cut(self) -> None:
        self._whole.clear()

    def heal(self) -> None:
        self._whole.set()

    def close(self) -> None:
        self._ended = True
        self._whole.set()
        self._thread.join()
        for key in list(self._selector.get_map().values()):
            key.fileobj.close()  # type: ignore[union-attr]  # all are sockets
        self._selector.close()

    def _forward(self) -> None:
        while not self._ended:
            for key, _ in self._selector.select(0.05):
                # While it is cut, what has come is kept here, as a network keeps what it sends again.
                self._whole.wait()
                if key.data is None:
                    self._connect()
                else:
                    self._pass_on(key.fileobj, *key.data)

    def _connect(self) -> None:
        caller, _ = self._door.accept()
        try:
            listener = socket.create_connection(("127.0.0.1", self._to))
        except OSError:
            caller.close()
            return
        self._selector.register(caller, selectors.EVENT_READ, (listener, bytes))
        self._selector.register(listener, selectors.EVENT_READ, (caller, self._edit))

    def _pass_on(self, source: Any, target: socket.socket, edit: Callable[[bytes], bytes]) -> None:
        try:
            data = source.recv(1 << 16)
            if data:
                target.sendall(edit(data))
                return
        except OSError:
            pass
        for end in (source, target):
            # Both may have been ready, and the other one's turn came first.
            with contextlib.suppress(KeyError, ValueError):
                self._selector.unregister(end)
            end.close()


class EngineLine:
    """The wire to a Mooncake engine: to its session's port, and to the one that it names there for bytes."""

    def __init__(self, session: str) -> None:
        host, _, port = session.rpartition(":")
        self._bytes: Line | None = None
        self._session = Line(int(port), self._name_detour)
        self.session = f"{host}:{self._session.port}"
        """What takes this way."""

    def cut(self) -> None:
        for line in self._lines():
            line.cut()

    def heal(self) -> None:
        for line in self._lines():
            line.heal()

    def close(self) -> None:
        for line in self._lines():
            line.close()

    def _lines(self) -> list[Line]:
        return [self._session] if self._bytes is None else [self._session, self._bytes]

    def _name_detour(self, answer: bytes) -> bytes:
        named = re.search(rb'"tcp_data_port":(\d+)', answer)
        if named is None:
            return answer
        if self._bytes is None:
            self._bytes = Line(int(named[1]))
        port = str(self._bytes.port).encode()
        # The message tells its length before.
        assert len(port) == len(named[1])
        return answer[: named.start(1)] + port + answer[named.end(1) :]
