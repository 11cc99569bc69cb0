# SPDX-License-Identifier: Apache-2.0
"""Which experts a token goes to, and with which weights: npu_moe_gating_top_k for all of vLLM's usual rules.

A rule is read from a layer once. Scores are softmax or sigmoid of the router's logits; experts may be chosen
within the best groups of experts only, and with a bias that counts for the choice and not for the weights.
Everything is computed in float32, whatever the model's type, as vLLM's own routers do.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch_npu

from vllm_ascend.errors import ConfigError

if TYPE_CHECKING:
    from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts

_NORM_TYPES = {"softmax": 0, "sigmoid": 1}
_BEST_OF_GROUP, _SUM_OF_BEST_TWO = 0, 1


@dataclass(frozen=True)
class Choice:
    """Each token's experts, best first."""

    weights: torch.Tensor
    """float32 [tokens, choices]"""
    experts: torch.Tensor
    """int32 [tokens, choices], counted over all ranks"""


@dataclass(frozen=True)
class Rule:
    """How a layer chooses. Groups are of equal size, in the order of the experts."""

    num_choices: int
    scoring: str
    renormalize: bool
    """Make each token's weights sum to 1, before they are scaled."""
    num_groups: int = 1
    num_kept_groups: int = 1
    scale: float = 1.0
    bias: torch.Tensor | None = None
    """[experts], any floating-point type"""

    def choose(self, logits: torch.Tensor) -> Choice:
        """logits: the router's output, [tokens, experts], any floating-point type."""
        logits = logits.float()
        weights, experts, _ = torch_npu.npu_moe_gating_top_k(
            logits,
            self.num_choices,
            bias=None if self.bias is None else self.bias.float(),
            k_group=self.num_kept_groups,
            group_count=self.num_groups,
            group_select_mode=_BEST_OF_GROUP if self.bias is None else _SUM_OF_BEST_TWO,
            norm_type=_NORM_TYPES[self.scoring],
        )
        return Choice(self._finish(weights, experts, logits), experts)

    def _finish(self, weights: torch.Tensor, experts: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        # The operator makes the weights sum to 1 after a sigmoid, always, and never after a softmax.
        if self.scoring == "sigmoid" and not self.renormalize:
            weights = logits.gather(1, experts.long()).sigmoid()
        elif self.scoring == "softmax" and self.renormalize:
            weights = weights / weights.sum(-1, keepdim=True)
        return weights if self.scale == 1.0 else weights * self.scale


def rule_of(layer: RoutedExperts) -> Rule:
    """The rule that a model gave its layer. Raises ConfigError for one that the operator does not know."""
    if layer.scoring_func not in _NORM_TYPES:
        raise ConfigError(
            f"{layer.layer_name} scores experts by {layer.scoring_func}, which is not there yet on NPUs; "
            f"models that score by softmax or sigmoid are"
        )
    num_groups, num_kept_groups = 1, 1
    if layer.use_grouped_topk:
        assert layer.num_expert_group is not None
        assert layer.topk_group is not None
        num_groups, num_kept_groups = layer.num_expert_group, layer.topk_group
    bias = layer.e_score_correction_bias
    return Rule(
        num_choices=layer.top_k,
        scoring=layer.scoring_func,
        renormalize=layer.renormalize,
        num_groups=num_groups,
        num_kept_groups=num_kept_groups,
        # As in vLLM's routers, of which the plain one has no factor.
        scale=layer.routed_scaling_factor if layer.use_grouped_topk or bias is not None else 1.0,
        bias=bias,
    )
