# SPDX-License-Identifier: Apache-2.0
"""Pages of the other layout: rows on the device against plain indexing, and the life of staging memory.

That every byte arrives between engines of all sizes is shown by test_transfer.py; that a wrong one is seen by
test_verify.py.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from connector.engines import (
    BLOCK_SIZE,
    LAYERS,
    Engine,
    admit,
    engine_config,
    model_folder,
    prefilled,
    running,
)
from connector.faults import FaultyConnector, FaultyTransport, Read
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_ascend.attention.cache_layout import page_layout
from vllm_ascend.errors import ReadFailed
from vllm_ascend.kv_transfer.place import PerHead
from vllm_ascend.kv_transfer.transport import Address, Copies, Region, Session

HEADS, NUM_BLOCKS = 4, 5
PROMPT = 2 * BLOCK_SIZE
REMOTE, LOCAL, MORE = [5, 6], [2, 9], [11, 3]
DEVICE = torch.device("npu", 1)


def caches(bits: torch.Tensor, head_major: bool) -> list[torch.Tensor]:
    """Memory [layer, block, page] or head-major [block, head, layer, page] as vLLM's views of the layers.

    A page ends with [token, bytes of K and V], whatever is in it.
    """
    if head_major:
        return list(bits.unbind(2))
    return list(bits)


@settings(deadline=None, max_examples=40)
@given(
    head_major=st.booleans(),
    heads=st.integers(1, 4),
    block_size=st.sampled_from([2, 4, 6]),
    head_bytes=st.sampled_from([32, 96]),
    chance=st.randoms(use_true_random=False),
)
def test_a_row_of_a_head_goes_where_its_slot_says_and_nothing_else_changes(
    head_major: bool, heads: int, block_size: int, head_bytes: int, chance
):
    torch.npu.set_device(DEVICE)
    page = (heads, block_size, 2 * head_bytes)
    shape = (NUM_BLOCKS, heads, LAYERS, *page[1:]) if head_major else (LAYERS, NUM_BLOCKS, *page)
    memory = torch.randint(-128, 128, shape, dtype=torch.int8)
    on_device = memory.view(torch.bfloat16).to(DEVICE)
    layout = page_layout(caches(on_device, head_major)[0], head_major=head_major)
    placing = PerHead(caches(on_device, head_major), layout)

    num_slots = NUM_BLOCKS * block_size
    slots = chance.sample(range(num_slots), chance.randint(1, num_slots))
    rows = torch.randint(-128, 128, (2, heads, 2, len(slots), head_bytes), dtype=torch.int8)
    nowhere = torch.randint(-128, 128, (2, 3, head_bytes), dtype=torch.int8)
    target = np.append(layout.head_rows(np.array(slots)).reshape(-1), [-1, -1, -1])
    staged = torch.cat((rows.view(2, -1, head_bytes), nowhere), dim=1).to(DEVICE)
    placing.place(staged.view(2, -1), [2, 0], placing.target(target))

    # Token by token: head-major a page has K and V of a head, token-major of all heads.
    if head_major:
        expected = memory.view(NUM_BLOCKS, heads, LAYERS, 2, block_size, head_bytes).permute(2, 0, 3, 4, 1, 5)
    else:
        expected = memory.view(LAYERS, NUM_BLOCKS, 2, block_size, heads, head_bytes)
    for layer, of_layer in zip((2, 0), rows, strict=True):
        for number, slot in enumerate(slots):
            block, token = divmod(slot, block_size)
            for plane in (0, 1):
                for head in range(heads):
                    expected[layer, block, plane, token, head] = of_layer[head, plane, number]
    assert torch.equal(on_device.cpu().view(torch.int8), memory)


@pytest.fixture(scope="module")
def prefills(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Engine, Engine]]:
    """Prefill engines, of one rank, token-major, and of two, head-major."""
    model = model_folder(tmp_path_factory.mktemp("model"), HEADS)
    token_major = Engine(engine_config(model, 1, "kv_producer", engine_id="token-major"), HEADS)
    head_major = Engine(
        engine_config(model, 2, "kv_producer", head_major=True, engine_id="head-major"), HEADS
    )
    with running(token_major, head_major):
        for engine in (token_major, head_major):
            for rank in range(engine.num_ranks):
                for layer in range(LAYERS):
                    engine.layer(rank, layer).random_()
        yield token_major, head_major


@pytest.fixture
def model(tmp_path):
    return model_folder(tmp_path, HEADS)


def decode_engine(model, **extra) -> tuple[Engine, FaultyTransport]:
    """A token-major engine of one rank."""
    FaultyConnector.transports.clear()
    engine = Engine(engine_config(model, 1, "kv_consumer", extra), HEADS, connector=FaultyConnector)
    return engine, FaultyConnector.transports[0]


def ask(prefill: Engine, decode: Engine, name: str, local: list[int]) -> None:
    admit(decode, name, PROMPT, local, prefilled(prefill, name, PROMPT, REMOTE))


def ended(decode: Engine, *names: str) -> set[str]:
    """Wait for the loads; those that failed."""
    waiting, failed = set(names), set()

    def all_ended(output) -> bool:
        waiting.difference_update(output.finished_recving or ())
        failed.update(output.failed_recving or ())
        return not waiting

    decode.step_until(all_ended)
    return failed


def arrived(prefill: Engine, decode: Engine, local: list[int]) -> bool:
    """Whether all but the last token, which decode computes, are those of the prefill engine's blocks."""
    for layer in range(LAYERS):
        there = torch.cat(
            [prefill.layer(rank, layer)[REMOTE].cpu() for rank in range(prefill.num_ranks)], dim=-2
        )
        here = decode.layer(0, layer)[local].cpu()
        there[-1, :, -1] = here[-1, :, -1] = 0
        if not torch.equal(there, here):
            return False
    return True


