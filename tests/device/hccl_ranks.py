# SPDX-License-Identifier: Apache-2.0
"""One of the processes that test_hccl.py starts: `python -m device.hccl_ranks SCENARIO RANK SIZE DIRECTORY`.

It writes what it found as JSON to DIRECTORY/RANK.json: for each row a complaint, or null.
"""

import json
import os
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch_npu  # noqa: F401  (registers the device and the backend)
from device.hccl_cases import CASES, Ranks

Rows = dict[str, str | None]

TIMEOUT = timedelta(seconds=120)
STATUS_OF_THE_LOST = 9


def compare_with_gloo(rank: int, size: int, directory: Path) -> Rows:
    """Every case once on each backend, and what is left after the groups are destroyed."""
    shared_before, descriptors_before = set(os.listdir("/dev/shm")), _shared_descriptors()
    _join(rank, size, directory)
    gloo = dist.new_group(backend="gloo", timeout=TIMEOUT)
    on_npu = _ranks(torch.device("npu", rank), dist.group.WORLD, "hccl")
    on_cpu = _ranks(torch.device("cpu"), gloo, "gloo")
    rows = {name: _difference(case(on_npu), case(on_cpu)) for name, case in CASES.items()}
    dist.destroy_process_group()
    rows["destroyed groups leave no descriptor"] = _unless_equal(_shared_descriptors(), descriptors_before)
    mine = {name for name in set(os.listdir("/dev/shm")) - shared_before if "hccl" in name.lower()}
    rows["destroyed groups leave nothing in /dev/shm"] = _unless_equal(mine, set())
    return rows


def lose_a_peer(rank: int, size: int, directory: Path) -> Rows:
    """The last rank ends without a word and the others go on; torch_npu may end them before they write."""
    _join(rank, size, directory)
    tensor = torch.ones(10, device="npu")
    dist.all_reduce(tensor)
    torch.npu.synchronize()
    if rank == size - 1:
        os._exit(STATUS_OF_THE_LOST)
    try:
        dist.all_reduce(tensor)
        torch.npu.synchronize()
    except RuntimeError:
        return {"the loss is an error": None}
    return {"the loss is an error": f"no error; the result is {tensor.tolist()}"}


def _join(rank: int, size: int, directory: Path) -> None:
    torch.npu.set_device(rank)
    dist.init_process_group(
        "hccl", init_method=f"file://{directory}/store", rank=rank, world_size=size, timeout=TIMEOUT
    )


def _ranks(device: torch.device, world: dist.ProcessGroup, backend: str) -> Ranks:
    size = dist.get_world_size()
    return Ranks(
        device=device,
        world=world,
        low_half=dist.new_group(list(range(max(2, size // 2))), backend=backend, timeout=TIMEOUT),
        even=dist.new_group(list(range(0, size, 2)), backend=backend, timeout=TIMEOUT),
    )


def _difference(found: list[torch.Tensor], expected: list[torch.Tensor]) -> str | None:
    try:
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one.cpu(), other, rtol=0, atol=0, check_dtype=False)
    except AssertionError as error:
        return str(error)
    return None


def _unless_equal(found: object, expected: object) -> str | None:
    return None if found == expected else f"found {found}, expected {expected}"


def _shared_descriptors() -> list[str]:
    """Descriptors of memory that processes share; sockets of torch's own are not meant."""
    targets = []
    for descriptor in Path("/proc/self/fd").iterdir():
        try:
            targets.append(os.readlink(descriptor))
        except FileNotFoundError:  # the descriptor of the listing itself
            continue
    return sorted(target for target in targets if target.startswith(("/memfd:", "/dev/shm/")))


SCENARIOS: dict[str, Callable[[int, int, Path], Rows]] = {
    "compare": compare_with_gloo,
    "lose a peer": lose_a_peer,
}


def main() -> None:
    scenario, rank, size, directory = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4])
    rows = SCENARIOS[scenario](rank, size, directory)
    (directory / f"{rank}.json").write_text(json.dumps(rows))


if __name__ == "__main__":
    main()
