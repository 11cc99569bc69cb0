# SPDX-License-Identifier: Apache-2.0
"""What adapters add to a layer's results, against a loop over tokens."""

from __future__ import annotations

import pytest
import torch
from vllm.lora.layers import LoRAMapping, LoRAMappingType

from vllm_ascend.errors import ConfigError
from vllm_ascend.ops.lora import NPUPunicaWrapper

INPUTS, RANK, SIZES, SCALE = 8, 3, (6, 4), 0.5
ADAPTERS = [7, None, 5]
"""By slot; the second is empty."""
OF_TOKENS = [5, 5, 0, 7, 5]
"""The adapter of each token, 0 for none."""


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def wrapper(of_tokens: list[int], of_rows: list[int]) -> NPUPunicaWrapper:
    result = NPUPunicaWrapper(16, 16, torch.device("npu"))
    mapping = LoRAMapping(tuple(of_tokens), tuple(of_rows), True, LoRAMappingType.LANGUAGE)
    result.update_metadata(mapping, ADAPTERS, len(ADAPTERS), 100)
    return result


def added(x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, of_rows: list[int]) -> torch.Tensor:
    """x: [rows, inputs]; a: [slots, 1, rank, inputs]; b: [slots, 1, outputs, rank]."""
    result = torch.zeros(len(x), b.shape[2])
    for row, adapter in enumerate(of_rows):
        if adapter:
            slot = ADAPTERS.index(adapter)
            result[row] = SCALE * b[slot, 0] @ (a[slot, 0] @ x[row])
    return result


def test_each_token_gets_its_own_adapter_s_product() -> None:
    x = draw(len(OF_TOKENS), INPUTS)
    first = [draw(len(ADAPTERS), 1, RANK, INPUTS) + i for i in range(2)]
    second = [draw(len(ADAPTERS), 1, size, RANK) for size in SIZES]
    y = draw(len(OF_TOKENS), sum(SIZES))
    result = y.to("npu")
    wrapper(OF_TOKENS, [5, 7]).add_lora_linear(
        result,
        x.to("npu"),
        tuple(a.to("npu") for a in first),
        tuple(b.to("npu") for b in second),
        SCALE,
        SIZES,
    )
    expected = y + torch.cat([added(x, a, b, OF_TOKENS) for a, b in zip(first, second, strict=True)], 1)
    torch.testing.assert_close(result.cpu(), expected, rtol=1e-4, atol=1e-5)


def test_a_batch_without_adapters_is_left_alone() -> None:
    y = torch.ones(2, 4, device="npu")
    weights = torch.ones(3, 1, 4, 4, device="npu")
    wrapper([0, 0], [0]).add_lora_linear(y, y.clone(), (weights,), (weights,), SCALE, (4,))
    assert y.cpu().tolist() == [[1.0] * 4] * 2


def test_rows_that_are_sampled_from_have_the_adapter_of_their_request() -> None:
    of_rows = [5, 0, 7]
    x, a, b = draw(3, INPUTS), draw(3, 1, RANK, INPUTS), draw(3, 1, 10, RANK)
    y = torch.zeros(3, 10, device="npu")
    wrapper(OF_TOKENS, of_rows).add_lora_logits(y, x.to("npu"), a.to("npu"), b.to("npu"), SCALE)
    torch.testing.assert_close(y.cpu(), added(x, a, b, of_rows), rtol=1e-4, atol=1e-5)


def test_rows_of_a_prompt_are_refused_where_the_output_layer_has_adapters() -> None:
    lora = wrapper(OF_TOKENS, [5, 7])
    x, a, b = (draw(*shape).to("npu") for shape in ((4, INPUTS), (3, 1, RANK, INPUTS), (3, 1, 10, RANK)))
    y = torch.zeros(4, 10, device="npu")
    lora.add_lora_logits(y, x, a, torch.zeros_like(b), SCALE)
    assert not y.any()
    with pytest.raises(ConfigError, match="prompt_logprobs were asked while an adapter of the output layer"):
        lora.add_lora_logits(y, x, a, b, SCALE)
