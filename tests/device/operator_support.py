# SPDX-License-Identifier: Apache-2.0
"""What the tests of torch_npu's operators share: dtypes to run with, how close results must be, values."""

import os

import pytest
import torch
import torch_npu  # noqa: F401  (registers the device)

EMULATED = "ASCEND_EMULATOR_SOC" in os.environ
FLOAT32_ALLOWED = os.environ.get("ASCEND_EMULATOR_ALLOW_FP32") == "1"

emulator_only = pytest.mark.skipif(not EMULATED, reason="a card does not check this: it touches stray memory")

HALVES = [torch.bfloat16, torch.float16]
CACHE_DTYPES = [*HALVES, torch.float32] if FLOAT32_ALLOWED else HALVES
"""What operators on a KV cache take: float32 only on an emulator that was told so."""

_TOLERANCE = {torch.bfloat16: 8e-3, torch.float16: 1e-3, torch.float32: 2e-5}


def assert_near(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """`actual`, on the NPU, agrees with the float32 `expected` up to about one unit in the last place."""
    tolerance = _TOLERANCE[actual.dtype]
    torch.testing.assert_close(actual.cpu().float(), expected, rtol=tolerance, atol=tolerance)


def random(*shape: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """Normally distributed values on the CPU, the same in every run."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def int32(values: list[int] | list[list[int]]) -> torch.Tensor:
    """Lengths, slots or a block table, on the NPU."""
    return torch.tensor(values, dtype=torch.int32, device="npu")
