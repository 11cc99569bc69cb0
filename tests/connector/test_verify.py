# SPDX-License-Identifier: Apache-2.0
"""With `verify`, a bit that is wrong in any place is seen, and the load fails; without it, nobody would know.

That true KV passes, for every pair of sizes and layouts, is shown by test_transfer.py, which verifies.
"""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import pytest
from connector.engines import BLOCK_SIZE, Engine, admit, engine_config, model_folder, prefilled, running
from connector.faults import FaultyConnector, FaultyTransport, Read
from connector.topologies import LAYERS

from vllm_ascend.kv_transfer.handshake import Channel, Listener
from vllm_ascend.kv_transfer.messages import Answer, AskSums, Question, prompt_digest
from vllm_ascend.kv_transfer.transport import Copies, Session

HEADS = 4
PROMPT = 3 * BLOCK_SIZE
REMOTE, LOCAL = [5, 6, 7], [2, 9, 4]
LAST_LAYER = 2
WRONG = "its KV is not what the prefill engine computed, in layer"


@pytest.fixture(
    scope="module", params=[(2, False), (1, False), (2, True)], ids=["regrouped", "as it is", "converted"]
)
def engines(request, tmp_path_factory) -> Iterator[tuple[Engine, Engine, FaultyTransport]]:
    """A prefill engine of so many ranks, head-major or not, and a token-major decode engine of one."""
    tp_size, head_major = request.param
    model = model_folder(tmp_path_factory.mktemp("model"), HEADS)
    options = {"verify": True, "peer_timeout_s": 5}
    config = engine_config(model, tp_size, "kv_producer", options, head_major=head_major)
    prefill = Engine(config, HEADS)
    FaultyConnector.transports.clear()
    decode = Engine(engine_config(model, 1, "kv_consumer", options), HEADS, connector=FaultyConnector)
    with running(prefill, decode):
        yield prefill, decode, FaultyConnector.transports[0]


def load(
    engines: tuple[Engine, Engine, FaultyTransport], before_read: Callable[[], None] = lambda: None
) -> bool:
    """Prefill random KV, sum it, read it. Returns whether the load was good."""
    prefill, decode, _ = engines
    for rank, layer in itertools.product(range(prefill.num_ranks), range(LAYERS)):
        prefill.layer(rank, layer).random_()
    decode.pages(0).zero_()
    params = prefilled(prefill, "p", PROMPT, REMOTE)
    prefill.step()
    before_read()
    admit(decode, "d", PROMPT, LOCAL, params)
    output = decode.step_until(lambda output: bool(output.finished_recving))
    prefill.step_until(lambda output: bool(output.finished_sending))
    return not output.failed_recving


def flip(address: int) -> None:
    byte = ctypes.c_uint8.from_address(address)
    byte.value ^= 0x10


def test_true_kv_passes(engines):
    assert load(engines)


@pytest.mark.parametrize("element", [0, -1], ids=["first", "last"])
def test_a_bit_that_flips_in_a_source_block_after_prefill(engines, element, caplog_vllm):
    prefill, _, _ = engines

    def fault() -> None:
        # The last token's row is decode's own to compute; the one before it is the last that is read.
        row = prefill.layer(0, LAST_LAYER)[REMOTE[-1], 1, -2, -1]
        row[element] = int(row[element].cpu()) ^ 4

    assert not load(engines, fault)
    assert f"{WRONG} model.layers.2.self_attn.attn at 1 places, first in head" in caplog_vllm.text
    assert "tokens 32 to 47" in caplog_vllm.text


def test_the_last_prompt_token_is_not_among_what_is_verified(engines):
    prefill, _, _ = engines

    def fault() -> None:
        prefill.layer(0, LAST_LAYER)[REMOTE[-1], 1, -1, -1] = 7

    assert load(engines, fault)


def flips_where_it_lands(read: Read, peer: Session, copies: Copies) -> None:
    read(peer, copies)
    flip(int(copies.local[-1]) + 3)


def reads_another_block(read: Read, peer: Session, copies: Copies) -> None:
    remote = copies.remote.copy()
    remote[0] += copies.num_bytes[0]
    read(peer, replace(copies, remote=remote))


def reads_too_little(read: Read, peer: Session, copies: Copies) -> None:
    read(peer, replace(copies, num_bytes=copies.num_bytes - 32))


