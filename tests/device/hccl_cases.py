# SPDX-License-Identifier: Apache-2.0
"""What ranks do together, as functions that run on HCCL with NPU tensors and on gloo with CPU tensors.

A case gets the `Ranks` of one backend and returns tensors; the same case on the other backend must return the
same numbers. Inputs are small whole numbers, so that no order of summation and no rounding shows.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist

Tensors = list[torch.Tensor]

OPS = {
    "sum": dist.ReduceOp.SUM,
    "prod": dist.ReduceOp.PRODUCT,
    "max": dist.ReduceOp.MAX,
    "min": dist.ReduceOp.MIN,
}
REDUCED = (torch.int8, torch.int16, torch.int32, torch.int64, torch.float16, torch.float32, torch.bfloat16)
MOVED = (*REDUCED, torch.uint8, torch.bool, torch.float64)
NOT_ON_A2 = {("prod", torch.int16), ("prod", torch.bfloat16)}
"""CANN's page on HcclAllReduce excludes them."""

LENGTHS = (1, 7, 1000)
LONG = 600_011
"""More elements than any staging buffer holds, whatever their size, and no multiple of anything."""


@dataclass(frozen=True)
class Ranks:
    """One backend's view: where tensors live, the group of all ranks and groups of some."""

    device: torch.device
    world: dist.ProcessGroup
    low_half: dist.ProcessGroup
    even: dist.ProcessGroup

    @property
    def rank(self) -> int:
        return dist.get_rank()

    @property
    def size(self) -> int:
        return dist.get_world_size()

    def numbers(self, length: int, dtype: torch.dtype, of_rank: int | None = None) -> torch.Tensor:
        """[length] of -2 to 2, 0 to 2 where there is no sign; other numbers on every rank."""
        rank = self.rank if of_rank is None else of_rank
        values = (torch.arange(length) * 7 + rank * 3) % 5 - 2
        if dtype in (torch.uint8, torch.bool):
            values = values.abs()
        return values.to(self._known(dtype)).to(self.device)

    def ones(self, length: int, dtype: torch.dtype) -> torch.Tensor:
        """[length] to receive into, or to be left alone."""
        return torch.ones(length, dtype=self._known(dtype), device=self.device)

    def _known(self, dtype: torch.dtype) -> torch.dtype:
        # gloo has no int16; whole numbers this small are the same in int32.
        return torch.int32 if dtype is torch.int16 and self.device.type == "cpu" else dtype


def all_reduce(ranks: Ranks, length: int, dtype: torch.dtype, op: str) -> Tensors:
    tensor = ranks.numbers(length, dtype)
    dist.all_reduce(tensor, OPS[op], group=ranks.world)
    return [tensor]


def all_reduce_strided(ranks: Ranks) -> Tensors:
    """A slice of a matrix is reduced, and its neighbours are left alone."""
    matrix = ranks.numbers(12, torch.float32).view(3, 4)
    dist.all_reduce(matrix[1], group=ranks.world)
    return [matrix]


def reduce(ranks: Ranks, length: int, dtype: torch.dtype, root: int) -> Tensors:
    tensor = ranks.numbers(length, dtype)
    dist.reduce(tensor, root, group=ranks.world)
    return [tensor] if ranks.rank == root else []


def broadcast(ranks: Ranks, length: int, dtype: torch.dtype, root: int) -> Tensors:
    tensor = ranks.numbers(length, dtype)
    dist.broadcast(tensor, root, group=ranks.world)
    return [tensor]


def all_gather(ranks: Ranks, length: int, dtype: torch.dtype) -> Tensors:
    gathered = [ranks.ones(length, dtype) for _ in range(ranks.size)]
    dist.all_gather(gathered, ranks.numbers(length, dtype), group=ranks.world)
    return gathered


def all_gather_uneven(ranks: Ranks, dtype: torch.dtype) -> Tensors:
    gathered = [ranks.ones(3 + 2 * rank, dtype) for rank in range(ranks.size)]
    mine = ranks.numbers(3 + 2 * ranks.rank, dtype)
    if ranks.device.type == "npu":
        dist.all_gather(gathered, mine, group=ranks.world)
        return gathered
    return [
        ranks.numbers(3 + 2 * rank, dtype, of_rank=rank) for rank in range(ranks.size)
    ]  # gloo wants equal sizes


def all_gather_into_tensor(ranks: Ranks, length: int, dtype: torch.dtype) -> Tensors:
    gathered = ranks.ones(ranks.size * length, dtype)
    dist.all_gather_into_tensor(gathered, ranks.numbers(length, dtype), group=ranks.world)
    return [gathered]


def reduce_scatter(ranks: Ranks, length: int, dtype: torch.dtype, op: str) -> Tensors:
    whole = ranks.numbers(ranks.size * length, dtype)
    mine = ranks.ones(length, dtype)
    dist.reduce_scatter_tensor(mine, whole, OPS[op], group=ranks.world)
    return [mine]


