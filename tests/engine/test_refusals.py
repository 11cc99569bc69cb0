# SPDX-License-Identifier: Apache-2.0
"""What a user asks for and this release does not do: each ends before an engine starts, in one sentence."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="module", autouse=True)
def _environment_of_vllm() -> Any:
    """Configuring an engine sets variables for the processes that it starts; they end with this file."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        pytest.param(
            {"compilation_config": {"mode": 3}},
            "compilation_config asks for mode=VLLM_COMPILE, and graphs are not there yet on NPUs; "
            "leave it out or use --enforce-eager",
            id="compilation",
        ),
        pytest.param(
            {"compilation_config": {"cudagraph_mode": "FULL_DECODE_ONLY"}},
            "compilation_config asks for cudagraph_mode=FULL_DECODE_ONLY, and graphs are not there yet",
            id="graphs",
        ),
        pytest.param(
            {
                "tensor_parallel_size": 64,
                "hf_overrides": {"num_attention_heads": 64, "num_key_value_heads": 64, "head_dim": 16},
            },
            "tensor_parallel_size=64 and pipeline_parallel_size=1 need 64 NPUs on this machine, which has",
            id="more ranks than NPUs",
        ),
        pytest.param({"enable_lora": True}, "not there yet on NPUs: lora_config", id="LoRA"),
        pytest.param(
            {"speculative_config": {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 2}},
            "not there yet on NPUs: speculative_config",
            id="speculative decoding",
        ),
        pytest.param(
            {"moe_backend": "triton"},
            "not there yet on NPUs: moe_backend=triton",
            id="another device's experts",
        ),
        pytest.param({"quantization": "fp8"}, "fp8 quantisation was asked", id="quantisation"),
    ],
)
def test_options_are_refused_by_name(
    options: dict[str, Any], sentence: str, checkpoints: dict[str, Path]
) -> None:
    with pytest.raises(ValueError, match="NPU") as refusal:
        configure(checkpoints["llama"], **options)
    assert sentence in str(refusal.value)


def test_what_vllm_refuses_stays_refused_in_its_words(checkpoints: dict[str, Path]) -> None:
    with pytest.raises(ValueError, match=r"heads \(8\) must be divisible by tensor parallel size \(3\)"):
        configure(checkpoints["llama"], tensor_parallel_size=3)


@pytest.mark.parametrize(
    ("name", "value", "sentence"),
    [
        pytest.param(
            "VLLM_ASCEND_TYPO", "1", "VLLM_ASCEND_TYPO is not a variable of vllm-ascend", id="unknown name"
        ),
        pytest.param(
            "VLLM_WORKER_MULTIPROC_METHOD", "fork", "an NPU cannot be used in a forked process", id="fork"
        ),
        pytest.param(
            "VLLM_USE_V2_MODEL_RUNNER", "1", "that runner is not there yet on NPUs", id="second model runner"
        ),
    ],
)
def test_variables_are_refused_by_name(
    name: str, value: str, sentence: str, checkpoints: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=sentence):
        configure(checkpoints["llama"])


def test_layouts_are_refused_by_name(checkpoints: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="kv_cache_layout must be one of token_major, head_major, got 'HND'"):
        configure(checkpoints["llama"], additional_config={"kv_cache_layout": "HND"})
    monkeypatch.setenv("VLLM_KV_CACHE_LAYOUT", "LBHNC")
    with pytest.raises(ValueError, match="BHLNC, and VLLM_KV_CACHE_LAYOUT for LBHNC; unset one"):
        configure(checkpoints["llama"], additional_config={"kv_cache_layout": "head_major"})


def test_engines_are_eager_without_being_asked(checkpoints: dict[str, Path]) -> None:
    config = configure(checkpoints["llama"])
    assert config.model_config.enforce_eager
    assert config.compilation_config.mode.name == config.compilation_config.cudagraph_mode.name == "NONE"


@pytest.mark.parametrize(
    ("features", "reason"),
    [
        pytest.param({"use_mla": True, "use_sparse": True}, "sparse not supported", id="sparse latents"),
        pytest.param(
            {"use_mla": True, "block_size": 256}, "block_size not supported", id="256 latents a block"
        ),
        pytest.param({"use_mla": True, "head_size": 592}, "head_size not supported", id="wide latents"),
        pytest.param({"attn_type": "encoder_only"}, "attention type encoder_only", id="encoder"),
        pytest.param({"kv_cache_dtype": "fp8"}, "kv_cache_dtype not supported", id="FP8 cache"),
        pytest.param({"block_size": 24}, "block_size not supported", id="a block of 24 tokens"),
        pytest.param({"head_size": 40}, "head_size not supported", id="a head of 40 elements"),
    ],
)
def test_attention_is_refused_by_feature(features: dict[str, Any], reason: str) -> None:
    import torch
    from vllm.platforms import current_platform
    from vllm.v1.attention.selector import AttentionSelectorConfig

    plain: dict[str, Any] = {
        "head_size": 64,
        "dtype": torch.bfloat16,
        "kv_cache_dtype": "auto",
        "block_size": 128,
    }
    taken = current_platform.get_attn_backend_cls(None, AttentionSelectorConfig(**plain))
    assert taken == "vllm_ascend.attention.backend.GroupedAttentionBackend"
    latent = AttentionSelectorConfig(**plain | {"use_mla": True, "head_size": 576})
    taken = current_platform.get_attn_backend_cls(None, latent)
    assert taken == "vllm_ascend.attention.backend.LatentAttentionBackend"
    with pytest.raises(ValueError, match=reason):
        current_platform.get_attn_backend_cls(None, AttentionSelectorConfig(**plain | features))


def test_float32_is_refused_by_a_device_that_does_not_take_it(checkpoints: dict[str, Path]) -> None:
    done = subprocess.run(
        [
            *(sys.executable, "-m", "vllm_ascend.emulator", "--devices", "1", sys.executable, "-c"),
            (
                "from vllm.platforms import current_platform as npu; import torch;"
                "npu.check_if_supports_dtype(torch.bfloat16); npu.check_if_supports_dtype(torch.float32)"
            ),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode != 0
    assert "dtype=float32 was asked, which the attention operators of Ascend910B3 do not take" in done.stderr


def configure(model: Path, **options: Any) -> Any:
    """What vLLM does with an engine's options before it starts any process."""
    from vllm.engine.arg_utils import EngineArgs

    return EngineArgs(model=str(model), skip_tokenizer_init=True, **options).create_engine_config()
