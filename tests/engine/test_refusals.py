# SPDX-License-Identifier: Apache-2.0
"""What a user asks for and this release does not do: each ends before an engine starts, in one sentence."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from engine.families import FAMILIES
from vllm.config import KVTransferConfig

NGRAM = {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 2}


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
        pytest.param(
            {"speculative_config": NGRAM | {"method": "ngram_gpu"}},
            "not there yet on NPUs: speculative_config with method=ngram_gpu",
            id="a drafter that is compiled",
        ),
        pytest.param(
            {"speculative_config": NGRAM | {"rejection_sample_method": "block"}},
            "not there yet on NPUs: speculative_config with rejection_sample_method=block",
            id="another way to reject drafts",
        ),
        pytest.param(
            {
                "speculative_config": NGRAM,
                "kv_transfer_config": {"kv_connector": "MooncakeConnectorV1", "kv_role": "kv_producer"},
            },
            "speculative_config with method=ngram and kv_transfer_config with kv_role=kv_producer; remove it",
            id="drafts of a prefill engine",
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


def test_a_model_that_pools_transfers_no_kv(checkpoints: dict[str, Path]) -> None:
    transfer = KVTransferConfig(kv_connector="MooncakeConnectorV1", kv_role="kv_producer", kv_port=20001)
    sentence = "embeds or classifies, which ends with prefill; serve it without --kv-transfer-config"
    with pytest.raises(ValueError, match=sentence):
        configure(checkpoints["llama"], runner="pooling", kv_transfer_config=transfer)


def test_what_vllm_refuses_stays_refused_in_its_words(checkpoints: dict[str, Path]) -> None:
    with pytest.raises(ValueError, match=r"heads \(8\) must be divisible by tensor parallel size \(3\)"):
        configure(checkpoints["llama"], tensor_parallel_size=3)


def test_adapters_of_experts_are_refused(tmp_path: Path) -> None:
    FAMILIES["MixtralForCausalLM"].tiny.save(tmp_path)
    with pytest.raises(ValueError, match=r"NPUs: lora_config \(--enable-lora\) with a mixture of experts"):
        configure(tmp_path, enable_lora=True)


def test_sleep_mode_is_refused_by_vllm(checkpoints: dict[str, Path]) -> None:
    with pytest.raises(ValueError, match="Sleep mode is not supported on current platform"):
        configure(checkpoints["llama"], enable_sleep_mode=True)


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
        pytest.param({"attn_type": "encoder"}, "attention type encoder", id="an encoder beside a decoder"),
        pytest.param(
            {"attn_type": "encoder_only", "head_size": 784}, "head_size not supported", id="a wide encoder"
        ),
        pytest.param(
            {"attn_type": "encoder_only", "use_kv_connector": True}, "KV connector", id="KV of an encoder"
        ),
        pytest.param(
            {"attn_type": "encoder_decoder", "use_kv_connector": True},
            "KV connector",
            id="KV that an encoder gave",
        ),
        pytest.param(
            {"use_mm_prefix": True},
            "partial multimodal token full attention",
            id="rows that see all of a picture",
        ),
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
    encoder = AttentionSelectorConfig(**plain | {"attn_type": "encoder_only", "head_size": 24})
    taken = current_platform.get_attn_backend_cls(None, encoder)
    assert taken == "vllm_ascend.attention.backend.BidirectionalAttentionBackend"
    cross = AttentionSelectorConfig(**plain | {"attn_type": "encoder_decoder"})
    taken = current_platform.get_attn_backend_cls(None, cross)
    assert taken == "vllm_ascend.attention.backend.CrossAttentionBackend"
    with pytest.raises(ValueError, match=reason):
        current_platform.get_attn_backend_cls(None, AttentionSelectorConfig(**plain | features))


HYBRID: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "dtype": "bfloat16",
}


@pytest.mark.parametrize(
    ("model", "kinds"),
    [
        pytest.param(
            {
                **HYBRID,
                "architectures": ["GraniteMoeHybridForCausalLM"],
                "model_type": "granitemoehybrid",
                "layer_types": ["mamba", "attention"],
                "mamba_n_heads": 8,
            },
            # transformers names Mamba's layers so, too.
            "has layers with recurrent state (linear_attention of granitemoehybrid)",
            id="Mamba 2 beside attention",
        ),
        pytest.param(
            {
                "architectures": ["Mamba2ForCausalLM"],
                "model_type": "mamba2",
                "dtype": "bfloat16",
                "vocab_size": 128,
                "hidden_size": 64,
                "num_hidden_layers": 2,
                "num_heads": 8,
                "head_dim": 16,
                "state_size": 16,
                "n_groups": 1,
            },
            "Mamba2ForCausalLM has layers with recurrent state (linear_attention of mamba2)",
            id="no attention at all",
        ),
        pytest.param(
            {
                **HYBRID,
                "architectures": ["GraniteMoeHybridForCausalLM"],
                "model_type": "granitemoehybrid",
                "layer_types": ["attention", "attention"],
            },
            None,
            id="could have recurrent state, has attention alone",
        ),
    ],
)
def test_recurrent_state_is_refused_by_the_kind_of_its_layers(
    model: dict[str, Any], kinds: str | None, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(model))
    if kinds is None:
        configure(tmp_path)
        return
    with pytest.raises(ValueError, match="kernels are not there yet on NPUs; use a model") as refusal:
        configure(tmp_path)
    assert kinds in str(refusal.value)


def test_attention_of_towers_is_refused_by_a_name_that_is_not_ours() -> None:
    import torch
    from vllm.platforms import current_platform
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    taken = current_platform.get_vit_attn_backend(64, torch.bfloat16)
    assert current_platform.get_vit_attn_backend(64, torch.bfloat16, taken) == taken
    with pytest.raises(ValueError, match="mm_encoder_attn_backend=FLASH_ATTN does not run on an NPU"):
        current_platform.get_vit_attn_backend(64, torch.bfloat16, AttentionBackendEnum.FLASH_ATTN)


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
