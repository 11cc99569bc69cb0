# SPDX-License-Identifier: Apache-2.0
"""torch.distributed on HCCL between processes gives what gloo gives on the CPU, and ends when a process does.

Starting processes takes longer than all they do, so one set of ranks runs the whole table of hccl_cases.py,
and the tests look at its rows.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch_npu  # noqa: F401  (registers the device)
from device.hccl_cases import CASES
from device.hccl_ranks import STATUS_OF_THE_LOST

SIZES = (2, 4)
ROWS = (*CASES, "destroyed groups leave no descriptor", "destroyed groups leave nothing in /dev/shm")
EMULATED = "ASCEND_EMULATOR_DEVICES" in os.environ


@dataclass(frozen=True)
class Ended:
    """One rank after its end: its exit status, the rows it wrote if it came that far, and its output."""

    status: int
    rows: dict[str, str | None]
    output: str


@pytest.fixture(scope="module", params=SIZES, ids=lambda size: f"{size} ranks")
def compared(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[Ended]:
    return run_ranks("compare", request.param, tmp_path_factory.mktemp("hccl"))


@pytest.mark.parametrize("row", ROWS)
def test_equal_to_gloo(compared: list[Ended], row: str) -> None:
    for rank, ended in enumerate(compared):
        assert ended.status == 0, f"rank {rank} ended with {ended.status}:\n{ended.output}"
        assert ended.rows[row] is None, f"rank {rank}: {ended.rows[row]}"


@pytest.mark.skipif(not EMULATED, reason="a card notices a lost peer after HCCL_EXEC_TIMEOUT, half an hour")
def test_a_lost_peer_is_an_error_for_the_others(tmp_path: Path) -> None:
    *survivors, lost = run_ranks("lose a peer", 3, tmp_path, deadline_s=60)
    assert lost.status == STATUS_OF_THE_LOST
    for ended in survivors:
        assert ended.rows.get("the loss is an error") is None
        assert "rank 2 (process" in ended.output, ended.output
        assert ended.status != 0


def run_ranks(scenario: str, size: int, directory: Path, deadline_s: float = 240) -> list[Ended]:
    if torch.npu.device_count() < size:
        pytest.skip(f"{size} ranks need as many devices, and there are {torch.npu.device_count()}")
    search_path = os.pathsep.join(
        filter(None, [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH")])
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": search_path}
    outputs = [directory / f"{rank}.log" for rank in range(size)]
    processes = []
    try:
        for rank, output in enumerate(outputs):
            command = [
                sys.executable,
                "-m",
                "device.hccl_ranks",
                scenario,
                str(rank),
                str(size),
                str(directory),
            ]
            with output.open("wb") as log:
                processes.append(
                    subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
                )
        statuses = [process.wait(deadline_s) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return list(_read(directory, statuses, outputs))


def _read(directory: Path, statuses: list[int], outputs: list[Path]) -> Iterator[Ended]:
    for rank, (status, output) in enumerate(zip(statuses, outputs, strict=True)):
        rows = directory / f"{rank}.json"
        yield Ended(status, json.loads(rows.read_text()) if rows.exists() else {}, output.read_text())
