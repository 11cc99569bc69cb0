# SPDX-License-Identifier: Apache-2.0
"""NPUPlatform: what vLLM asks about Ascend NPUs, and the answers.

Everything else is named by string, so that importing this file touches no device: the worker, the
attention backend, the communicator. The file decides three more things. Engines run eagerly, since graphs
are not there yet. Worker processes are spawned, since a forked one cannot use an NPU that its parent has
touched. And an option that this release cannot honour ends the engine by its name before it has started.
"""

from __future__ import annotations

import importlib.util
import os
from typing import TYPE_CHECKING, ClassVar

import torch
from vllm.logger import init_logger
from vllm.platforms.interface import Platform, PlatformEnum
from vllm.utils.import_utils import resolve_obj_by_qualname

from vllm_ascend import envs
from vllm_ascend.errors import ConfigError

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.config.kernel import IrOpPriorityConfig
    from vllm.v1.attention.backends.mla.prefill.base import MLAPrefillBackend
    from vllm.v1.attention.backends.mla.prefill.selector import MLAPrefillSelectorConfig
    from vllm.v1.attention.backends.registry import AttentionBackendEnum
    from vllm.v1.attention.selector import AttentionSelectorConfig

# vLLM shows what comes from loggers under its own name.
logger = init_logger(f"vllm.{__name__}")

_GROUPED_BACKEND = "vllm_ascend.attention.backend.GroupedAttentionBackend"
_CROSS_BACKEND = "vllm_ascend.attention.backend.CrossAttentionBackend"
_LATENT_BACKEND = "vllm_ascend.attention.backend.LatentAttentionBackend"
_BIDIRECTIONAL_BACKEND = "vllm_ascend.attention.backend.BidirectionalAttentionBackend"
_LATENT_PREFILL = "vllm_ascend.attention.latent.LatentPrefill"
_WORKER = "vllm_ascend.worker.worker.NPUWorker"
_COMMUNICATOR = "vllm_ascend.distributed.communicator.NPUCommunicator"

_PUNICA = "vllm_ascend.ops.lora.NPUPunicaWrapper"

DRAFTERS = ("ngram", "draft_model", "eagle", "mtp")
"""Ways of vLLM to draft tokens that were seen to work here, with drafts kept and drafts rejected."""


