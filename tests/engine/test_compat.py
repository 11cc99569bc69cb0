# SPDX-License-Identifier: Apache-2.0
"""Workarounds for vLLM leave torch as they found it."""

import contextlib

import torch

from vllm_ascend.compat import cuda_streams_are_npu_streams

NAMES = ("Stream", "Event", "current_stream", "stream")


def test_cuda_streams_are_npu_streams_inside_and_what_they_were_after() -> None:
    before = [getattr(torch.cuda, name) for name in NAMES]
    with contextlib.suppress(ArithmeticError), cuda_streams_are_npu_streams():
        assert torch.cuda.current_stream().device.type == "npu"
        assert isinstance(torch.cuda.Event(blocking=True), torch.npu.Event)
        raise ArithmeticError
    assert [getattr(torch.cuda, name) for name in NAMES] == before