def test_staging_memory_is_there_from_the_first_engine_of_the_other_layout_on(prefills, model):
    token_major, head_major = prefills
    decode, transport = decode_engine(model, staging_mib=1)
    with running(decode):
        before = len(transport.registered)
        wanted = (("same", token_major, 0), ("other", head_major, 1), ("other again", head_major, 1))
        for name, prefill, num_regions in wanted:
            ask(prefill, decode, name, LOCAL)
            assert not ended(decode, name)
            assert arrived(prefill, decode, LOCAL)
            assert [region.num_bytes for region in transport.registered[before:]] == [2**20] * num_regions


def test_engines_of_the_other_layout_that_are_met_at_once_share_it(prefills, model):
    _, head_major = prefills
    decode, transport = decode_engine(model)
    another = Engine(engine_config(model, 1, "kv_producer", head_major=True, engine_id="another"), HEADS)
    with running(decode, another):
        before = len(transport.registered)
        ask(head_major, decode, "one", LOCAL)
        ask(another, decode, "two", MORE)
        assert not ended(decode, "one", "two")
        assert arrived(head_major, decode, LOCAL)
        assert arrived(another, decode, MORE)
        assert len(transport.registered) == before + 1


def test_memory_is_registered_while_another_engine_is_read(prefills, model):
    token_major, head_major = prefills
    decode, transport = decode_engine(model)
    reading, gate = threading.Event(), threading.Event()

    def held(read: Read, peer: Session, copies: Copies) -> None:
        reading.set()
        assert gate.wait(20)
        read(peer, copies)

    with running(decode):
        transport.faults.append(held)
        ask(token_major, decode, "held", LOCAL)
        decode.step_until(lambda _: reading.is_set())
        ask(head_major, decode, "other", MORE)
        assert not ended(decode, "other")
        gate.set()
        assert not ended(decode, "held")
        assert arrived(head_major, decode, MORE)
        assert arrived(token_major, decode, LOCAL)


def test_mooncake_registers_memory_while_it_reads(prefills, model):
    token_major, _ = prefills
    decode, transport = decode_engine(model)
    memory = torch.zeros(64, 4096, dtype=torch.int8)
    regions = token_major.workers[0].get_handshake_metadata().regions
    with running(decode):
        into = decode.workers[0].get_handshake_metadata().regions.stacks[0].addresses[0]
        each = np.arange(64, dtype=np.int64) * 64
        copies = Copies(regions.stacks[0].addresses[0] + each, into + each, np.full(64, 64))
        done = threading.Event()
        reads: list[ReadFailed | None] = []

        def read_on() -> None:
            while not done.is_set():
                try:
                    transport.inner.read(Session(regions.session), copies)
                    reads.append(None)
                except ReadFailed as failure:
                    reads.append(failure)

        reader = threading.Thread(target=read_on)
        reader.start()
        for row in memory:
            transport.register([Region(Address(row.data_ptr()), row.numel())])
        done.set()
        reader.join(20)
    assert reads
    assert set(reads) == {None}


def test_a_read_that_fails_is_a_failed_load_and_the_next_one_is_right(prefills, model):
    _, head_major = prefills
    decode, transport = decode_engine(model)

    def fails(read: Read, peer: Session, copies: Copies) -> None:
        raise ReadFailed("the cable is cut")

    with running(decode):
        transport.faults.append(fails)
        ask(head_major, decode, "cut", LOCAL)
        assert ended(decode, "cut") == {"cut"}
        ask(head_major, decode, "whole", LOCAL)
        assert not ended(decode, "whole")
        assert arrived(head_major, decode, LOCAL)


@pytest.mark.parametrize(
    ("extra", "sentence"),
    [
        pytest.param(
            {"staging_mib": 1, "reader_threads": 64},
            "staging memory of 1048576 bytes has 128 parts of 8192 bytes and a page of one layer has 16384; "
            "raise staging_mib",
            id="too little",
        ),
        pytest.param(
            {"staging_mib": 65536},
            "there are no 68719476736 bytes of device memory left for staging; lower staging_mib",
            id="more than the device has",
        ),
    ],
)
def test_engines_do_not_fit_without_staging_memory(prefills, model, caplog_vllm, extra, sentence):
    token_major, _ = prefills
    decode, _ = decode_engine(model, **extra)
    large = engine_config(model, 1, "kv_producer", head_major=True, engine_id="large", block_size=64)
    with running(decode, prefill := Engine(large, HEADS)):
        ask(prefill, decode, "refused", LOCAL)
        assert ended(decode, "refused") == {"refused"}
        assert f"its pages must be converted, which takes staging memory: {sentence}" in caplog_vllm.text
        ask(token_major, decode, "same", LOCAL)
        assert not ended(decode, "same")
