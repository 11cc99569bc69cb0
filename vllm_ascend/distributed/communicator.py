# SPDX-License-Identifier: Apache-2.0
"""NPUCommunicator: what differs over HCCL from vLLM's collectives through torch.distributed."""

from __future__ import annotations

import torch
from torch.distributed import ProcessGroup
from vllm.distributed.device_communicators.all2all import AgRsAll2AllManager
from vllm.distributed.device_communicators.base_device_communicator import DeviceCommunicatorBase

from vllm_ascend.errors import ConfigError

_BY_GATHERING = ("naive", "allgather_reducescatter")
"""Names of vLLM for all-gather before the experts and reduce-scatter after them."""


class NPUCommunicator(DeviceCommunicatorBase):
    """Collectives of one group of ranks; all_reduce writes in place, as torch.distributed does."""

    def __init__(
        self,
        cpu_group: ProcessGroup,
        device: torch.device | None = None,
        device_group: ProcessGroup | None = None,
        unique_name: str = "",
        global_ranks: list[int] | None = None,
        global_world_size: int | None = None,
        use_all2all: bool = False,
    ) -> None:
        super().__init__(
            cpu_group, device, device_group, unique_name, global_ranks, global_world_size, use_all2all
        )
        if self.use_all2all:
            if self.all2all_backend not in _BY_GATHERING:
                raise ConfigError(
                    f"--all2all-backend {self.all2all_backend} is for other devices; leave it out on NPUs, "
                    f"where experts spread over data-parallel ranks gather their tokens"
                )
            self.all2all_manager = AgRsAll2AllManager(self.cpu_group)  # type: ignore[no-untyped-call]

    def dispatch_router_logits(
        self,
        hidden_states: torch.Tensor,
        router_logits: torch.Tensor,
        is_sequence_parallel: bool = False,
        extra_tensors: list[torch.Tensor] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor] | tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
        """Tokens [tokens, hidden] and logits [tokens, experts] of all data-parallel ranks, in their order."""
        assert self.all2all_manager is not None
        return self.all2all_manager.dispatch_router_logits(
            hidden_states, router_logits, is_sequence_parallel, extra_tensors
        )

    def combine(self, hidden_states: torch.Tensor, is_sequence_parallel: bool = False) -> torch.Tensor:
        """This rank's tokens, summed over the ranks' experts."""
        assert self.all2all_manager is not None
        combined: torch.Tensor = self.all2all_manager.combine(hidden_states, is_sequence_parallel)
        return combined

    def all_gatherv(
        self,
        input_: torch.Tensor | list[torch.Tensor],
        dim: int = 0,
        sizes: list[int] | None = None,
    ) -> torch.Tensor | list[torch.Tensor]:
        """The ranks' tensors, of `sizes` rows each, joined along dimension 0."""
        assert dim == 0, "ranks may differ in dimension 0 only"
        if not isinstance(input_, torch.Tensor):
            return [self._gather_rows(tensor, sizes) for tensor in input_]
        return self._gather_rows(input_, sizes)

    def reduce_scatterv(
        self, input_: torch.Tensor, dim: int = -1, sizes: list[int] | None = None
    ) -> torch.Tensor:
        """This rank's rows, `sizes` of them for each rank, of the sum over all ranks."""
        assert dim == 0, "ranks may differ in dimension 0 only"
        if sizes is None or len(set(sizes)) == 1:
            return self.reduce_scatter(input_, 0)
        longest = max(sizes)
        padded = torch.cat([_padded(part, longest) for part in torch.split(input_, sizes)])
        return self.reduce_scatter(padded, 0)[: sizes[self.rank_in_group]]

    def _gather_rows(self, rows: torch.Tensor, sizes: list[int] | None) -> torch.Tensor:
        if sizes is None or len(set(sizes)) == 1:
            return self.all_gather(rows, 0)
        longest = max(sizes)
        parts = torch.split(self.all_gather(_padded(rows, longest), 0), longest)
        return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])

    def gather(self, input_: torch.Tensor, dst: int = 0, dim: int = -1) -> torch.Tensor | None:
        """The ranks' tensors, joined along `dim`, on rank `dst` of the group; None elsewhere.

        HCCL has no gather: every rank receives, one keeps.
        """
        gathered = self.all_gather(input_, dim)
        return gathered if self.rank_in_group == dst else None


def _padded(rows: torch.Tensor, length: int) -> torch.Tensor:
    """`rows` with zeros below: HCCL's ranks all give as many."""
    padded = rows.new_zeros(length, *rows.shape[1:])
    padded[: len(rows)] = rows
    return padded
