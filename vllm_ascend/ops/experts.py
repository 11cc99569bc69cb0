# SPDX-License-Identifier: Apache-2.0
"""A mixture of experts on torch_npu's operators, in the place of vLLM's method for unquantised experts.

A token's way: the router's logits choose its experts (`routing`); rows are copied and sorted by expert; two
grouped matmuls, with the activation between them, take every expert's rows through its weights; each token's
rows are added up by their weights. Under expert parallelism a rank does so for the experts it holds and adds
nothing for the others; vLLM sums over the ranks, as under tensor parallelism.

vLLM's router classes call CUDA kernels and have no hook. Its hook is the "monolithic" method, which is given
the logits and does everything from there.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch_npu
from vllm.model_executor.custom_op import CustomOp
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod

from vllm_ascend.errors import ConfigError
from vllm_ascend.ops.activation import Activation, activation_of
from vllm_ascend.ops.routing import Choice, Rule, rule_of

if TYPE_CHECKING:
    from vllm.model_executor.layers.fused_moe.config import FusedMoEConfig

_ROWS = 0
_COUNTS = 1
_ONE_RESULT = 2
_NOT_QUANTISED = -1


@functools.cache
def register() -> None:
    """Have vLLM build this method for every layer of unquantised experts; once per process."""
    CustomOp.register_oot(NPUFusedMoEMethod, name=UnquantizedFusedMoEMethod.__name__)


class NPUFusedMoEMethod(UnquantizedFusedMoEMethod):
    """One layer's experts: weights as vLLM loads them, computed by torch_npu's operators."""

    def __init__(self, moe: FusedMoEConfig) -> None:
        if moe.has_hash_routing:
            raise ConfigError(
                "this model chooses experts by token id, which is not there yet on NPUs; "
                "models whose router computes scores are"
            )
        super().__init__(moe)
        self._experts: Experts | None = None
        self._rule: Rule | None = None

    @property
    def is_monolithic(self) -> bool:
        return True

    @property
    def supports_eplb(self) -> bool:
        return False

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """Take the loaded weights as they lie; vLLM calls this again when it has replaced them."""
        assert isinstance(layer, RoutedExperts)
        self._rule = None if layer.custom_routing_function else rule_of(layer)
        self._experts = Experts.of_layer(layer)

    def apply_monolithic(
        self,
        layer: RoutedExperts,
        x: torch.Tensor,
        router_logits: torch.Tensor,
        input_ids: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """This rank's part of the sum, like x, [tokens, hidden]; router_logits: [tokens, experts]."""
        assert self._experts is not None
        if router_logits.shape[-1] != layer.global_num_experts:
            raise ConfigError(
                f"the router of {layer.layer_name} has {router_logits.shape[-1]} outputs for "
                f"{layer.global_num_experts} experts; experts that compute nothing are not there yet on NPUs"
            )
        choice = self._choose(layer, x, router_logits)
        if layer.apply_router_weight_on_input:
            assert layer.top_k == 1
            x = x * choice.weights.to(x.dtype)
            choice = Choice(torch.ones_like(choice.weights), choice.experts)
        return self._experts.compute(x, choice)

    def _choose(self, layer: RoutedExperts, x: torch.Tensor, logits: torch.Tensor) -> Choice:
        if self._rule is not None:
            return self._rule.choose(logits)
        assert layer.custom_routing_function is not None
        weights, experts = layer.custom_routing_function(
            hidden_states=x, gating_output=logits, topk=layer.top_k, renormalize=layer.renormalize
        )
        return Choice(weights.float(), experts.int())


@dataclass(frozen=True)
class Experts:
    """The experts that a rank holds of a layer."""

    first: torch.Tensor
    """[experts here, hidden, columns]: the projection before the activation"""
    second: torch.Tensor
    """[experts here, width, hidden]: the projection after it"""
    first_bias: torch.Tensor | None
    second_bias: torch.Tensor | None
    """[experts here, columns or hidden], in the type that npu_grouped_matmul adds"""
    activation: Activation
    slots: torch.Tensor | None
    """int32 [experts of all ranks]: the index of each here, or the number of experts here for one elsewhere;
    None if all are here"""

    @classmethod
    def of_layer(cls, layer: RoutedExperts) -> Experts:
        """Views of the layer's weights, which vLLM keeps as [experts here, outputs, inputs]."""
        expert_map = layer.expert_map
        has_bias = layer.moe_config.has_bias
        return cls(
            first=layer.get_parameter("w13_weight").data.transpose(1, 2),
            second=layer.get_parameter("w2_weight").data.transpose(1, 2),
            first_bias=_bias_to_add(layer.get_parameter("w13_bias").data) if has_bias else None,
            second_bias=_bias_to_add(layer.get_parameter("w2_bias").data) if has_bias else None,
            activation=activation_of(
                layer.activation, layer.swiglu_limit, layer.swiglu_alpha, layer.swiglu_beta
            ),
            slots=None
            if expert_map is None
            else expert_map.where(expert_map >= 0, layer.local_num_experts).int(),
        )

    def compute(self, x: torch.Tensor, choice: Choice) -> torch.Tensor:
        """The weighted sum, for each token of x, of what the experts here make of it; like x."""
        num_here = self.first.shape[0]
        slots = choice.experts if self.slots is None else _look_up(self.slots, choice.experts)
        rows, places, counts, _ = torch_npu.npu_moe_init_routing_v2(
            x,
            slots,
            active_num=slots.numel(),
            expert_num=num_here if self.slots is None else num_here + 1,
            expert_tokens_num_type=_COUNTS,
            expert_tokens_num_flag=True,
            active_expert_range=[0, num_here],
            quant_mode=_NOT_QUANTISED,
        )
        rows = _grouped_matmul(rows, self.first, self.first_bias, counts)
        rows = _grouped_matmul(self.activation(rows), self.second, self.second_bias, counts)
        if self.slots is not None:
            # Choices elsewhere have place -1. They are given the last row, which is one of theirs: rows that
            # no expert here computed come last, and hold anything.
            rows[-1].masked_fill_(counts.sum() < rows.shape[0], 0)
            places = places.remainder(rows.shape[0])
        summed: torch.Tensor = torch_npu.npu_moe_token_unpermute(rows, places, probs=choice.weights)
        return summed


def _look_up(table: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    return table.index_select(0, indices.flatten()).view_as(indices)


def _bias_to_add(bias: torch.Tensor) -> torch.Tensor:
    """The operator adds biases in float32, except for float16."""
    return bias if bias.dtype == torch.float16 else bias.float()


def _grouped_matmul(
    rows: torch.Tensor, weights: torch.Tensor, bias: torch.Tensor | None, counts: torch.Tensor
) -> torch.Tensor:
    """Each group of `counts[i]` rows times weights[i], plus bias[i]; rows beyond the groups hold anything."""
    results: list[torch.Tensor] = torch_npu.npu_grouped_matmul(
        [rows],
        [weights],
        bias=None if bias is None else [bias],
        group_list=counts,
        group_list_type=_COUNTS,
        group_type=_ROWS,
        split_item=_ONE_RESULT,
    )
    return results[0]
