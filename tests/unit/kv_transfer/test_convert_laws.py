# SPDX-License-Identifier: Apache-2.0
"""Laws of reads out of pages that are cut otherwise, over every valid pair of engines (pairs.py)."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from unit.kv_transfer.pairs import (
    HEAD_BYTES,
    LAYERS,
    NUM_SLOTS,
    UNTOUCHED,
    Cache,
    caches_of,
    plans,
    slots_of,
    transfers,
)

from vllm_ascend.kv_transfer.convert import Stage, paged_tokens, stages_of
from vllm_ascend.kv_transfer.transport import Address, InProcessTransport, Region, Session
from vllm_ascend.kv_transfer.windows import Window, prove_filled


def rows_by_layer(stage: Stage, window: Window, staged: np.ndarray) -> np.ndarray:
    """What was read for a window as [layer, row, byte], told from the order that convert.py describes."""
    num_layers, num_pages = len(window.layers), len(window.pages)
    if not stage.head_major:
        return staged.reshape(num_layers, -1, HEAD_BYTES)
    found = []
    for piece in stage.pieces:
        num_bytes = num_layers * num_pages * piece.num_bytes
        of_piece, staged = staged[:num_bytes], staged[num_bytes:]
        pages = of_piece.reshape(num_pages, piece.num_heads, num_layers, -1)
        found.append(np.moveaxis(pages, 2, 0).reshape(num_layers, -1, HEAD_BYTES))
    return np.concatenate(found, axis=1)


def layer_rows(decode: Cache, layer: int) -> np.ndarray:
    """The memory from where a layer begins on, as [row of one head, byte]."""
    memory = decode.raw.reshape(-1)[decode.memory.addresses[layer] - decode.region.address :]
    return memory[: len(memory) // HEAD_BYTES * HEAD_BYTES].reshape(-1, HEAD_BYTES)


def read_and_place(decode: Cache, stage: Stage, transport, tokens, part_bytes: int) -> None:
    memory = np.full(part_bytes, UNTOUCHED, dtype=np.uint8)
    at = Address(memory.ctypes.data)
    transport.register([Region(at, part_bytes)])
    for window in stage.windows(len(tokens.pages), part_bytes):
        num_bytes = len(window.layers) * len(window.pages) * stage.page_bytes
        ranges = stage.copies(window, tokens, at)
        prove_filled(at, num_bytes, [copies for _, copies in ranges])
        for rank, copies in ranges:
            transport.read(Session(str(rank)), copies)
        target = stage.targets(tokens, window.pages)
        wanted = target >= 0
        layers = stage.layers[window.layers.start : window.layers.stop]
        for layer, rows in zip(layers, rows_by_layer(stage, window, memory[:num_bytes]), strict=True):
            layer_rows(decode, layer)[target[wanted]] = rows[wanted]


@settings(deadline=None)
@given(transfers(converting=True), st.integers(1, 9))
def test_every_decode_rank_gets_its_slice_of_the_reference_and_nothing_else_changes(transfer, part_pages):
    shape = (NUM_SLOTS, LAYERS, transfer.planes, transfer.num_kv_heads, HEAD_BYTES)
    reference = np.random.default_rng(0).integers(0, 200, shape, dtype=np.uint8)
    prefill = caches_of(transfer.prefill, transfer)
    for cache in prefill:
        cache.bytes[cache.at(range(NUM_SLOTS))] = cache.part_of(reference)
    cluster = {Session(str(place)): [cache.region] for place, cache in enumerate(prefill)}
    for decode, plan in plans(transfer, prefill, staged_parts=True):
        assert plan.converts
        expected = decode.raw.copy()
        pulled = reference[slots_of(transfer.remote, transfer.pulled())]
        where = decode.at(slots_of(transfer.local, transfer.pulled()))
        decode.in_order(expected)[where] = decode.part_of(pulled)

        tokens = paged_tokens(transfer.runs(), transfer.prefill.page_size)
        transport = InProcessTransport(Session("decode"), dict(cluster))
        for stage in stages_of(plan):
            read_and_place(decode, stage, transport, tokens, part_pages * stage.page_bytes)

        assert np.array_equal(decode.raw, expected)


@settings(deadline=None)
@given(transfers(converting=True))
def test_each_layer_is_in_one_stage_and_each_head_in_one_piece(transfer):
    for decode, plan in plans(transfer, caches_of(transfer.prefill, transfer), staged_parts=True):
        stages = stages_of(plan)
        layers = [layer for stage in stages for layer in stage.layers]
        assert sorted(layers) == list(range(len(decode.layers)))
        for stage in stages:
            heads = [head for piece in stage.pieces for head in range(piece.wanted.start, piece.wanted.stop)]
            assert heads == list(range(len(decode.memory.heads)))


@settings(deadline=None)
@given(transfers(converting=True))
def test_a_window_of_all_layers_of_head_major_blocks_has_a_range_for_each_block_and_source(transfer):
    for _, plan in plans(transfer, caches_of(transfer.prefill, transfer), staged_parts=True):
        tokens = paged_tokens(transfer.runs(), transfer.prefill.page_size)
        for stage in stages_of(plan):
            # Of a stage of the other engine whose layers are all wanted here.
            whole = all(len(piece.bases) == len(piece.remote.layers) for piece in stage.pieces)
            if not stage.head_major or not whole:
                continue
            (window,) = stage.windows(len(tokens.pages), 2**30)
            for _, copies in stage.copies(window, tokens, Address(0)):
                assert len(copies) == len(tokens.pages)