class NPUPlatform(Platform):
    """Ascend NPUs through torch_npu: device type `npu`, dispatch key PrivateUse1, collectives by HCCL."""

    _enum = PlatformEnum.OOT
    device_name = "npu"
    device_type = "npu"
    dispatch_key = "PrivateUse1"
    ray_device_key = "NPU"
    device_control_env_var = "ASCEND_RT_VISIBLE_DEVICES"
    ray_noset_device_env_vars: ClassVar[list[str]] = [  # type: ignore[misc]  # vLLM omits ClassVar
        "RAY_EXPERIMENTAL_NOSET_ASCEND_RT_VISIBLE_DEVICES"
    ]
    dist_backend = "hccl"
    # torch.compile's inductor has no code generator for the NPU here.
    simple_compile_backend = "eager"

    # The device.

    @classmethod
    def get_device_name(cls, device_id: int = 0) -> str:
        name: str = torch.get_device_module("npu").get_device_name(device_id)
        return name

    @classmethod
    def get_device_total_memory(cls, device_id: int = 0) -> int:
        properties = torch.get_device_module("npu").get_device_properties(device_id)
        return int(properties.total_memory)

    @classmethod
    def get_current_memory_usage(cls, device: torch.types.Device | None = None) -> float:
        torch.accelerator.reset_peak_memory_stats(device)
        return torch.accelerator.max_memory_allocated(device)

    @classmethod
    def set_device(cls, device: torch.device) -> None:
        torch.accelerator.set_device_index(device)

    @classmethod
    def manual_seed_all(cls, seed: int) -> None:
        torch.get_device_module("npu").manual_seed_all(seed)

    @classmethod
    def check_if_supports_dtype(cls, dtype: torch.dtype) -> None:
        """Raise ConfigError unless the current device's attention operators take `dtype`.

        The device is asked, with an operator call of one token: which types it takes is its own matter.
        """
        row = torch.zeros(1, 1, 16, dtype=dtype, device="npu")
        try:
            torch.ops.npu.npu_fused_infer_attention_score(row, row, row, input_layout="BSH", num_heads=1)
        except RuntimeError as error:
            raise ConfigError(
                f"dtype={str(dtype).removeprefix('torch.')} was asked, which the attention operators of "
                f"{cls.get_device_name()} do not take ({str(error).splitlines()[0]}); "
                f"use --dtype bfloat16 or --dtype float16"
            ) from error

    # What implements what.

    @classmethod
    def get_attn_backend_cls(
        cls,
        selected_backend: AttentionBackendEnum | None,
        attn_selector_config: AttentionSelectorConfig,
        num_heads: int | None = None,
    ) -> str:
        """The attention backend, in vLLM's registry under the name CUSTOM.

        Raises ConfigError if another backend was asked for, or if the layer needs what ours does not do.
        """
        from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

        backend = _backend_for(attn_selector_config)
        register_backend(AttentionBackendEnum.CUSTOM, backend)
        if selected_backend not in (None, AttentionBackendEnum.CUSTOM):
            raise ConfigError(
                f"attention backend {selected_backend.name} does not run on an NPU; "
                f"leave --attention-backend unset, or set it to CUSTOM"
            )
        reasons = AttentionBackendEnum.CUSTOM.get_class().validate_configuration(
            device_capability=None,  # type: ignore[arg-type]  # NPUs have none, and our backend does not ask
            **attn_selector_config._asdict(),
        )
        if reasons:
            raise ConfigError(
                f"this model or configuration needs attention that an NPU engine does not do yet: "
                f"{', '.join(reasons)} (asked: {attn_selector_config})"
            )
        return backend

    @classmethod
    def get_mla_prefill_backend_cls(
        cls, mla_selector_config: MLAPrefillSelectorConfig
    ) -> type[MLAPrefillBackend]:
        """There is one; what it does not do, the attention layer refuses."""
        prefill: type[MLAPrefillBackend] = resolve_obj_by_qualname(_LATENT_PREFILL)
        return prefill

    @classmethod
    def get_vit_attn_backend(
        cls, head_size: int, dtype: torch.dtype, backend: AttentionBackendEnum | None = None
    ) -> AttentionBackendEnum:
        """The name that towers of pictures give their attention; what it runs is vllm_ascend/ops/encoders.py.

        Raises ConfigError if another was asked for.
        """
        supported: list[AttentionBackendEnum] = cls.get_supported_vit_attn_backends()
        if backend is not None and backend not in supported:
            raise ConfigError(
                f"mm_encoder_attn_backend={backend.name} does not run on an NPU; leave it unset"
            )
        return supported[0]

    @classmethod
    def get_device_communicator_cls(cls) -> str:
        return _COMMUNICATOR

    @classmethod
    def get_punica_wrapper(cls) -> str:
        return _PUNICA

    @classmethod
    def support_hybrid_kv_cache(cls) -> bool:
        """Layers with and without a sliding window keep as many blocks as each needs, in the same memory."""
        return True

    @classmethod
    def check_runner_kv_caches_multi_layer(cls) -> None:
        """Layers of a model and of its drafter may have the same index: nothing here counts caches by it."""

    @classmethod
    def import_kernels(cls) -> None:
        """Nothing to import: torch_npu's operators come with torch."""

    @classmethod
    def import_ir_kernels(cls) -> None:
        from vllm_ascend.ops import norm

        norm.register()

    @classmethod
    def get_default_ir_op_priority(cls, vllm_config: VllmConfig) -> IrOpPriorityConfig:
        from vllm.config.kernel import IrOpPriorityConfig

        from vllm_ascend.ops.norm import PROVIDER

        norms = [PROVIDER, "native"]
        return IrOpPriorityConfig.with_default(["native"], rms_norm=norms, fused_add_rms_norm=norms)

    @classmethod
    def register_triton_kernel_overrides(cls) -> None:
        from vllm_ascend.worker import kernels

        kernels.register()

    # What the user asked for.

    @classmethod
    def validate_environ(cls, hard_fail: bool) -> None:
        """Check our own variables; let vLLM's rule for unknown VLLM_* names hold for the others."""
        from vllm.envs import environment_variables

        envs.check_all()
        unknown = [
            name
            for name in sorted(os.environ)
            if name.startswith("VLLM_")
            and not name.startswith(envs.PREFIX)
            and name not in environment_variables
        ]
        if unknown and hard_fail:
            raise ConfigError(f"not variables of vLLM: {', '.join(unknown)}. Unset them")
        for name in unknown:
            logger.warning("%s is set, which is not a variable of vLLM", name)

    @classmethod
    def verify_quantization(cls, quant: str) -> None:
        raise ConfigError(
            f"{quant} quantisation was asked, and quantised models are not there yet on NPUs; use a model in "
            f"bfloat16 or float16"
        )

    @classmethod
    def apply_config_platform_defaults(cls, vllm_config: VllmConfig) -> None:
        """Make eager execution the default, before vLLM fills in its own and explicit wishes stay visible."""
        from vllm.config import CompilationMode, CUDAGraphMode
        from vllm.config.vllm import OptimizationLevel

        _refuse_graphs(vllm_config)
        model_config = vllm_config.model_config
        if model_config is not None and not model_config.enforce_eager:
            logger.info("NPU engines run eagerly: graphs and compilation are off")
            model_config.enforce_eager = True
        vllm_config.optimization_level = OptimizationLevel.O0
        vllm_config.compilation_config.mode = CompilationMode.NONE
        vllm_config.compilation_config.cudagraph_mode = CUDAGraphMode.NONE
        # Nothing is compiled just in time, so there is nothing to warm up.
        vllm_config.kernel_config.enable_jit_warmup = False
        _choose_first_model_runner()

    @classmethod
    def check_and_update_config(cls, vllm_config: VllmConfig) -> None:
        """Refuse what this release does not do; name the worker and how its processes start.

        Raises ConfigError that names the option.
        """
        from vllm_ascend.attention.layout_option import choose_layout
        from vllm_ascend.kv_transfer.config import check_start

        _refuse_unsupported(vllm_config)
        _refuse_recurrent_state(vllm_config)
        choose_layout(vllm_config)
        _check_device_count(vllm_config)
        check_start(vllm_config)
        parallel_config = vllm_config.parallel_config
        if parallel_config.worker_cls == "auto":
            parallel_config.worker_cls = _WORKER
        _spawn_workers()


