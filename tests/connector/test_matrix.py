# SPDX-License-Identifier: Apache-2.0
"""The fault matrix: whatever happens at whatever moment of a transfer, on either side.

Prefill (two ranks) and decode (one, so that it regroups) are processes that can be killed and frozen; bytes
move by Mooncake. In every cell of the table the load ends as told there, never as wrong bytes that pass for
a load; blocks that vLLM got back are written no more; both sides let go of everything; and the next request,
with the same processes or their successors, is loaded and right.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from connector.engines import BLOCK_SIZE, model_folder
from connector.lines import EngineLine, Line
from connector.peer import Node, Peer

MOMENTS = ("before handshake", "queued", "reading", "regrouping", "before done", "after done")

# What becomes of the load. "gone": nobody is left to be told; "either": it is loaded, and right, or failed. A
# cell that cannot exist says why.
TABLE = {
    # fault, side of it      handshake queued    reading   regroup   before d. after done
    ("kill", "prefill"): ("failed", "failed", "failed", "failed", "failed", "loaded"),
    ("kill", "decode"): ("gone", "gone", "gone", "gone", "gone", "gone"),
    # Another engine at the same address, before decode has noticed anything.
    ("replace", "prefill"): ("failed", "failed", "failed", "failed", "failed", "loaded"),
    # Until decode has given up; an engine that resumes answers what it is still asked.
    ("freeze", "prefill"): ("failed", "failed", "failed", "failed", "failed", "loaded"),
    # Until the lease has ended and the blocks hold another request's KV.
    ("freeze", "decode"): ("failed", "failed", "failed", "failed", "failed", "loaded"),
    # Of the line to the listener, until decode has given up.
    ("cut", "side channel"): ("failed", "failed", "failed", "failed", "failed", "loaded"),
    # Of Mooncake's connections, all of them new, for longer than a read may go on without progress. Mooncake
    # meets its peer in that time, and what it then reads may be there at the first look.
    ("cut", "data path"): ("either", "either", "failed", "loaded", "loaded", "loaded"),
    # With everybody alive: decode believes in a longer lease than prefill does.
    ("lease end", "prefill"): ("failed", "failed", "failed", "failed", "failed", "no lease is left"),
    # What the transfer engine returns; no other call of these moments has an error to return.
    ("error", "decode"): ("no read yet", "no read yet", "failed", *(["no read any more"] * 3)),
    # Into decode's blocks, after the failure; nothing is ever written into prefill's.
    ("late write", "decode"): ("no read yet", "no read yet", "failed", *(["no read any more"] * 3)),
}
OUTCOMES = {"loaded": ("loaded",), "failed": ("failed",), "either": ("loaded", "failed"), "gone": ("gone",)}

CELLS = [
    pytest.param(moment, fault, side, outcome, id=f"{moment} x {fault} x {side}")
    for (fault, side), outcomes in TABLE.items()
    for moment, outcome in zip(MOMENTS, outcomes, strict=True)
    if outcome in OUTCOMES
]

HEADS = 4
LEASE_S = 2.5
TIMEOUTS = {"peer_timeout_s": 2, "read_timeout_s": 1, "lease_s": LEASE_S}
TOKENS = 2 * BLOCK_SIZE + 1
REMOTE, LOCAL, NEXT_REMOTE, NEXT_LOCAL = [1, 2, 3], [4, 5, 6], [11, 12, 13], [14, 15, 16]
"""A prompt's blocks on the two sides; its last token, alone in the third, is decode's to compute."""
THREADS = {"MainThread", "kv-follower", "kv-keeper", "kv-listener"}
THREADS |= {f"kv-reader_{index}" for index in range(4)} | {f"kv-source_{index}" for index in range(16)}


@dataclass
class Pair:
    prefill: Peer
    decode: Peer
    ids: Iterator[int]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    model = str(model_folder(Path(tmp_path_factory.mktemp("model")), HEADS))
    peers = [
        Peer(model, HEADS, tp_size, role, TIMEOUTS)
        for tp_size, role in ((2, "kv_producer"), (1, "kv_consumer"))
    ]
    try:
        yield Pair(*peers, itertools.count())
        # In order to the end: no thread keeps it from ending, and the port is free.
        assert [peer.close() for peer in peers] == [0, 0]
    finally:
        for peer in peers:
            peer.kill()


@pytest.mark.parametrize(("moment", "fault", "side", "outcome"), CELLS)
def test_cell(pair, moment, fault, side, outcome):
    # A line of its own, and so an address that decode has not met.
    line = Line(pair.prefill.port)
    data_path = DataPath(pair) if side == "data path" else None
    try:
        transfer = Transfer(pair, line, moment, fault, data_path)
        transfer.bring_about()
        STRIKE[fault, side](transfer)
        assert transfer.verdict() in OUTCOMES[outcome]
        transfer.both_let_go()
        next_one = Transfer(pair, line, blocks=(NEXT_REMOTE, NEXT_LOCAL))
        next_one.start()
        assert next_one.verdict() == "loaded"
        next_one.both_let_go()
        transfer.nothing_came_late()
    finally:
        line.close()
        if data_path is not None:
            data_path.close()


def test_after_all_that_no_process_grows(pair):
    """The processes that came through the cells above, with every kind of transfer that leaves both alive."""
    line = Line(pair.prefill.port)

    def one_of_every_kind() -> None:
        for fault in ("", "error", "late write"):
            transfer = Transfer(pair, line, "reading", fault)
            transfer.bring_about()
            STRIKE.get((fault, "decode"), Transfer.go_on)(transfer)
            assert transfer.verdict() == ("failed" if fault else "loaded")
            transfer.both_let_go()

    try:
        # Until each of the reader's threads has had its turn, and has a line of its own to its peer.
        for _ in range(3):
            one_of_every_kind()
        before = [peer.do(Node.footprint) for peer in (pair.prefill, pair.decode)]
        for _ in range(5):
            one_of_every_kind()
        for peer, then in zip((pair.prefill, pair.decode), before, strict=True):
            assert peer.do(Node.grown_since, then) == {}
    finally:
        line.close()


class DataPath:
    """Wires to all of prefill's transfer engines, of their own, and so addresses that decode has not met."""

    def __init__(self, pair: Pair) -> None:
        self._decode = pair.decode
        by_session = {session: EngineLine(session) for session in pair.prefill.do(Node.sessions)}
        self._lines = list(by_session.values())
        self._decode.do(Node.detour, {session: line.session for session, line in by_session.items()})

    def cut(self) -> None:
        for line in self._lines:
            line.cut()

    def heal(self) -> None:
        for line in self._lines:
            line.heal()

    def close(self) -> None:
        self._decode.do(Node.detour, {})
        for line in self._lines:
            line.close()


