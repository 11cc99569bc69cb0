# SPDX-License-Identifier: Apache-2.0
"""A checkpoint for speculative decoding: a drafter that guesses some of a model's tokens and misses others.

One that is always wrong, or always right, would not show what happens between. So it is the model with noise.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

NOISE = 0.02
"""Standard deviation of what is added to a copy's weights, in units of their own."""


def save_noisy_copy(model: Path, folder: Path) -> None:
    """The model with slightly other weights."""
    draw = torch.Generator().manual_seed(1)
    tensors = load_file(model / "model.safetensors")
    noisy = {
        name: tensor + NOISE * tensor.std() * torch.randn(tensor.shape, generator=draw)
        for name, tensor in tensors.items()
    }
    folder.mkdir(exist_ok=True)
    shutil.copy(model / "config.json", folder)
    save_file(noisy, folder / "model.safetensors", {"format": "pt"})