def exchanges_two_destinations(read: Read, peer: Session, copies: Copies) -> None:
    assert len(copies) > 1
    local = copies.local.copy()
    local[[0, 1]] = local[[1, 0]]
    smaller = np.minimum(copies.num_bytes[0], copies.num_bytes[1])
    num_bytes = copies.num_bytes.copy()
    num_bytes[[0, 1]] = smaller
    read(peer, replace(copies, local=local, num_bytes=num_bytes))


@pytest.mark.parametrize(
    "fault",
    [flips_where_it_lands, reads_another_block, reads_too_little, exchanges_two_destinations],
    ids=lambda fault: fault.__name__.replace("_", " "),
)
def test_what_a_read_does_wrong_is_seen(engines, fault, caplog_vllm):
    _, _, transport = engines
    transport.faults.append(fault)
    assert not load(engines)
    assert transport.faults == []
    assert WRONG in caplog_vllm.text
    assert load(engines)


def test_heads_in_the_wrong_order_are_seen(engines, caplog_vllm):
    prefill, decode, transport = engines
    if prefill.num_ranks == 1:
        pytest.skip("one source has no order")
    kept: list[Copies] = []

    def keeps(read: Read, peer: Session, copies: Copies) -> None:
        kept.append(copies)

    def exchanges(read: Read, peer: Session, copies: Copies) -> None:
        # Each source's heads land where the other's belong.
        sessions = [worker.get_handshake_metadata().regions.session for worker in prefill.workers]
        (other,) = (session for session in sessions if session != peer)
        read(Session(other), replace(kept[0], local=copies.local))
        read(peer, replace(copies, local=kept[0].local))

    transport.faults += [keeps, exchanges]
    assert not load(engines)
    assert WRONG in caplog_vllm.text
    assert decode.tp_size == 1


def test_a_bit_that_flips_after_the_regroup(engines, caplog_vllm):
    prefill, decode, _ = engines
    for rank, layer in itertools.product(range(prefill.num_ranks), range(LAYERS)):
        prefill.layer(rank, layer).random_()
    params = prefilled(prefill, "p", PROMPT, REMOTE)
    prefill.step()
    channel = Channel(params["remote_host"], params["remote_port"], 5)
    flipped: list[Question] = []

    def relay(question: Question) -> Answer:
        # Decode asks about the first layer once all of them are read and regrouped.
        if isinstance(question, AskSums) and not flipped:
            flip(decode.pages(0)[LAST_LAYER, LOCAL[1]].data_ptr())
            flipped.append(question)
        return channel.ask(question)

    with Listener("127.0.0.1", 0, relay) as listener:
        admit(decode, "d", PROMPT, LOCAL, {**params, "remote_port": listener.port})
        output = decode.step_until(lambda output: bool(output.finished_recving))
    channel.close()
    assert flipped
    assert output.failed_recving == {"d"}
    assert f"{WRONG} model.layers.2.self_attn.attn at 1 places, first in head 0, tokens 16 to 31" in (
        caplog_vllm.text
    )
    prefill.step_until(lambda output: bool(output.finished_sending))


def test_a_prompt_of_another_length_is_not_taken_for_verified(engines, caplog_vllm):
    prefill, decode, _ = engines
    params = prefilled(prefill, "p", PROMPT, REMOTE)
    prefill.step()
    # A router that says of the shorter prompt what prefill said of the longer one.
    params["remote_prompt_digest"] = prompt_digest(list(range(PROMPT - 3)))
    admit(decode, "d", PROMPT - 3, LOCAL, params)
    output = decode.step_until(lambda output: bool(output.finished_recving))
    assert output.failed_recving == {"d"}
    assert "summed 47 tokens and 44 were read; send the same prompt to both" in caplog_vllm.text
    prefill.step_until(lambda output: bool(output.finished_sending))


def test_an_engine_that_does_not_sum_is_refused(engines, tmp_path, caplog_vllm):
    _, decode, _ = engines
    prefill = Engine(engine_config(model_folder(tmp_path, HEADS), 1, "kv_producer"), HEADS)
    with running(prefill):
        admit(decode, "d", PROMPT, LOCAL, prefilled(prefill, "p", PROMPT, REMOTE))
        output = decode.step_until(lambda output: bool(output.finished_recving))
    assert output.failed_recving == {"d"}
    assert "this engine verifies and prefill engine" in caplog_vllm.text
