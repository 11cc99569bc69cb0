# SPDX-License-Identifier: Apache-2.0
"""LoRA: what the adapters of a batch add to the results of its layers, in torch.

Up to S adapters are loaded, each in a slot; every token has the slot of its adapter, or -1. A layer's two
matrices lie one behind the other for all slots. So one product with all first matrices, of which each token
keeps the rows of its slot, and one with all second matrices do for any mixture of adapters, and nothing is
gathered per token or waited for. vLLM asks the platform for this class, instead of its Triton kernels; its
own torch version gives tokens without an adapter what the last slot holds.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from vllm.lora.punica_wrapper.punica_base import PunicaWrapperBase

from vllm_ascend.errors import ConfigError

if TYPE_CHECKING:
    from vllm.lora.layers import LoRAMapping


class NPUPunicaWrapper(PunicaWrapperBase):
    """The batch's slots, and the products, which are added to `y` in place.

    T tokens, S slots, rank R; stacked weights are [S, 1, rows, columns].
    """

    def update_metadata(
        self,
        mapping: LoRAMapping,
        lora_index_to_id: list[int | None],
        max_loras: int,
        vocab_size: int,
        **kwargs: Any,
    ) -> None:
        """Take over which token has which adapter; `mapping` has 0 for those without."""
        self._update_base_metadata(mapping, lora_index_to_id, max_loras, vocab_size)
        self.no_lora = not any(mapping.index_mapping)

    def add_shrink(
        self,
        y: tuple[torch.Tensor, ...] | torch.Tensor,
        x: torch.Tensor,
        lora_a_stacked: tuple[torch.Tensor, ...],
        scale: float,
        **kwargs: Any,
    ) -> None:
        """y[i] += scale * x @ A_i: x is [T, inputs], y[i] [T, R], A_i stacked [S, 1, R, inputs]."""
        x = x.view(-1, x.shape[-1])
        for result, weights in zip(y, lora_a_stacked, strict=True):
            result.view(-1, result.shape[-1]).add_(
                _shrunk(x, weights, self.token_lora_indices).to(result.dtype), alpha=scale
            )

    def add_expand(
        self,
        y: torch.Tensor,
        x: tuple[torch.Tensor, ...] | torch.Tensor,
        lora_b_stacked: tuple[torch.Tensor, ...],
        output_slices: tuple[int, ...],
        offset_start: int = 0,
        add_inputs: bool = True,
        **kwargs: Any,
    ) -> None:
        """y[:, slice i] += x[i] @ B_i: x[i] is [T, R], B_i stacked [S, 1, size of slice i, R]."""
        assert add_inputs
        y = y.view(-1, y.shape[-1])
        start = offset_start
        for rows, weights, size in zip(x, lora_b_stacked, output_slices, strict=True):
            y[:, start : start + size] += _expanded(rows, weights, self.token_lora_indices).to(y.dtype)
            start += size

    def add_lora_embedding(
        self,
        y: torch.Tensor,
        x: torch.Tensor,
        lora_b_stacked: torch.Tensor,
        add_inputs: bool = True,
        **kwargs: Any,
    ) -> None:
        """y += x @ B: x, [T, R], are the rows that tokens have in A."""
        self.add_expand(y, (x,), (lora_b_stacked,), (y.shape[-1],), add_inputs=add_inputs)

    def add_lora_linear(
        self,
        y: torch.Tensor,
        x: torch.Tensor,
        lora_a_stacked: tuple[torch.Tensor, ...],
        lora_b_stacked: tuple[torch.Tensor, ...],
        scale: float,
        output_slices: tuple[int, ...],
        *,
        buffer: tuple[torch.Tensor, ...] | None = None,
        **kwargs: Any,
    ) -> None:
        """y[:, slice i] += scale * x @ A_i @ B_i; between the two in float32, as in vLLM's kernels."""
        if self.no_lora:
            return
        x = x.view(-1, x.shape[-1])
        between = tuple(scale * _shrunk(x, a, self.token_lora_indices).float() for a in lora_a_stacked)
        self.add_expand(y, between, lora_b_stacked, output_slices)

    def add_lora_logits(
        self,
        y: torch.Tensor,
        x: torch.Tensor,
        lora_a_stacked: torch.Tensor,
        lora_b_stacked: torch.Tensor,
        scale: float,
        *,
        buffer: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> None:
        """y += scale * x @ A @ B, for the rows that are sampled from.

        Raises ConfigError where rows of a prompt come to adapters of this layer: vLLM does not say whose.
        """
        x, slots = x.view(-1, x.shape[-1]), self.sampler_indices
        if len(x) != len(slots):
            if lora_b_stacked.any():
                raise ConfigError(
                    "prompt_logprobs were asked while an adapter of the output layer is loaded, which is "
                    "not there yet on NPUs; leave them out, or the adapter"
                )
            return
        between = scale * _shrunk(x, lora_a_stacked, slots).float()
        y.view(-1, y.shape[-1]).add_(_expanded(between, lora_b_stacked, slots).to(y.dtype))

    def apply_lora_full_linear(
        self,
        y: torch.Tensor,
        x: torch.Tensor,
        weight_stacked: torch.Tensor,
        bias_stacked: torch.Tensor,
        module_enabled: torch.Tensor,
    ) -> None:
        raise ConfigError(
            "an adapter brings whole linear layers (modules_to_save), which is not there yet on NPUs; "
            "merge them into the model"
        )


def _shrunk(x: torch.Tensor, weights: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
    """[T, inputs] by [S, 1, R, inputs] of each token's slot: [T, R]; zeros without one."""
    weights = weights[:, 0]
    of_all = (x @ weights.flatten(0, 1).T).view(len(x), *weights.shape[:2])
    kept: torch.Tensor = (of_all * _is_of(slots, weights)).sum(1)
    return kept


def _expanded(x: torch.Tensor, weights: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
    """[T, R] by [S, 1, outputs, R] of each token's slot: [T, outputs]; zeros without one."""
    weights = weights[:, 0].to(x.dtype)
    in_place = (x[:, None, :] * _is_of(slots, weights)).flatten(1)
    return in_place @ weights.transpose(1, 2).flatten(0, 1)


def _is_of(slots: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """bool [T, S, 1]"""
    return (slots[:, None] == torch.arange(len(weights), device=slots.device))[..., None]
