# SPDX-License-Identifier: Apache-2.0
"""NPUCommunicator: what differs over HCCL from vLLM's collectives through torch.distributed."""

from __future__ import annotations

import torch
from torch.distributed import ProcessGroup
from vllm.distributed.device_communicators.base_device_communicator import DeviceCommunicatorBase

from vllm_ascend.errors import ConfigError


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
            raise ConfigError(
                "experts spread over data-parallel ranks are not there yet on NPUs; set data_parallel_size=1"
            )

    def gather(self, input_: torch.Tensor, dst: int = 0, dim: int = -1) -> torch.Tensor | None:
        """The ranks' tensors, joined along `dim`, on rank `dst` of the group; None elsewhere.

        HCCL has no gather: every rank receives, one keeps.
        """
        gathered = self.all_gather(input_, dim)
        return gathered if self.rank_in_group == dst else None
