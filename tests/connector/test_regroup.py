# SPDX-License-Identifier: Apache-2.0
"""The regroup step on the device against plain indexing, for every size of element and across its parts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from connector.engines import Engine, admit, engine_config, model_folder, prefilled, running

from vllm_ascend.kv_transfer.blocks import neighbours
from vllm_ascend.kv_transfer.connector import MooncakeConnector
from vllm_ascend.kv_transfer.plan import share_positions
from vllm_ascend.kv_transfer.regroup import LONGEST_RUN, Regroup

BLOCK_SIZE, HEADS, HEAD_SIZE, LAYERS = 4, 4, 32, 2


def regrouped(
    layer: torch.Tensor, run_starts: list[int], run_lengths: list[int], shares: int
) -> torch.Tensor:
    """What a layer must look like afterwards. `layer`: [blocks, heads, block size, 2 * head size]."""
    after = layer.clone()
    for start, length in zip(run_starts, run_lengths, strict=True):
        run = layer[start : start + length].reshape(shares, length, 2, BLOCK_SIZE, HEADS // shares, HEAD_SIZE)
        pages = run.permute(1, 2, 3, 0, 4, 5)
        after[start : start + length] = pages.reshape(length, HEADS, BLOCK_SIZE, 2 * HEAD_SIZE)
    return after


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.int8])
@pytest.mark.parametrize("shares", [2, 4])
@pytest.mark.parametrize(
    ("run_starts", "run_lengths"),
    [
        pytest.param([5], [1], id="one block"),
        pytest.param([7, 2, 11], [3, 1, 2], id="three runs"),
        pytest.param([0, 70, 140], [LONGEST_RUN, LONGEST_RUN, 9], id="more than is done at once"),
    ],
)
def test_heads_stand_side_by_side_and_nothing_else_changes(dtype, shares, run_starts, run_lengths):
    bits = torch.randint(
        0, 256, (LAYERS, 150, HEADS, BLOCK_SIZE, 2 * HEAD_SIZE * dtype.itemsize), dtype=torch.uint8
    )
    before = bits.view(torch.int8).view(LAYERS, 150, -1).view(dtype).view(LAYERS, 150, HEADS, BLOCK_SIZE, -1)
    on_device = before.to("npu:1")
    regroup = Regroup(tuple(on_device))
    regroup.enter_thread()

    blocks = np.concatenate([np.arange(s, s + n) for s, n in zip(run_starts, run_lengths, strict=True)])
    runs = neighbours(blocks, blocks, 1, LONGEST_RUN)
    assert sorted(zip(runs.local_start, runs.length, strict=True)) == sorted(
        zip(run_starts, run_lengths, strict=True)
    )
    regroup.run(runs.local(), share_positions(runs, shares), runs.length)

    for layer, after in zip(before, on_device.cpu(), strict=True):
        expected = regrouped(layer, run_starts, run_lengths, shares)
        assert torch.equal(after.view(torch.int8), expected.view(torch.int8))


def test_a_fence_waits_for_the_work_before_it_on_whichever_stream_is_current():
    device = torch.device("npu", 1)
    with torch.npu.device(device):
        regroup = Regroup(
            (torch.zeros(4, HEADS, BLOCK_SIZE, 2 * HEAD_SIZE, dtype=torch.bfloat16, device=device),)
        )
        source = torch.ones(2**22, pin_memory=True)
        target = torch.zeros(2**22, device=device)
        for stream in (torch.npu.current_stream(), torch.npu.Stream()):
            with torch.npu.stream(stream):
                for _ in range(8):
                    target.copy_(source, non_blocking=True)
                copied = torch.npu.Event()
                copied.record()
                assert not copied.query()
                regroup.fence().wait()
                assert copied.query()


class WatchedRegroup(Regroup):
    """Notes the device that is current in the thread, and the one that the rank has."""

    found: ClassVar[list[tuple[int, int]]] = []

    def run(self, local_blocks: Any, positions: Any, run_lengths: Any) -> None:
        self.found.append((torch.npu.current_device(), self._device.index))
        super().run(local_blocks, positions, run_lengths)


class WatchedConnector(MooncakeConnector):
    @classmethod
    def make_regroup(cls, kv_caches: Sequence[torch.Tensor]) -> Regroup:
        return WatchedRegroup(kv_caches)


def test_reader_threads_have_their_ranks_device_and_open_no_other(tmp_path):
    model = model_folder(tmp_path, 4)
    prefill = Engine(engine_config(model, 4, "kv_producer"), 4)
    decode = Engine(engine_config(model, 2, "kv_consumer"), 4, connector=WatchedConnector)
    with running(prefill, decode):
        for turn in range(4):
            admit(decode, f"d{turn}", 17, [1, 2], prefilled(prefill, f"p{turn}", 17, [1, 2]))
            decode.step_until(lambda output: bool(output.finished_recving))
    assert sorted(WatchedRegroup.found) == [(0, 0)] * 4 + [(1, 1)] * 4
