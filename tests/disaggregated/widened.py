# SPDX-License-Identifier: Apache-2.0
"""The recall model with 12 attention heads and 6 KV heads, so that tensor parallel may be 3.

It is the same function. KV heads 0 and 1 are there twice, each copy with one of the two queries that the head
has; a query of zeros in every copy's other place keeps two queries per KV head. So every KV head has work of
its own still: none may be lost, swapped or stale. Vocabulary and MLP are padded to sizes that 2 and 3 divide,
with rows that repeat `<pad>` and never win, and with units that give nothing.
"""

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

HEAD_SIZE = 32
# Per KV head of the new model: the KV head it is, and the queries that it serves (None: zeros). Neighbours
# are unlike each other, and 6 / 3 heads per rank of one side lie across the 6 / 2 of the other.
HEADS: tuple[tuple[int, tuple[int | None, int | None]], ...] = (
    (0, (0, None)),
    (2, (4, 5)),
    (0, (1, None)),
    (1, (2, None)),
    (3, (6, 7)),
    (1, (3, None)),
)
VOCABULARY = 51 * 64
MLP_UNITS = 528


def write_widened(source: Path, folder: Path) -> Path:
    """Write the widened checkpoint of `source` into `folder`, which is created; return it."""
    folder.mkdir()
    for name in ("generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(source / name, folder)
    sizes = {
        "num_attention_heads": 2 * len(HEADS),
        "num_key_value_heads": len(HEADS),
        "intermediate_size": MLP_UNITS,
        "vocab_size": VOCABULARY,
    }
    config = json.loads((source / "config.json").read_text()) | sizes
    (folder / "config.json").write_text(json.dumps(config))
    weights = load_file(source / "model.safetensors")
    widened = {name: _widened(name, weight) for name, weight in weights.items()}
    save_file(widened, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def _widened(name: str, weight: Tensor) -> Tensor:
    match name.removesuffix(".weight").rpartition(".")[2]:
        case "k_proj" | "v_proj":
            return _pick_heads(weight, [kv_head for kv_head, _ in HEADS])
        case "q_proj":
            return _pick_heads(weight, [query for _, queries in HEADS for query in queries])
        case "o_proj":
            queries = [query for _, queries in HEADS for query in queries]
            return _pick_heads(weight.T.contiguous(), queries).T.contiguous()
        case "gate_proj" | "up_proj":
            return _padded(weight, MLP_UNITS)
        case "down_proj":
            return _padded(weight.T.contiguous(), MLP_UNITS).T.contiguous()
        case "embed_tokens":
            return torch.cat([weight, weight[:1].expand(VOCABULARY - len(weight), -1)])
        case _:
            return weight


def _pick_heads(rows: Tensor, heads: list[int | None]) -> Tensor:
    """Rows of `heads`, HEAD_SIZE each, one after another; zeros where a head is None."""
    zeros = torch.zeros_like(rows[:HEAD_SIZE])
    parts = rows.split(HEAD_SIZE)
    return torch.cat([zeros if head is None else parts[head] for head in heads])


def _padded(rows: Tensor, size: int) -> Tensor:
    return torch.cat([rows, rows.new_zeros(size - len(rows), rows.shape[1])])
