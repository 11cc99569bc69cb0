# SPDX-License-Identifier: Apache-2.0
"""Checksums of KV against a plain loop over words, and what they see."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from vllm_ascend.attention.cache_layout import page_layout
from vllm_ascend.kv_transfer.checksum import UNIT_TOKENS, layer_sums

HEADS, PAGE, DIM = 2, 32, 8


def plain_sums(tokens: np.ndarray) -> np.ndarray:
    """[tokens, planes, heads, words of 16 bits] to [heads, units], word by word."""
    num_units = -(-len(tokens) // UNIT_TOKENS)
    sums = np.zeros((tokens.shape[2], num_units), dtype=np.uint64)
    for head in range(tokens.shape[2]):
        for unit in range(num_units):
            words = tokens[unit * UNIT_TOKENS : (unit + 1) * UNIT_TOKENS, :, head].reshape(-1).tolist()
            by_place = sum(place * word for place, word in enumerate(words, start=1))
            sums[head, unit] = (by_place % 2**32) * 2**32 + sum(words) % 2**32
    return sums


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.int8], ids=str)
@pytest.mark.parametrize("planes", [pytest.param(2, id="K and V"), pytest.param(1, id="latent rows")])
@pytest.mark.parametrize("count", [32, 41, 1])
def test_sums_are_those_of_a_plain_loop(dtype, planes, count):
    pages = torch.randint(0, 256, (5, planes, PAGE, HEADS, DIM * dtype.itemsize), dtype=torch.uint8)
    layer = pages.view(dtype).view(5, HEADS, PAGE, planes * DIM).to("npu")
    slots = np.concatenate([np.arange(3 * PAGE, 4 * PAGE), np.arange(PAGE, 2 * PAGE)])[:count]
    tokens = pages.permute(0, 2, 1, 3, 4).reshape(5 * PAGE, planes, HEADS, -1)[slots].contiguous()
    words = tokens.numpy() if dtype.itemsize == 1 else tokens.numpy().view(np.uint16)
    found = layer_sums(layer, page_layout(layer, planes), slots)
    assert np.array_equal(found, plain_sums(words))


def test_every_flipped_bit_of_a_unit_is_seen_and_in_its_head_and_unit_alone():
    layer = torch.randn(2, HEADS, PAGE, 2 * DIM, dtype=torch.bfloat16).to("npu")
    slots = np.arange(2 * PAGE)
    before = layer_sums(layer, page_layout(layer), slots)
    words = layer.view(torch.int16).view(2, 2, PAGE, HEADS, DIM)
    for bit in range(16):
        words[1, bit % 2, 5 + bit, bit % 2, bit % DIM] ^= -(2**15) if bit == 15 else 1 << bit
        changed = layer_sums(layer, page_layout(layer), slots) != before
        unit = (PAGE + 5 + bit) // UNIT_TOKENS
        assert np.argwhere(changed).tolist() == [[bit % 2, unit]]
        words[1, bit % 2, 5 + bit, bit % 2, bit % DIM] ^= -(2**15) if bit == 15 else 1 << bit


def test_tokens_that_changed_places_are_seen():
    layer = torch.randn(1, HEADS, PAGE, 2 * DIM, dtype=torch.bfloat16).to("npu")
    slots = np.arange(PAGE)
    before = layer_sums(layer, page_layout(layer), slots)
    swapped = slots.copy()
    swapped[[3, 4]] = swapped[[4, 3]]
    assert (layer_sums(layer, page_layout(layer), swapped)[:, 0] != before[:, 0]).all()


def test_the_last_unit_takes_no_token_that_is_not_asked_for():
    layer = torch.randn(1, HEADS, PAGE, 2 * DIM, dtype=torch.bfloat16).to("npu")
    before = layer_sums(layer, page_layout(layer), np.arange(20))
    layer.view(1, 2, PAGE, HEADS, DIM)[:, :, 20:] = 0
    assert np.array_equal(layer_sums(layer, page_layout(layer), np.arange(20)), before)


def test_long_prompts_are_summed_in_parts_alike():
    layer = torch.randn(100, 1, PAGE, 2 * DIM, dtype=torch.bfloat16).to("npu")
    whole = layer_sums(layer, page_layout(layer), np.arange(100 * PAGE))
    assert np.array_equal(layer_sums(layer, page_layout(layer), np.arange(2048, 100 * PAGE)), whole[:, 128:])