def _backend_for(config: AttentionSelectorConfig) -> str:
    if config.use_mla:
        return _LATENT_BACKEND
    others = {"encoder_only": _BIDIRECTIONAL_BACKEND, "encoder_decoder": _CROSS_BACKEND}
    return others.get(config.attn_type, _GROUPED_BACKEND)


def _refuse_graphs(vllm_config: VllmConfig) -> None:
    from vllm.config import CompilationMode, CUDAGraphMode

    compilation = vllm_config.compilation_config
    asked = []
    if compilation.mode not in (None, CompilationMode.NONE):
        asked.append(f"mode={compilation.mode.name}")
    if compilation.cudagraph_mode not in (None, CUDAGraphMode.NONE):
        asked.append(f"cudagraph_mode={compilation.cudagraph_mode.name}")
    if compilation.cudagraph_capture_sizes:
        asked.append(f"cudagraph_capture_sizes={compilation.cudagraph_capture_sizes}")
    if asked:
        raise ConfigError(
            f"compilation_config asks for {', '.join(asked)}, and graphs are not there yet on NPUs; "
            f"leave it out or use --enforce-eager"
        )


def _refuse_unsupported(vllm_config: VllmConfig) -> None:
    parallel = vllm_config.parallel_config
    wishes = {
        f"decode_context_parallel_size={parallel.decode_context_parallel_size}": (
            parallel.decode_context_parallel_size > 1
        ),
        f"prefill_context_parallel_size={parallel.prefill_context_parallel_size}": (
            parallel.prefill_context_parallel_size > 1
        ),
        f"moe_backend={vllm_config.kernel_config.moe_backend}": (
            vllm_config.kernel_config.moe_backend != "auto"
        ),
        "enable_dbo": parallel.enable_dbo,
        "lora_config (--enable-lora) with a mixture of experts": (
            vllm_config.lora_config is not None and vllm_config.model_config.is_moe
        ),
        **_speculative_wishes(vllm_config),
    }
    asked = [name for name, is_asked in wishes.items() if is_asked]
    if asked:
        raise ConfigError(
            f"not there yet on NPUs: {', '.join(asked)}; remove it from the command or configuration"
        )


