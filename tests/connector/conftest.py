# SPDX-License-Identifier: Apache-2.0
"""What every test of the connector needs: vLLM's plugins loaded, eight devices, vLLM's log."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(scope="session", autouse=True)
def _plugins() -> None:
    """The connector must be known before a configuration names it, as in every process of an engine."""
    from vllm.plugins import load_general_plugins

    load_general_plugins()


@pytest.fixture(scope="session", autouse=True)
def _enough_devices() -> None:
    if torch.npu.device_count() < 8:
        pytest.skip("needs 8 devices: python -m vllm_ascend.emulator --devices 8 pytest tests/connector")


@pytest.fixture
def caplog_vllm(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    """pytest's caplog, also for loggers below vLLM's and ours, which do not propagate to the root."""
    names = ("vllm", "vllm_ascend")
    for name in names:
        logging.getLogger(name).addHandler(caplog.handler)
    yield caplog
    for name in names:
        logging.getLogger(name).removeHandler(caplog.handler)
