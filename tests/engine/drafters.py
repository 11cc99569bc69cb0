# SPDX-License-Identifier: Apache-2.0
"""Checkpoints for speculative decoding: models, and drafters that guess some of their tokens and miss others.

A drafter that is always wrong, or always right, would not show what happens between. So each is made from the
model it drafts for: a copy with noise, a head that sees the last token only, a copy of the last layer.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from engine.families import FAMILIES
from safetensors.torch import load_file, save_file

NOISE = 0.02
"""Standard deviation of what is added to a copy's weights, in units of their own."""
QUIET = 0.1
"""Factor on what the layers of a model add, for a head to guess its tokens by the last one alone."""


def save_noisy_copy(model: Path, folder: Path) -> None:
    """The model with slightly other weights."""
    draw = torch.Generator().manual_seed(1)
    tensors = load_file(model / "model.safetensors")
    noisy = {
        name: tensor + NOISE * tensor.std() * torch.randn(tensor.shape, generator=draw)
        for name, tensor in tensors.items()
    }
    _save(folder, _config(model), noisy)


def save_quiet_copy(model: Path, folder: Path) -> None:
    """The model with layers that add little, so that most of a next token follows from the last."""
    tensors = load_file(model / "model.safetensors")
    for name, tensor in tensors.items():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            tensors[name] = tensor * QUIET
    _save(folder, _config(model), tensors)


def save_eagle_head(model: Path, folder: Path) -> None:
    """One layer of the model over the embedding of the last token, in vLLM's format for EAGLE."""
    config = _config(model)
    size = config["hidden_size"]
    draw = torch.Generator().manual_seed(2)
    layer = {
        name.removeprefix("model."): tensor
        for name, tensor in load_file(model / "model.safetensors").items()
        if name.startswith("model.layers.0.") and "input_layernorm" not in name
    }
    # The halves of its input: the embedding, and the hidden state before it, of which a little.
    hidden = 0.02 * torch.randn(size, size, generator=draw)
    head = layer | {"fc.weight": torch.cat((torch.eye(size), hidden), dim=1)}
    changes = {"architectures": ["LlamaForCausalLM"], "num_hidden_layers": 1}
    _save(folder, config | changes, head)


def save_with_next_token_layer(folder: Path) -> None:
    """DeepSeek-V3's architecture with a layer that predicts the token after the next (MTP)."""
    FAMILIES["DeepseekV3ForCausalLM"].tiny.save(folder)
    config = _config(folder)
    layers, size = config["num_hidden_layers"], config["hidden_size"]
    tensors = load_file(folder / "model.safetensors")
    last, added = f"model.layers.{layers - 1}.", f"model.layers.{layers}."
    for name in [name for name in tensors if name.startswith(last)]:
        tensors[added + name.removeprefix(last)] = tensors[name].clone()
    tensors |= {
        f"{added}embed_tokens.weight": tensors["model.embed_tokens.weight"].clone(),
        f"{added}shared_head.head.weight": tensors["lm_head.weight"].clone(),
        f"{added}shared_head.norm.weight": tensors["model.norm.weight"].clone(),
        f"{added}enorm.weight": torch.ones(size),
        f"{added}hnorm.weight": torch.ones(size),
        f"{added}eh_proj.weight": torch.cat((torch.eye(size), torch.eye(size)), dim=1),
    }
    _save(folder, config | {"num_nextn_predict_layers": 1}, tensors)


def _config(folder: Path) -> dict[str, object]:
    config: dict[str, object] = json.loads((folder / "config.json").read_text())
    return config


def _save(folder: Path, config: dict[str, object], tensors: dict[str, torch.Tensor]) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file({k: v.contiguous() for k, v in tensors.items()}, folder / "model.safetensors", {"format": "pt"})
