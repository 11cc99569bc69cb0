# SPDX-License-Identifier: Apache-2.0
"""Faults of a KV transfer, as the recall model meets them in training.

A fault strikes some KV heads of some layers over one span of the prompt, often one block. What stands there
instead:

    lost     zeros
    foreign  the same place of another request, as after a late write or a wrong address
    swapped  another head of the same place, as after a wrong regroup
    stale    another place of the same request, as after a wrong block id

Each strikes keys, values or both. Every example of a batch gets a fault of its own; one answer stream is one
kind.

Latent attention caches one row per token for all heads. To this file that is one KV head, whose two parts,
the latent and its rotated part, travel in one piece: a fault strikes both, there is no other head to swap
with, and one layer at least is always whole.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

SPANS = (16, 32, 64, 128, 4096)


def kinds_for(num_kv_heads: int) -> tuple[str, ...]:
    """The kinds of fault that a cache with so many KV heads can have."""
    return ("lost", "foreign", "swapped", "stale") if num_kv_heads > 1 else ("lost", "foreign", "stale")


@dataclass(frozen=True)
class Faults:
    """One fault per kind and example. Use as `tamper` of the model: stream 0 is clean, then one per kind.

    kinds: as in `kinds_for`; place: bool [kind, batch, layer, kv_head, token]; in_keys, in_values: bool
    [kind, batch].
    head_shift, token_shift, batch_shift: where the wrong content comes from, for the whole batch.
    """

    kinds: tuple[str, ...]
    place: Tensor
    in_keys: Tensor
    in_values: Tensor
    head_shift: int
    token_shift: int
    batch_shift: int

    def __call__(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        return self._strike(layer, keys, self.in_keys), self._strike(layer, values, self.in_values)

    def _strike(self, layer: int, clean: Tensor, chosen: Tensor) -> Tensor:
        content = {
            "lost": torch.zeros_like(clean),
            "foreign": clean.roll(self.batch_shift, 0),
            "swapped": clean.roll(self.head_shift, 1),
            "stale": clean.roll(self.token_shift, 2),
        }
        wrong = torch.stack([content[kind] for kind in self.kinds])
        struck = self.place[:, :, layer] & chosen[:, :, None, None]
        found = torch.where(struck[..., None], wrong, clean)
        return torch.cat((clean[None], found))

    def notices(self, prompt: Tensor, pair_positions: Tensor) -> Tensor:
        """Answer steps that cannot be right but by accident: bool [kind, batch, step].

        prompt: ids [batch, token]; pair_positions: [batch, step], of the key that each step looks up.
        A step counts if its pair was struck and the wrong content does not happen to hold the same pair
        once more, which no attention can tell from the right one.
        """
        struck = self.place.any((2, 3))
        hit = _at(struck, pair_positions)
        kind_of = {kind: index for index, kind in enumerate(self.kinds)}
        # The first layer's KV knows nothing of a token's neighbours: another request's is as good where it
        # has the same key in the struck span.
        wanted = prompt.gather(1, pair_positions)
        foreign = prompt.roll(self.batch_shift, 0)
        same_key = (foreign[:, None, :] == wanted[:, :, None]) & struck[kind_of["foreign"], :, None, :]
        deep = self.place[kind_of["foreign"], :, 1:].any((1, 2, 3))
        hit[kind_of["foreign"]] &= ~(same_key.any(-1) & ~deep[:, None])
        # Keys and values moved alike within the struck span are the same set.
        stale = kind_of["stale"]
        both = (self.in_keys & self.in_values)[stale]
        moved = (pair_positions + self.token_shift) % prompt.shape[1]
        hit[stale] &= ~(struck[stale].gather(1, moved) & both[:, None])
        return hit


def draw_faults(prompt: Tensor, pair_positions: Tensor, num_layers: int, num_kv_heads: int) -> Faults:
    """A random fault per kind and example, each in a span that at least one answer step reads."""
    device = prompt.device
    kinds = kinds_for(num_kv_heads)
    batch, length = prompt.shape
    per = (len(kinds), batch)
    span = torch.tensor(SPANS, device=device)[torch.randint(len(SPANS), per, device=device)]
    step = torch.randint(pair_positions.shape[1], per, device=device)
    at = pair_positions.expand(len(kinds), -1, -1).gather(2, step[..., None])[..., 0]
    tokens = torch.arange(length, device=device)
    in_span = tokens // span[..., None] == (at // span)[..., None]
    one_row = num_kv_heads == 1
    layers = _one_or_more(per, num_layers, keep_one_out=one_row, device=device)
    if one_row:
        heads = torch.ones(*per, 1, dtype=torch.bool, device=device)
        which = torch.full(per, 0.5, device=device)
    else:
        heads = _one_or_more(per, num_kv_heads, keep_one_out=True, device=device)
        which = torch.rand(per, device=device)
    return Faults(
        kinds=kinds,
        place=layers[..., None, None] & heads[..., None, :, None] & in_span[:, :, None, None, :],
        in_keys=which < 0.75,
        in_values=which > 0.25,
        head_shift=0 if one_row else _below(num_kv_heads),
        token_shift=_below(length),
        batch_shift=_below(batch),
    )


def _one_or_more(per: tuple[int, int], count: int, *, keep_one_out: bool, device: torch.device) -> Tensor:
    """bool [*per, count]: mostly one, sometimes a random few.

    One stays whole if `keep_one_out`: what is replaced altogether by another request's is consistent.
    """
    order = torch.rand(*per, count, device=device).argsort(-1)
    most = count - 1 if keep_one_out else count
    few = torch.randint(1, most + 1, per, device=device)
    number = torch.where(torch.rand(per, device=device) < 0.75, 1, few)
    return order < number[..., None]


def _below(count: int) -> int:
    return int(torch.randint(1, count, ()))


def _at(struck: Tensor, positions: Tensor) -> Tensor:
    return struck.gather(2, positions.expand(struck.shape[0], -1, -1)).clone()
