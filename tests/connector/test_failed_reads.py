# SPDX-License-Identifier: Apache-2.0
"""Reads that fail, come late or write late, injected at the transport: what may be written is not used."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Iterator

import pytest
import torch
from connector.engines import (
    BLOCK_SIZE,
    Engine,
    admit,
    engine_config,
    finish,
    model_folder,
    prefilled,
    running,
)
from connector.faults import FaultyConnector, FaultyTransport, Read

from vllm_ascend.errors import ReadFailed, ReadUnsettled
from vllm_ascend.kv_transfer.transport import Copies, Session

HEADS = 4
PROMPT = 2 * BLOCK_SIZE
REMOTE, LOCAL = [5, 6], [2, 9]
SETTLE_S = 1.0


@pytest.fixture(scope="module")
def engines(tmp_path_factory) -> Iterator[tuple[Engine, Engine, FaultyTransport]]:
    model = model_folder(tmp_path_factory.mktemp("model"), HEADS)
    prefill = Engine(engine_config(model, 2, "kv_producer"), HEADS)
    FaultyConnector.transports.clear()
    decode = Engine(engine_config(model, 1, "kv_consumer"), HEADS, connector=FaultyConnector)
    with running(prefill, decode):
        yield prefill, decode, FaultyConnector.transports[0]


def check_next_request_works(engines: tuple[Engine, Engine, FaultyTransport]) -> None:
    prefill, decode, transport = engines
    assert transport.faults == []
    prefill.pages(0).random_()
    wanted, _ = admit(decode, "next", PROMPT, LOCAL, prefilled(prefill, "p-next", PROMPT, REMOTE))
    output = decode.step_until(lambda output: output.finished_recving == {"next"})
    assert not output.failed_recving
    assert torch.equal(decode.pages(0).cpu()[:, LOCAL, ..., :2, :], prefill.pages(0).cpu()[:, REMOTE])
    assert finish(decode, wanted)["blocks"] == 2
    prefill.step_until(lambda output: output.finished_sending == {"p-next"})


def fails(read: Read, peer: Session, copies: Copies) -> None:
    raise ReadFailed("the cable is cut")


def fails_half_way(read: Read, peer: Session, copies: Copies) -> None:
    half = Copies(copies.remote[:1], copies.local[:1], copies.num_bytes[:1])
    read(peer, half)
    raise ReadFailed("the cable is cut")


@pytest.mark.parametrize("fault", [fails, fails_half_way])
def test_an_error_is_a_failed_load_at_once_and_frees_both_sides(engines, fault):
    prefill, decode, transport = engines
    transport.faults.append(fault)
    wanted, _ = admit(decode, "d", PROMPT, LOCAL, prefilled(prefill, "p", PROMPT, REMOTE))
    output = decode.step_until(lambda output: bool(output.finished_recving))
    assert (output.finished_recving, output.failed_recving) == ({"d"}, {"d"})
    assert finish(decode, wanted) is None
    prefill.step_until(lambda output: output.finished_sending == {"p"}, 5)
    check_next_request_works(engines)


def test_a_slow_read_is_awaited(engines):
    prefill, decode, transport = engines

    def slow(read: Read, peer: Session, copies: Copies) -> None:
        time.sleep(0.5)
        read(peer, copies)

    transport.faults.append(slow)
    wanted, _ = admit(decode, "d", PROMPT, LOCAL, prefilled(prefill, "p", PROMPT, REMOTE))
    started_s = time.monotonic()
    output = decode.step_until(lambda output: bool(output.finished_recving))
    assert time.monotonic() - started_s >= 0.5
    assert not output.failed_recving
    assert finish(decode, wanted)["transfer_ms"] >= 500
    prefill.step_until(lambda output: output.finished_sending == {"p"}, 5)


def test_blocks_that_a_failed_read_may_still_write_stay_out_of_use(engines):
    prefill, decode, transport = engines
    wrote = threading.Event()

    def writes_late(read: Read, peer: Session, copies: Copies) -> None:
        def later() -> None:
            time.sleep(SETTLE_S / 2)
            read(peer, copies)
            wrote.set()

        threading.Thread(target=later).start()
        raise ReadUnsettled("the engine gave up waiting", wrote.is_set)

    transport.faults.append(writes_late)
    admit(decode, "d", PROMPT, LOCAL, prefilled(prefill, "p", PROMPT, REMOTE))
    assert not decode.step().finished_recving
    # Prefill need not wait: what reads late writes here.
    prefill.step_until(lambda output: output.finished_sending == {"p"}, 5)
    output = decode.step_until(lambda output: bool(output.finished_recving))
    assert wrote.is_set()
    assert output.failed_recving == {"d"}
    # From now on the blocks are vLLM's to use, and nothing writes them.
    decode.pages(0)[:, LOCAL] = 7
    time.sleep(0.2)
    assert (decode.pages(0)[:, LOCAL] == 7).all()
    check_next_request_works(engines)


def test_others_are_read_while_one_settles(engines):
    prefill, decode, transport = engines

    ended = threading.Event()

    def unsettled(read: Read, peer: Session, copies: Copies) -> None:
        raise ReadUnsettled("the engine gave up waiting", ended.is_set)

    transport.faults.append(unsettled)
    admit(decode, "d1", PROMPT, LOCAL, prefilled(prefill, "p1", PROMPT, REMOTE))
    assert not decode.step().finished_recving
    prefill.step_until(lambda output: output.finished_sending == {"p1"}, 5)
    admit(decode, "d2", PROMPT, [10, 11], prefilled(prefill, "p2", PROMPT, REMOTE))
    output = decode.step_until(lambda output: bool(output.finished_recving))
    assert (output.finished_recving, output.failed_recving) == ({"d2"}, set())
    ended.set()
    output = decode.step_until(lambda output: bool(output.finished_recving))
    assert output.failed_recving == {"d1"}
    prefill.step_until(lambda output: output.finished_sending == {"p2"}, 5)


def test_the_sources_of_a_request_are_read_at_the_same_time(engines):
    prefill, decode, transport = engines
    both = threading.Barrier(2)

    def with_the_other(read: Read, peer: Session, copies: Copies) -> None:
        both.wait(5)
        read(peer, copies)

    transport.faults += [with_the_other, with_the_other]
    admit(decode, "d", PROMPT, LOCAL, prefilled(prefill, "p", PROMPT, REMOTE))
    output = decode.step_until(lambda output: bool(output.finished_recving))
    assert not output.failed_recving
    prefill.step_until(lambda output: output.finished_sending == {"p"}, 5)


def test_a_peer_that_stalls_holds_up_no_other_which_is_asked_once_who_it_is(engines, tmp_path, caplog_vllm):
    prefill, decode, transport = engines
    stalls = {worker.get_handshake_metadata().regions.session for worker in prefill.workers}
    stalling, gate = threading.Event(), threading.Event()

    def stalled(read: Read, peer: Session, copies: Copies) -> None:
        if peer in stalls:
            stalling.set()
            assert gate.wait(20)
        read(peer, copies)

    caplog_vllm.set_level(logging.INFO, logger="vllm")
    other = Engine(engine_config(model_folder(tmp_path, HEADS), 1, "kv_producer"), HEADS)
    with running(other), contextlib.ExitStack() as ending:
        ending.callback(gate.set)
        transport.faults += [stalled] * 100
        for number in range(5):
            blocks = [2 + 2 * number, 3 + 2 * number]
            admit(decode, f"s{number}", PROMPT, blocks, prefilled(prefill, f"s{number}", PROMPT, REMOTE))
        decode.step_until(lambda _: stalling.is_set())
        for number in range(4):
            blocks = [12 + 2 * number, 13 + 2 * number]
            admit(decode, f"o{number}", PROMPT, blocks, prefilled(other, f"o{number}", PROMPT, REMOTE))
        loaded: set[str] = set()
        decode.step_until(lambda output: loaded.update(output.finished_recving or ()) or len(loaded) == 4)
        assert loaded == {"o0", "o1", "o2", "o3"}
        gate.set()
        decode.step_until(lambda output: loaded.update(output.finished_recving or ()) or len(loaded) == 9)
        transport.faults.clear()
        assert len({record for record in caplog_vllm.records if "joined: tp=1" in record.getMessage()}) == 1
        freed: set[str] = set()
        prefill.step_until(lambda output: freed.update(output.finished_sending or ()) or len(freed) == 5)


def test_mooncake_knows_when_what_it_could_not_read_has_ended(engines):
    prefill, decode, transport = engines
    session = prefill.workers[0].get_handshake_metadata().regions.session
    ours = decode.workers[0].get_handshake_metadata().regions.stacks[0].addresses[0]
    one = torch.ones(1, dtype=torch.int64).numpy()
    nowhere = Copies(remote=one * 4096, local=one * ours, num_bytes=one * 64)
    with pytest.raises(ReadUnsettled, match="could not read 1 of the ranges") as error:
        transport.inner.read(Session(session), nowhere)
    assert error.value.settled()
