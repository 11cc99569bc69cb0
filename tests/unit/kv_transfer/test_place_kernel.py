# SPDX-License-Identifier: Apache-2.0
"""The Triton kernel, run by Triton's interpreter on the CPU: what it computes, not how fast.

tests/benchmarks/regroup_gpu.py holds the compiled kernel to the same on a GPU.
"""

from __future__ import annotations

from types import ModuleType

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

LAYERS, NUM_BLOCKS = 4, 7


@pytest.fixture(scope="module")
def kernel() -> ModuleType:
    pytest.importorskip("triton", reason="the kernel needs triton, which comes with triton-ascend on cards")
    with pytest.MonkeyPatch.context() as environment:
        # Triton looks when a kernel is defined.
        environment.setenv("TRITON_INTERPRET", "1")
        from vllm_ascend.kv_transfer import place_kernel
    return place_kernel


@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.too_slow])
@given(
    shares=st.integers(2, 8),
    share_heads=st.integers(1, 3),
    block_size=st.sampled_from([1, 3, 16]),
    head_bytes=st.sampled_from([16, 32, 48]),
    first_layer=st.integers(0, LAYERS - 1),
    pages=st.lists(st.integers(0, NUM_BLOCKS - 1), min_size=1, unique=True),
)
def test_heads_stand_side_by_side_and_nothing_else_changes(
    kernel: ModuleType,
    shares: int,
    share_heads: int,
    block_size: int,
    head_bytes: int,
    first_layer: int,
    pages: list[int],
):
    heads, rows = shares * share_heads, 2 * block_size
    view = (NUM_BLOCKS, heads, block_size, 2 * head_bytes)
    layers = [torch.randint(-128, 128, view, dtype=torch.int8) for _ in range(LAYERS)]
    num_layers = LAYERS - first_layer
    pieces = torch.randint(
        -128, 128, (num_layers, shares, len(pages), rows, share_heads, head_bytes), dtype=torch.int8
    )
    expected = [layer.clone().view(NUM_BLOCKS, rows, heads, head_bytes) for layer in layers]
    for layer in range(num_layers):
        for n, page in enumerate(pages):
            for head in range(heads):
                share, of_share = divmod(head, share_heads)
                expected[first_layer + layer][page, :, head] = pieces[layer, share, n, :, of_share]

    staged = pieces.view(num_layers, shares, len(pages), -1)
    one_launch = kernel.OneLaunch(layers)
    one_launch.place(staged, first_layer, one_launch.target(np.array(pages), shares))

    for layer, after in zip(layers, expected, strict=True):
        assert torch.equal(layer.view(after.shape), after)


def test_programs_take_several_tiles_where_there_are_more_tiles(
    kernel: ModuleType, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(kernel, "_MOST_PROGRAMS", 3)
    layers = [torch.zeros(5, 4, 2, 2 * 16, dtype=torch.int8) for _ in range(3)]
    pieces = torch.randint(-128, 128, (3, 2, 5, 4, 2 * 16), dtype=torch.int8)
    one_launch = kernel.OneLaunch(layers)
    one_launch.place(pieces.view(3, 2, 5, -1), 0, one_launch.target(np.arange(5), 2))
    for layer, of_layer in zip(layers, pieces, strict=True):
        assert torch.equal(layer.view(5, 4, 2, 2 * 16), of_layer.permute(1, 2, 0, 3))


def test_layers_that_begin_anywhere_are_refused(kernel: ModuleType):
    memory = torch.zeros(2 * 64 + 8, dtype=torch.int8)
    layers = [memory[:64].view(1, 2, 1, 32), memory[72:136].view(1, 2, 1, 32)]
    with pytest.raises(ValueError, match=r"multiples of 16 bytes; got .*; set regroup to 'staged'"):
        kernel.OneLaunch(layers)
