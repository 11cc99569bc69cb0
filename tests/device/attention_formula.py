# SPDX-License-Identifier: Apache-2.0
"""Attention as a formula, one head and one sequence at a time, and the paged caches of tests."""

from dataclasses import dataclass

import torch

BLOCK_SIZE = 16


def attend(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    visible: torch.Tensor,
    scale: float,
    sinks: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Of query [S1, N, D], keys [S2, Nkv, D], values [S2, Nkv, Dv] and visible bool [S1, S2].

    Returns out float32 [S1, N, Dv] and lse float32 [S1, N]; 0 and +inf for rows that see nothing.
    `sinks` [N] are extra logits without a value.
    """
    group = query.shape[1] // keys.shape[1]
    outs, sums = [], []
    for head in range(query.shape[1]):
        scores = scale * query[:, head].double() @ keys[:, head // group].double().T
        weights = torch.where(visible, scores.exp(), 0.0)
        total = weights.sum(-1) + (0.0 if sinks is None else sinks[head].double().exp())
        out = torch.where(visible, weights, 0.0) @ values[:, head // group].double()
        outs.append(torch.where(total[:, None] > 0, out / total[:, None], 0.0))
        sums.append(torch.where(total > 0, total.log(), torch.inf))
    return torch.stack(outs, 1).float(), torch.stack(sums, 1).float()


def everything(rows: int, keys: int) -> torch.Tensor:
    return torch.ones(rows, keys, dtype=torch.bool)


def band(rows: int, keys: int, before: int, after: int, shift: int) -> torch.Tensor:
    """Row i sees key j when i + shift - before <= j <= i + shift + after."""
    return torch.tensor(
        [[i + shift - before <= j <= i + shift + after for j in range(keys)] for i in range(rows)],
        dtype=torch.bool,
    ).view(rows, keys)


def causal(rows: int, keys: int) -> torch.Tensor:
    """The last row sees every key, the one before all but the last."""
    return band(rows, keys, before=rows + keys, after=0, shift=keys - rows)


def compressed_mask(dtype: torch.dtype = torch.int8) -> torch.Tensor:
    return torch.triu(torch.ones(2048, 2048), 1).to(dtype).to("npu")


@dataclass(frozen=True)
class Paged:
    """Sequences in a paged cache: `key` and `value` [num_blocks, block_size, heads, size]."""

    key: torch.Tensor
    value: torch.Tensor
    block_table: torch.Tensor


def paged(keys: list[torch.Tensor], values: list[torch.Tensor]) -> Paged:
    """Puts sequences into blocks in falling order. What no sequence owns is NaN, so that reading it shows."""
    columns = max(1, *(-(-len(k) // BLOCK_SIZE) for k in keys))
    num_blocks = len(keys) * columns + 1
    key = torch.full((num_blocks, BLOCK_SIZE, *keys[0].shape[1:]), torch.nan, dtype=keys[0].dtype)
    value = torch.full((num_blocks, BLOCK_SIZE, *values[0].shape[1:]), torch.nan, dtype=values[0].dtype)
    table = torch.arange(num_blocks - 1, 0, -1, dtype=torch.int32).view(len(keys), columns)
    for b, (sequence_keys, sequence_values) in enumerate(zip(keys, values, strict=True)):
        for t in range(len(sequence_keys)):
            block, offset = table[b, t // BLOCK_SIZE], t % BLOCK_SIZE
            key[block, offset], value[block, offset] = sequence_keys[t], sequence_values[t]
    return Paged(key, value, table)
