# SPDX-License-Identifier: Apache-2.0
"""NPUWorker: vLLM's worker on an NPU. Only what differs is here: how the device is opened and warmed up."""

from __future__ import annotations

import gc
from contextlib import AbstractContextManager, nullcontext

import torch
from vllm.config import VllmConfig
from vllm.distributed import get_pp_group
from vllm.platforms import current_platform
from vllm.platforms.interface import set_assigned_physical_gpu_ids
from vllm.utils.gc_utils import freeze_gc_heap
from vllm.utils.mem_utils import MemorySnapshot
from vllm.utils.torch_utils import set_random_seed
from vllm.v1.worker.gpu_worker import Worker, init_worker_distributed_environment
from vllm.v1.worker.utils import request_memory
from vllm.v1.worker.worker_base import CompilationTimes

from vllm_ascend.ops import activation, encoders, experts, rotary
from vllm_ascend.worker.model_runner import NPUModelRunner


class NPUWorker(Worker):
    """One process, one NPU, one shard of the model."""

    def __init__(
        self,
        vllm_config: VllmConfig,
        local_rank: int,
        rank: int,
        distributed_init_method: str,
        is_driver_worker: bool = False,
    ) -> None:
        # What was imported stays as long as the process. A start measures memory again and again, each time
        # after a collection of garbage; going through half a million lasting objects took most of its time.
        gc.freeze()
        super().__init__(vllm_config, local_rank, rank, distributed_init_method, is_driver_worker)
        # Before the model is built, which looks the layers up.
        activation.register()
        encoders.register()
        experts.register()
        rotary.register()

    def init_device(self) -> None:
        """Open this rank's NPU, join the process groups, and note how much memory is free.

        Raises ConfigError if the device does not take the model's dtype.
        """
        self._settle_local_rank()
        self.device = torch.device("npu", self.local_rank)
        current_platform.set_device(self.device)
        assert isinstance(self.model_config.dtype, torch.dtype)
        current_platform.check_if_supports_dtype(self.model_config.dtype)
        # Before memory is measured: what HCCL takes is not free for KV.
        init_worker_distributed_environment(
            self.vllm_config,
            self.rank,
            self.distributed_init_method,
            self.local_rank,
            current_platform.dist_backend,
        )
        set_random_seed(self.model_config.seed)
        gc.collect()
        torch.accelerator.empty_cache()
        self.init_snapshot = MemorySnapshot(device=self.device)
        self.requested_memory = request_memory(self.init_snapshot, self.cache_config)
        self._init_workspace_and_model_runner()

    def compile_or_warm_up_model(self) -> CompilationTimes:
        """Run model and sampler once at full batch, so that their memory is taken; nothing is compiled.

        Not vLLM's: that one goes on to warm up other devices' kernels, whose modules need torchvision.
        """
        scheduler = self.scheduler_config
        # Of a pipeline's stages only the last has hidden states to sample from.
        hidden_states, last_hidden_states = self.model_runner._dummy_run(
            num_tokens=min(scheduler.max_num_seqs, scheduler.max_num_batched_tokens), skip_eplb=True
        )
        if self.model_runner.is_pooling_model:
            self.model_runner._dummy_pooler_run(hidden_states)
        elif get_pp_group().is_last_rank:
            self.model_runner._dummy_sampler_run(hidden_states=last_hidden_states)
        # Dummy runs draw random numbers; requests start from the seed.
        set_random_seed(self.model_config.seed, self.parallel_config.data_parallel_index)
        freeze_gc_heap()
        return CompilationTimes(language_model=0.0, encoder=0.0)

    def _settle_local_rank(self) -> None:
        """Make the local rank the index of this NPU: vLLM's process groups take the one for the other.

        They differ where the engine was given some of the machine's NPUs: data parallelism, --device-ids.
        """
        assigned = self.parallel_config.assigned_physical_gpu_ids
        if assigned is not None:
            set_assigned_physical_gpu_ids(assigned)
        self.local_rank = current_platform.logical_device_id_to_visible_device_id(self.local_rank)

    def _make_model_runner(self) -> NPUModelRunner:
        assert self.device is not None
        return NPUModelRunner(self.vllm_config, self.device)

    def _maybe_get_memory_pool_context(self, tag: str) -> AbstractContextManager[None]:
        """No memory pools: they are for sleep mode, which vLLM refuses on this platform."""
        return nullcontext()
