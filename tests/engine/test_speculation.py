# SPDX-License-Identifier: Apache-2.0
"""vLLM's sampling and preparation of drafts, on the device, call the kernels that stand in for Triton's."""

from __future__ import annotations

import pytest
import torch
from vllm.v1.sample.logits_processor import LogitsProcessors
from vllm.v1.sample.metadata import SamplingMetadata
from vllm.v1.sample.rejection_sampler import expand_batch_to_tokens, rejection_sample
from vllm.v1.spec_decode.utils import eagle_step_update_slot_mapping_and_metadata

from vllm_ascend.worker import kernels

VOCABULARY = 8


@pytest.fixture(scope="module", autouse=True)
def _as_in_a_worker() -> None:
    kernels.register()


def on_npu(values: list[int] | list[float] | list[list[int]], dtype: torch.dtype) -> torch.Tensor:
    return torch.tensor(values, dtype=dtype, device="npu")


def metadata(temperatures: list[float]) -> SamplingMetadata:
    ones = torch.ones(len(temperatures), device="npu")
    return SamplingMetadata(
        temperature=on_npu(temperatures, torch.float32),
        all_greedy=not any(temperatures),
        all_random=all(temperatures),
        top_p=None,
        top_k=None,
        generators={},
        max_num_logprobs=None,
        no_penalties=True,
        prompt_token_ids=None,
        frequency_penalties=ones,
        presence_penalties=ones,
        repetition_penalties=ones,
        output_token_ids=[],
        allowed_token_ids_mask=None,
        bad_words_token_ids={},
        logitsprocs=LogitsProcessors(),
    )


@pytest.mark.parametrize(
    "temperatures",
    [
        pytest.param([0.0, 0.0, 0.0], id="greedy"),
        pytest.param([1.0, 1.0, 1.0], id="drawn"),
        pytest.param([0.0, 1.0, 0.0], id="both in one batch"),
    ],
)
@pytest.mark.parametrize("with_draft_probs", [False, True])
def test_certain_tokens_are_kept_and_impossible_ones_replaced(
    temperatures: list[float], with_draft_probs: bool
) -> None:
    """The model is certain of 1 2 3 for the first request, 4 5 for the last; the second has no drafts."""
    best, drafts = [1, 2, 3, 4, 5], [1, 7, 3, 4, 5]
    logits = torch.full((5, VOCABULARY), -1e4)
    logits[range(5), best] = 0.0
    draft_probs = torch.nn.functional.one_hot(torch.tensor(drafts), VOCABULARY).float().to("npu")
    tokens = rejection_sample(
        on_npu(drafts, torch.int32),
        [3, 0, 2],
        3,
        on_npu([3, 3, 5], torch.int32),
        draft_probs if with_draft_probs else None,
        logits.to("npu"),
        on_npu([[6], [6], [6]], torch.int64),
        metadata(temperatures),
    )
    assert tokens.cpu().tolist() == [[1, 2, -1, -1], [6, -1, -1, -1], [4, 5, 6, -1]]


def test_temperatures_go_to_all_tokens_of_a_request() -> None:
    temperatures = on_npu([0.0, 0.5, 2.0], torch.float32)
    expanded = expand_batch_to_tokens(temperatures, on_npu([2, 2, 5], torch.int32), 5, 0, 1)
    assert expanded.cpu().tolist() == [1.0, 1.0, 2.0, 2.0, 2.0]


def test_a_drafter_s_next_step() -> None:
    lengths, positions = on_npu([4, 9], torch.int32), on_npu([3, 8], torch.int64)
    slots = on_npu([777, 777, 777], torch.int64)
    table = on_npu([[5, 6, 7], [1, 9, 3]], torch.int32)
    eagle_step_update_slot_mapping_and_metadata(positions, table, lengths, 4, 12, positions, slots, 3)
    assert positions.cpu().tolist() == [4, 9]
    assert lengths.cpu().tolist() == [5, 10]
    assert slots.cpu().tolist() == [24, 13, -1]