def reduce_scatter_list(ranks: Ranks, uneven: bool) -> Tensors:
    parts = [ranks.numbers(8 + 4 * to * uneven, torch.float32) + to for to in range(ranks.size)]
    mine = ranks.ones(parts[ranks.rank].numel(), torch.float32)
    if ranks.device.type == "npu":
        dist.reduce_scatter(mine, parts, group=ranks.world)
        return [mine]
    for part in parts:  # gloo has no list form
        dist.all_reduce(part, group=ranks.world)
    return [parts[ranks.rank]]


def scatter(ranks: Ranks, length: int, dtype: torch.dtype, root: int) -> Tensors:
    parts = None
    if ranks.rank == root:
        parts = [ranks.numbers(length, dtype, of_rank=root + to) for to in range(ranks.size)]
    mine = ranks.ones(length, dtype)
    dist.scatter(mine, parts, root, group=ranks.world)
    return [mine]


def all_to_all_single(ranks: Ranks, length: int, dtype: torch.dtype) -> Tensors:
    received = ranks.ones(ranks.size * length, dtype)
    dist.all_to_all_single(received, ranks.numbers(ranks.size * length, dtype), group=ranks.world)
    return [received]


def all_to_all_with_splits(ranks: Ranks, unit: int) -> Tensors:
    """Rank r sends (r + 2 * to) % 3 units to rank `to`: some pairs exchange nothing."""
    send = [(ranks.rank + 2 * to) % 3 * unit for to in range(ranks.size)]
    receive = [(source + 2 * ranks.rank) % 3 * unit for source in range(ranks.size)]
    received = ranks.ones(sum(receive), torch.float32)
    dist.all_to_all_single(
        received, ranks.numbers(sum(send), torch.float32), receive, send, group=ranks.world
    )
    return [received]


def send_in_a_ring(ranks: Ranks, length: int, dtype: torch.dtype) -> Tensors:
    """Even ranks send first, odd ranks receive first."""
    after, before = (ranks.rank + 1) % ranks.size, (ranks.rank - 1) % ranks.size
    received = ranks.ones(length, dtype)
    steps = [
        partial(dist.send, ranks.numbers(length, dtype), after, group=ranks.world),
        partial(dist.recv, received, before, group=ranks.world),
    ]
    for step in steps if ranks.rank % 2 == 0 else reversed(steps):
        step()
    return [received]


def batch_both_ways(ranks: Ranks, length: int) -> Tensors:
    """Every rank sends to and receives from every other, two messages each way, of different types."""
    others = [rank for rank in range(ranks.size) if rank != ranks.rank]
    received = [ranks.ones(length, dtype) for _ in others for dtype in (torch.float32, torch.int64)]
    operations = []
    for index, other in enumerate(others):
        floats = ranks.numbers(length, torch.float32)
        integers = ranks.numbers(length, torch.int64) + 10
        operations += [
            dist.P2POp(dist.isend, floats, other, group=ranks.world),
            dist.P2POp(dist.isend, integers, other, group=ranks.world),
            dist.P2POp(dist.irecv, received[2 * index], other, group=ranks.world),
            dist.P2POp(dist.irecv, received[2 * index + 1], other, group=ranks.world),
        ]
    for work in dist.batch_isend_irecv(operations):
        work.wait()
    return received


def subgroups(ranks: Ranks) -> Tensors:
    """Two groups that overlap, and the world between them."""
    results = []
    for group in (ranks.low_half, ranks.world, ranks.even):
        tensor = ranks.numbers(100, torch.int64)
        if group is not dist.GroupMember.NON_GROUP_MEMBER:
            dist.all_reduce(tensor, group=group)
        results.append(tensor)
    return results


def overlapping(ranks: Ranks) -> Tensors:
    """Work that was started asynchronously on two communicators and waited for in the opposite order."""
    first = ranks.numbers(LONG, torch.float32)
    second = ranks.numbers(33, torch.int64)
    works = [dist.all_reduce(first, group=ranks.world, async_op=True)]
    if ranks.low_half is not dist.GroupMember.NON_GROUP_MEMBER:
        works.append(dist.all_reduce(second, group=ranks.low_half, async_op=True))
    for work in reversed(works):
        work.wait()
    return [first * 2, second * 2]


def issued_in_different_orders(ranks: Ranks) -> Tensors:
    """Ranks start the same work of two communicators in different orders: each has a stream of its own."""
    first, second = ranks.numbers(1000, torch.float32), ranks.numbers(1000, torch.int64)
    starts = [partial(dist.all_reduce, first, group=ranks.world, async_op=True)]
    if ranks.low_half is not dist.GroupMember.NON_GROUP_MEMBER:
        starts.append(partial(dist.all_reduce, second, group=ranks.low_half, async_op=True))
    if ranks.rank == 0:
        starts.reverse()
    for work in [start() for start in starts]:
        work.wait()
    return [first, second]