class Transfer:
    """One request on its way."""

    def __init__(
        self,
        pair: Pair,
        line: Line,
        moment: str = "",
        fault: str = "",
        data_path: DataPath | None = None,
        blocks: tuple[list[int], list[int]] = (REMOTE, LOCAL),
    ) -> None:
        self.prefill, self.decode, self.line = pair.prefill, pair.decode, line
        self._data_path = data_path
        self.moment, self._fault = moment, fault
        self.remote, self.local = blocks
        # The lease runs from prefill's end; a successor that has yet to start must not use it up.
        self.decode.do(Node.holds)
        number = next(pair.ids)
        self.at_prefill, self.at_decode = f"p{number}", f"d{number}"
        self.prefill.do(Node.fill, self.remote, number)
        self._expected = self.prefill.do(Node.kv, self.remote[:2])
        self.params: dict[str, Any] = self.prefill.do(Node.prefill, self.at_prefill, TOKENS, self.remote)
        self.params["remote_port"] = line.port
        if fault == "lease end":
            self.params["remote_lease_s"] = 1000 * LEASE_S
        self.prefill_lives = self.decode_lives = True
        self._given_away: np.ndarray | None = None

    def start(self) -> None:
        self.decode.do(Node.admit, self.at_decode, TOKENS, self.local, self.params)

    def bring_about(self) -> None:
        """Start it and stop it at its moment."""
        how = {"error": "fail", "late write": "late"}.get(self._fault, "stop")
        self.decode.do(Node.set_gate, self.moment, how if self.moment == "reading" else None)
        self.decode.do(Node.keep_stepping, self.moment != "before handshake")
        self.start()
        if self.moment == "after done":
            # Prefill frees the blocks before its answer has left, so decode must have heard it.
            self.prefill.until(Node.freed, self.at_prefill)
            self.decode.until(Node.verdict, self.at_decode)
        elif self.moment != "before handshake" and self._fault != "error":
            self.decode.until(Node.at_gate)

    def go_on(self) -> None:
        self.decode.do(Node.open_gate)
        self.decode.do(Node.keep_stepping, True)

    def verdict(self) -> str:
        """What vLLM is told at decode. If it is bad, the blocks go to somebody else at once."""
        if not self.decode_lives:
            return "gone"
        verdict: str = self.decode.until(Node.verdict, self.at_decode)
        found = self.decode.do(Node.kv, self.local[:2])
        assert verdict == "failed" or (found == self._expected).all()
        if verdict == "failed" and self._given_away is None:
            self.decode.do(Node.fill, self.local, 1000)
            self._given_away = self.decode.do(Node.kv, self.local)
        return verdict

    def both_let_go(self) -> None:
        if self.prefill_lives:
            self.prefill.until(Node.freed, self.at_prefill, within_s=10 * LEASE_S)
        for peer in (self.prefill, self.decode):
            assert not peer.do(Node.holds)
            names = peer.do(Node.threads)
            assert len(names) == len(set(names))
            assert set(names) <= THREADS

    def nothing_came_late(self) -> None:
        if self._given_away is not None:
            assert (self.decode.do(Node.kv, self.local) == self._given_away).all()

    def kill_prefill(self) -> None:
        self.prefill.kill()
        self.prefill_lives = False
        self.go_on()
        self.verdict()
        self.prefill.start()

    def kill_decode(self) -> None:
        self.decode.kill()
        self.decode_lives = False
        self.prefill.until(Node.freed, self.at_prefill, within_s=10 * LEASE_S)
        self.decode.start()

    def replace_prefill(self) -> None:
        self.prefill.kill()
        self.prefill_lives = False
        self.prefill.start()
        self.prefill.do(Node.fill, self.remote, 1001)
        self.go_on()

    def freeze_prefill(self) -> None:
        with self.prefill.frozen():
            self.go_on()
            if self.moment in ("queued", "reading"):
                # What was asked for may come as long as nobody knows otherwise, and it does after this.
                time.sleep(1.5 * TIMEOUTS["read_timeout_s"])
                assert self.decode.do(Node.verdict, self.at_decode) is None
            else:
                self.verdict()

    def freeze_decode(self) -> None:
        with self.decode.frozen():
            self.lease_ends()
        self.go_on()

    def cut_line(self) -> None:
        self.line.cut()
        self.go_on()
        self.verdict()
        self.line.heal()

    def cut_data_path(self) -> None:
        assert self._data_path is not None
        self._data_path.cut()
        self.go_on()
        if self.moment in ("before handshake", "queued", "reading"):
            # What was asked for may come as long as the wire may be healed, and it does.
            time.sleep(1.5 * TIMEOUTS["read_timeout_s"])
            assert self.decode.do(Node.verdict, self.at_decode) is None
        else:
            assert self.verdict() == "loaded"
        self._data_path.heal()

    def end_lease(self) -> None:
        self.lease_ends()
        self.go_on()

    def fail_read(self) -> None:
        """The transport does."""

    def write_late(self) -> None:
        time.sleep(0.2)
        assert self.decode.do(Node.verdict, self.at_decode) is None
        self.go_on()

    def lease_ends(self) -> None:
        self.prefill.until(Node.freed, self.at_prefill, within_s=10 * LEASE_S)
        self.prefill.do(Node.fill, self.remote, 1001)


STRIKE = {
    ("kill", "prefill"): Transfer.kill_prefill,
    ("kill", "decode"): Transfer.kill_decode,
    ("replace", "prefill"): Transfer.replace_prefill,
    ("freeze", "prefill"): Transfer.freeze_prefill,
    ("freeze", "decode"): Transfer.freeze_decode,
    ("cut", "side channel"): Transfer.cut_line,
    ("cut", "data path"): Transfer.cut_data_path,
    ("lease end", "prefill"): Transfer.end_lease,
    ("error", "decode"): Transfer.fail_read,
    ("late write", "decode"): Transfer.write_late,
}
