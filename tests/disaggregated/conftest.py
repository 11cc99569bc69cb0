# SPDX-License-Identifier: Apache-2.0
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def log_dir(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    """Where the servers of a module write their logs; each fleet into a folder of its own below it."""
    return tmp_path_factory.mktemp(request.module.__name__.rpartition(".")[2])