def after_unfinished_work(ranks: Ranks) -> Tensors:
    """A collective takes what operators before it compute, and operators after it take its result."""
    tensor = ranks.numbers(1000, torch.float32)
    for _ in range(20):
        tensor = tensor * 2 - 1
        dist.all_reduce(tensor, dist.ReduceOp.MAX, group=ranks.world)
        tensor = tensor.clamp(-8, 8)
    return [tensor]


def coalesced(ranks: Ranks) -> Tensors:
    """Several all-gathers as one group of calls."""
    gathered = [ranks.ones(ranks.size * 4, torch.float32) for _ in range(3)]
    starts = [
        partial(dist.all_gather_into_tensor, one, ranks.numbers(4, torch.float32) + index, group=ranks.world)
        for index, one in enumerate(gathered)
    ]
    if ranks.device.type == "npu":
        with dist._coalescing_manager(ranks.world, ranks.device, async_ops=True) as manager:
            for start in starts:
                start()
        manager.wait()
    else:  # gloo has no groups of calls
        for start in starts:
            start()
    return gathered


def barrier(ranks: Ranks) -> Tensors:
    dist.barrier(group=ranks.world)
    return []


def _table() -> Iterator[tuple[str, Callable[[Ranks], Tensors]]]:
    def name(dtype: torch.dtype) -> str:
        return str(dtype).removeprefix("torch.")

    for dtype in REDUCED:
        for op in OPS:
            if (op, dtype) in NOT_ON_A2:
                continue
            for length in LENGTHS:
                yield (
                    f"all_reduce {op} {name(dtype)} x{length}",
                    partial(all_reduce, length=length, dtype=dtype, op=op),
                )
            yield f"reduce_scatter {op} {name(dtype)}", partial(reduce_scatter, length=9, dtype=dtype, op=op)
        yield f"reduce {name(dtype)} to rank 1", partial(reduce, length=50, dtype=dtype, root=1)
    for dtype in (torch.uint8, torch.bool):
        yield (
            f"all_reduce max {name(dtype)}, which torch_npu casts",
            partial(all_reduce, length=40, dtype=dtype, op="max"),
        )
    for dtype in MOVED:
        yield f"broadcast {name(dtype)}", partial(broadcast, length=11, dtype=dtype, root=1)
        yield f"scatter {name(dtype)}", partial(scatter, length=11, dtype=dtype, root=1)
        yield f"all_gather {name(dtype)} into a list", partial(all_gather, length=5, dtype=dtype)
        yield (
            f"all_gather {name(dtype)} into one tensor",
            partial(all_gather_into_tensor, length=5, dtype=dtype),
        )
        yield f"all_to_all {name(dtype)}", partial(all_to_all_single, length=6, dtype=dtype)
        yield f"send and recv {name(dtype)}", partial(send_in_a_ring, length=13, dtype=dtype)
    for dtype in (torch.float32, torch.bfloat16):
        yield f"all_reduce {name(dtype)}, long", partial(all_reduce, length=LONG, dtype=dtype, op="sum")
    yield "all_reduce of nothing", partial(all_reduce, length=0, dtype=torch.float32, op="sum")
    yield "all_gather of nothing", partial(all_gather_into_tensor, length=0, dtype=torch.float32)
    yield "all_reduce of a slice", all_reduce_strided
    yield "reduce_scatter, long", partial(reduce_scatter, length=LONG, dtype=torch.float32, op="sum")
    yield "reduce_scatter of a list", partial(reduce_scatter_list, uneven=False)
    yield "reduce_scatter of a list of different lengths", partial(reduce_scatter_list, uneven=True)
    yield "broadcast, long", partial(broadcast, length=LONG, dtype=torch.float32, root=0)
    yield "all_gather into a list, long", partial(all_gather, length=LONG, dtype=torch.float32)
    yield "all_gather of different lengths", partial(all_gather_uneven, dtype=torch.float32)
    yield "all_to_all, long", partial(all_to_all_single, length=LONG, dtype=torch.float32)
    yield "all_to_all with splits, some empty", partial(all_to_all_with_splits, unit=4)
    yield "all_to_all with splits, long", partial(all_to_all_with_splits, unit=LONG)
    yield "send and recv, long", partial(send_in_a_ring, length=LONG, dtype=torch.float32)
    yield "batch_isend_irecv both ways", partial(batch_both_ways, length=10)
    yield "batch_isend_irecv both ways, long", partial(batch_both_ways, length=LONG)
    yield "subgroups that overlap", subgroups
    yield "asynchronous, waited for in the opposite order", overlapping
    yield "two communicators in different orders", issued_in_different_orders
    yield "between operators", after_unfinished_work
    yield "several all_gathers as one group", coalesced
    yield "barrier", barrier


CASES: dict[str, Callable[[Ranks], Tensors]] = dict(_table())
