# SPDX-License-Identifier: Apache-2.0
from collections.abc import Iterator
from pathlib import Path

import pytest
from disaggregated.fleet import Fleet
from disaggregated.pair import Pair, running_pair
from servers import running

STARTS_WITHIN_S = 900
"""All servers of a fleet start at once, on however few cores."""


@pytest.fixture(scope="module")
def log_dir(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    """Where the servers of a module write their logs; each fleet into a folder of its own below it."""
    return tmp_path_factory.mktemp(request.module.__name__.rpartition(".")[2])


@pytest.fixture(scope="package")
def fleet(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Iterator[Fleet]:
    """What `on_fleet` asks for. One fleet runs at a time, and once for all modules that ask for it."""
    make = request.param
    folder = tmp_path_factory.mktemp(make.__name__)
    servers = make(folder)
    for server in servers:
        server.ready_timeout_s = STARTS_WITHIN_S
    with running(servers):
        yield Fleet(folder, {server.name: server for server in servers})


@pytest.fixture(scope="package")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    """One pair of engines for every module that asks for it; these are neighbours by name.

    Its ranks have torch_npu's task queues, which take half a core from whatever else runs.
    """
    with running_pair(tmp_path_factory.mktemp("pair")) as pair:
        yield pair
