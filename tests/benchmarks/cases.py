# SPDX-License-Identifier: Apache-2.0
"""What the two regroup benchmarks measure: a rank's request whose pieces come from several sources."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

TOKENS, HEADS, HEAD_SIZE = 2048, 8, 128
ITEM_BYTES = 2
"""Of an element in bfloat16."""


@dataclass(frozen=True)
class Case:
    """`TOKENS` tokens of a cache of `num_layers` layers, from `shares` sources."""

    num_layers: int
    block_size: int
    shares: int

    @property
    def name(self) -> str:
        return f"{self.num_layers} layers, blocks of {self.block_size}, {self.shares} shares"

    @property
    def num_pages(self) -> int:
        return TOKENS // self.block_size

    @property
    def page_bytes(self) -> int:
        """K and V of a block, all heads."""
        return 2 * self.block_size * HEADS * HEAD_SIZE * ITEM_BYTES

    @property
    def staged_shape(self) -> tuple[int, int, int, int]:
        """Of the pieces in staging memory, in bytes: [layer, share, page, piece]."""
        return self.num_layers, self.shares, self.num_pages, self.page_bytes // self.shares


def cases(layers: Sequence[int]) -> Iterator[Case]:
    """Every size of block and number of sources, for each number of layers."""
    for num_layers, block_size, shares in itertools.product(layers, (16, 128), (2, 4, 8)):
        yield Case(num_layers, block_size, shares)
