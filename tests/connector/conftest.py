# SPDX-License-Identifier: Apache-2.0
"""The connector must be known to vLLM before a configuration names it, as in every process of an engine."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(scope="session", autouse=True)
def plugins() -> None:
    from vllm.plugins import load_general_plugins

    load_general_plugins()


@pytest.fixture(scope="session", autouse=True)
def enough_devices() -> None:
    assert torch.npu.device_count() >= 8, "start with: python -m vllm_ascend.emulator --devices 8 pytest ..."