def _refuse_recurrent_state(vllm_config: VllmConfig) -> None:
    model = vllm_config.model_config
    if model is None or not (model.is_hybrid or (model.is_attention_free and model.has_inner_state)):
        return
    # Hybrid models list the kinds of their layers under one of two names; others have one kind.
    text = model.hf_text_config
    listed = getattr(text, "layers_block_type", None) or getattr(text, "layer_types", None) or ()
    stateless = {"attention", "full_attention", "sliding_attention", "mlp", "moe"}
    kinds = sorted(set(listed) - stateless) or ["every layer"]
    raise ConfigError(
        f"{model.architecture} has layers with recurrent state ({', '.join(kinds)} of {text.model_type}), "
        f"whose kernels are not there yet on NPUs; use a model that has attention alone"
    )


def _speculative_wishes(vllm_config: VllmConfig) -> dict[str, bool]:
    """What speculative decoding may be asked for beyond the drafters in DRAFTERS, and whether it is."""
    speculative = vllm_config.speculative_config
    if speculative is None:
        return {}
    sampling = speculative.rejection_sample_method
    lacks_numba = speculative.method == "ngram" and importlib.util.find_spec("numba") is None
    return {
        "speculative_config with method=ngram without numba (pip install 'vllm-ascend[ngram]')": lacks_numba,
        f"speculative_config with method={speculative.method}": speculative.method not in DRAFTERS,
        "speculative_config with parallel_drafting": bool(speculative.parallel_drafting),
        f"speculative_config with rejection_sample_method={sampling}": sampling != "standard",
        **_beside_connector(vllm_config, str(speculative.method)),
    }


def _beside_connector(vllm_config: VllmConfig, method: str) -> dict[str, bool]:
    """Drafts beside a KV connector, but for those of a decode engine that come from the prompt alone."""
    transfer = vllm_config.kv_transfer_config
    if transfer is None:
        return {}
    name = f"speculative_config with method={method} and kv_transfer_config with kv_role={transfer.kv_role}"
    return {name: (method, transfer.kv_role) != ("ngram", "kv_consumer")}


def _check_device_count(vllm_config: VllmConfig) -> None:
    parallel = vllm_config.parallel_config
    if parallel.distributed_executor_backend == "ray":
        return  # Ray's workers see other machines than this process does.
    needed = parallel.local_world_size
    present = torch.accelerator.device_count()
    if needed > present:
        variable = NPUPlatform.device_control_env_var
        visible = os.environ.get(variable)
        raise ConfigError(
            f"tensor_parallel_size={parallel.tensor_parallel_size} and "
            f"pipeline_parallel_size={parallel.pipeline_parallel_size} need {needed} NPUs on this "
            f"machine, which has {present}"
            + (f" ({variable}={visible})" if visible else "")
            + "; use smaller sizes or more NPUs"
        )


def _choose_first_model_runner() -> None:
    """Left alone, vLLM would choose its second one wherever Triton works; ours extends the first."""
    from vllm import envs as vllm_envs

    if vllm_envs.VLLM_USE_V2_MODEL_RUNNER:
        raise ConfigError(
            "VLLM_USE_V2_MODEL_RUNNER is set, and that runner is not there yet on NPUs; unset it"
        )
    os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "0"


def _spawn_workers() -> None:
    variable = "VLLM_WORKER_MULTIPROC_METHOD"
    method = os.environ.setdefault(variable, "spawn")
    if method != "spawn":
        raise ConfigError(
            f"{variable}={method} was asked, and an NPU cannot be used in a forked process; unset it"
        )
