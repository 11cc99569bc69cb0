# SPDX-License-Identifier: Apache-2.0
"""Where K and V of a token and head lie in a page, in bytes and elements counted by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from vllm_ascend.attention.cache_layout import (
    HeadMajor,
    PageLayout,
    can_convert,
    can_rearrange,
    head_windows,
    layer_rows,
    operator_block,
    page_layout,
    split_pages,
    state_layout,
)


def test_sizes_of_a_page():
    page = PageLayout(block_size=4, num_heads=2, head_size=8, itemsize_bytes=2)
    assert (page.head_bytes, page.row_bytes, page.plane_bytes, page.page_bytes) == (16, 32, 128, 256)
    assert page.of_size(block_size=2, num_heads=6).page_bytes == 384


def test_offsets_of_tokens_are_those_of_k_then_those_of_v():
    page = PageLayout(block_size=2, num_heads=3, head_size=4, itemsize_bytes=2)
    # A page has 96 bytes: K of two tokens, 24 each, then V. Slot 5 is the second token of page 2.
    assert page.row_offsets(np.array([0, 1, 5])).tolist() == [[0, 24, 216], [48, 72, 264]]


def test_a_page_of_latents_is_one_plane():
    page = PageLayout(block_size=2, num_heads=1, head_size=6, itemsize_bytes=2, planes=1)
    assert (page.row_bytes, page.page_bytes, page.name) == (12, 24, "latent")
    # Slot 5 is the second token of page 2.
    assert page.row_offsets(np.array([0, 1, 5])).tolist() == [[0, 12, 60]]
    assert page_layout(torch.zeros(3, 1, 2, 6, dtype=torch.float16), planes=1) == page


def test_a_page_of_states_is_one_row_and_padding():
    pages = torch.zeros(3, 32, dtype=torch.int8)
    page = state_layout(pages[:, None, None, :20])
    assert (page.row_bytes, page.page_bytes, page.padding_bytes) == (20, 32, 12)
    # A page is a slot.
    assert page.row_offsets(np.array([0, 2])).tolist() == [[0, 64]]
    assert state_layout(pages[:, None, None, :]).padding_bytes == 0
    assert page.padded_to(24).page_bytes == 24
    with pytest.raises(ValueError, match="20 bytes do not fit a page of 16"):
        page.padded_to(16)
    with pytest.raises(ValueError, match="must be a view"):
        state_layout(pages[:, :20].view(3, 1, 4, 5))


def test_rows_of_one_head_are_counted_over_all_memory_from_where_the_layer_begins():
    page = PageLayout(block_size=2, num_heads=3, head_size=4, itemsize_bytes=2)
    # Page 2 has the rows 24 to 29 of K, three of each token, and 30 to 35 of V.
    assert page.head_rows(np.array([0, 5])).tolist() == [
        [[0, 27], [6, 33]],
        [[1, 28], [7, 34]],
        [[2, 29], [8, 35]],
    ]
    # A page of one head has four rows; a head of a block has two of these, its own layer's and another's.
    apart = HeadMajor(head_stride_bytes=64, block_stride_bytes=192)
    page = PageLayout(block_size=2, num_heads=3, head_size=4, itemsize_bytes=2, apart=apart)
    assert page.head_rows(np.array([0, 5])).tolist() == [
        [[0, 49], [2, 51]],
        [[8, 57], [10, 59]],
        [[16, 65], [18, 67]],
    ]


def test_layouts_can_be_rearranged_whose_rows_are_the_same():
    assert can_rearrange("token-major", "token-major")
    assert can_rearrange("token-major", "head-major")
    assert can_rearrange("head-major latent", "latent")
    assert not can_rearrange("latent", "token-major")
    assert not can_rearrange("head-major", "head-major latent")
    assert not can_rearrange("token-major", "something new")


def test_rows_are_counted_over_k_and_v_of_all_pages():
    page = PageLayout(block_size=2, num_heads=3, head_size=4, itemsize_bytes=2)
    # Page 2 has the rows 8 and 9 of K, 10 and 11 of V.
    assert page.rows(np.array([0, 5])).tolist() == [[[0, 9], [2, 11]]]


@pytest.mark.parametrize(
    ("there", "here", "possible"),
    [
        ("bfloat16", "bfloat16", True),
        ("float16", "bfloat16", True),
        ("bfloat16", "float16", True),
        ("float32", "float32", True),
        ("float32", "bfloat16", False),
        ("int8", "float16", False),
    ],
)
def test_only_elements_of_one_size_are_converted(there, here, possible):
    assert can_convert(there, here) == possible


def layer(num_blocks: int = 3, heads: int = 4, block_size: int = 2, head_size: int = 5) -> torch.Tensor:
    """A layer as vLLM shows it, every element its own position in memory."""
    shape = (num_blocks, heads, block_size, 2 * head_size)
    return torch.arange(num_blocks * heads * block_size * 2 * head_size, dtype=torch.int32).view(shape)


def test_the_layout_of_a_layer():
    assert page_layout(layer()) == PageLayout(block_size=2, num_heads=4, head_size=5, itemsize_bytes=4)


def test_one_block_table_entry_finds_k_and_v_of_a_block():
    kv_cache = layer()
    key_cache, value_cache = split_pages(kv_cache)
    assert key_cache.shape == value_cache.shape == (5, 2, 4, 5)
    assert key_cache.is_contiguous()
    assert value_cache.is_contiguous()
    for block in range(3):
        # A page has 80 elements: 40 of K, then 40 of V, each token after token and head after head.
        assert key_cache[operator_block(block)].flatten().tolist() == list(range(80 * block, 80 * block + 40))
        assert value_cache[operator_block(block)].flatten().tolist() == list(
            range(80 * block + 40, 80 * block + 80)
        )


def test_both_caches_share_the_layers_memory():
    kv_cache = layer()
    key_cache, value_cache = split_pages(kv_cache)
    key_cache[operator_block(2), 1, 3, 4] = -1
    value_cache[operator_block(2), 0, 0, 0] = -2
    assert kv_cache.flatten()[160 + 39] == -1
    assert kv_cache.flatten()[160 + 40] == -2


def test_shares_are_smaller_pages_in_the_same_memory():
    key_cache, value_cache = split_pages(layer(), shares=2)
    assert key_cache.shape == value_cache.shape == (11, 2, 2, 5)
    # The second share of block 1: 40 elements from 120 on, 20 of K, then 20 of V.
    assert key_cache[operator_block(3)].flatten().tolist() == list(range(120, 140))
    assert value_cache[operator_block(3)].flatten().tolist() == list(range(140, 160))


@pytest.mark.parametrize(
    ("kv_cache", "message"),
    [
        pytest.param(torch.zeros(3, 4, 2, 5), "2 \\* head_size", id="content that is not K and V"),
        pytest.param(torch.zeros(3, 4, 10), "2 \\* head_size", id="three dimensions"),
        pytest.param(torch.zeros(3, 2, 4, 10).transpose(1, 2), "unset VLLM_KV", id="another layout"),
    ],
)
def test_a_view_that_is_not_a_row_of_pages_is_refused(kv_cache, message):
    with pytest.raises(ValueError, match=message):
        split_pages(kv_cache)


def head_major_cache(
    num_blocks: int = 3, heads: int = 2, layers: int = 3, block_size: int = 2, head_size: int = 5
) -> list[torch.Tensor]:
    """Layers as vLLM shows them in BHLNC, every element its own position in memory."""
    shape = (num_blocks, heads, layers, block_size, 2 * head_size)
    memory = torch.arange(np.prod(shape), dtype=torch.int32).view(shape)
    return list(memory.unbind(2))


def test_the_layout_of_a_head_major_layer():
    # A page has 20 elements of 4 bytes; a head 3 pages, a block 6.
    assert page_layout(head_major_cache()[1], head_major=True) == PageLayout(
        2, 2, 5, 4, apart=HeadMajor(head_stride_bytes=240, block_stride_bytes=480)
    )


def test_sizes_of_a_head_major_block():
    page = PageLayout(4, 3, 8, 2, apart=HeadMajor(head_stride_bytes=256, block_stride_bytes=768))
    assert (page.row_bytes, page.plane_bytes, page.page_bytes, page.num_pages) == (16, 64, 128, 3)
    # From the first page of block 0 to the last one of block 1, the third head's.
    assert page.extent_bytes(2) == 768 + 2 * 256 + 128
    assert page.name == "head-major"


def test_windows_on_head_major_pages_find_k_and_v_of_a_head():
    for number, layer_ in enumerate(head_major_cache()):
        key_cache, value_cache = head_windows(layer_)
        assert key_cache.shape == value_cache.shape
        assert key_cache.shape[1:] == (2, 1, 5)
        assert key_cache.is_contiguous()
        assert value_cache.is_contiguous()
        for block in range(3):
            for head in range(2):
                # Blocks are 6 pages of 2 half-pages apart, heads 3.
                entry = 12 * block + 6 * head
                first = 120 * block + 60 * head + 20 * number
                assert key_cache[entry].flatten().tolist() == list(range(first, first + 10))
                assert value_cache[entry].flatten().tolist() == list(range(first + 10, first + 20))


@pytest.mark.parametrize("head_major", [False, True])
def test_rows_are_where_the_layer_has_them(head_major):
    layer_ = head_major_cache()[1] if head_major else layer(heads=2)
    page = page_layout(layer_, head_major=head_major)
    rows = layer_rows(layer_, page)
    # Slot 5 is the second token of block 2. Its K, then its V, in the order of memory.
    found = rows[torch.from_numpy(page.rows(np.array([5])))]
    if head_major:
        assert found.squeeze(2)[:, :, 0].tolist() == [[265, 275], [325, 335]]
    else:
        assert found.squeeze(2)[:, :, 0].tolist() == [[90, 110]]


@pytest.mark.parametrize(
    "kv_cache",
    [
        pytest.param(layer().transpose(1, 2).contiguous().transpose(1, 2), id="heads inside of tokens"),
        pytest.param(torch.zeros(3, 4, 2, 11)[..., :10], id="gaps between tokens"),
    ],
)
def test_a_view_whose_heads_are_in_pieces_is_not_head_major(kv_cache):
    with pytest.raises(ValueError, match="BHLNC; got strides"):
        page_layout(kv_cache, head_major=True)
