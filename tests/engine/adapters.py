# SPDX-License-Identifier: Apache-2.0
"""LoRA adapters with random weights, and the models that they make when merged."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

RANK, ALPHA = 4, 8
_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def save_adapter(model: Path, folder: Path, seed: int) -> None:
    """An adapter of all projections of `model`, in PEFT's format."""
    draw = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, weight in _projections(model).items():
        layer = f"base_model.model.{name.removesuffix('.weight')}"
        tensors[f"{layer}.lora_A.weight"] = 0.1 * torch.randn(RANK, weight.shape[1], generator=draw)
        tensors[f"{layer}.lora_B.weight"] = 0.1 * torch.randn(weight.shape[0], RANK, generator=draw)
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "target_modules": _TARGETS, "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(config))


def save_merged(model: Path, adapter: Path, folder: Path) -> None:
    """`model` with the adapter's products added to its weights: W + alpha / rank * B A."""
    added = load_file(adapter / "adapter_model.safetensors")
    tensors = load_file(model / "model.safetensors")
    for name in _projections(model):
        layer = f"base_model.model.{name.removesuffix('.weight')}"
        product = added[f"{layer}.lora_B.weight"] @ added[f"{layer}.lora_A.weight"]
        tensors[name] = tensors[name] + ALPHA / RANK * product
    folder.mkdir()
    shutil.copy(model / "config.json", folder)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def _projections(model: Path) -> dict[str, torch.Tensor]:
    tensors = load_file(model / "model.safetensors")
    return {name: tensor for name, tensor in tensors.items() if name.split(".")[-2] in _TARGETS}
