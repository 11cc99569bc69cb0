# SPDX-License-Identifier: Apache-2.0
"""NPUModelRunner: vLLM's model runner on an NPU. Only what differs is here: the streams it asks for."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from vllm.config import VllmConfig
from vllm.v1.worker.gpu_model_runner import GPUModelRunner

from vllm_ascend.compat import cuda_streams_are_npu_streams

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import GrammarOutput
    from vllm.v1.outputs import AsyncModelRunnerOutput, ModelRunnerOutput


class NPUModelRunner(GPUModelRunner):
    """Prepares a batch, runs the model on it, samples."""

    def __init__(self, vllm_config: VllmConfig, device: torch.device) -> None:
        with cuda_streams_are_npu_streams():
            super().__init__(vllm_config, device)

    def sample_tokens(  # type: ignore[override]  # vLLM's is typed by its decorator
        self, grammar_output: GrammarOutput | None
    ) -> ModelRunnerOutput | AsyncModelRunnerOutput:
        with cuda_streams_are_npu_streams():
            return super().sample_tokens(grammar_output)  # type: ignore
