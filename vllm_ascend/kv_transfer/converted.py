# SPDX-License-Identifier: Apache-2.0
"""Rows of single heads, from staging memory to where they belong: one operator per layer.

What is read, and where its rows go, `convert` has worked out. Head-major, the layers of a block came in one
range and lie between each other; one copy sets them apart, so that each layer's rows are what the operator
takes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

from vllm_ascend.attention.cache_layout import PageLayout
from vllm_ascend.kv_transfer.convert import PagedTokens, Stage
from vllm_ascend.kv_transfer.place import PerHead
from vllm_ascend.kv_transfer.staging import Part, PlacingStream
from vllm_ascend.kv_transfer.transport import Address, Copies
from vllm_ascend.kv_transfer.windows import Window


class Conversion:
    """What puts rows of single heads into layers that are alike, for all requests."""

    def __init__(self, kv_caches: Sequence[torch.Tensor], page: PageLayout) -> None:
        """`kv_caches` are vLLM's views [num_blocks, heads, block_size, content], `page` is their layout."""
        self.placing = PerHead(kv_caches, page)
        self.stream = PlacingStream(kv_caches[0].device)


class Converted:
    """One request's tokens in the layers of one stage: a `staging.Way`."""

    def __init__(self, stage: Stage, tokens: PagedTokens, conversion: Conversion) -> None:
        self._stage = stage
        self._tokens = tokens
        self._placing, self._stream = conversion.placing, conversion.stream
        self._targets: dict[range, torch.Tensor] = {}

    @property
    def prefill_ranks(self) -> set[int]:
        return {piece.prefill_rank for piece in self._stage.pieces}

    def windows(self, part_bytes: int) -> Iterator[Window]:
        return self._stage.windows(len(self._tokens.pages), part_bytes)

    def num_bytes(self, window: Window) -> int:
        return len(window.layers) * len(window.pages) * self._stage.page_bytes

    def copies(self, window: Window, at: Address) -> list[tuple[int, Copies]]:
        return self._stage.copies(window, self._tokens, at)

    def place(self, part: Part, window: Window) -> None:
        layers = self._stage.layers[window.layers.start : window.layers.stop]
        with self._stream.placing(part):
            if window.pages not in self._targets:
                rows = self._stage.targets(self._tokens, window.pages)
                self._targets[window.pages] = self._placing.target(rows)
            self._placing.place(self._by_layer(part, window), layers, self._targets[window.pages])

    def finish(self) -> None:
        self._stream.finish()

    def _by_layer(self, part: Part, window: Window) -> torch.Tensor:
        """What `part` holds as [layer, bytes]: of each layer the pages, one piece after the other."""
        num_layers, num_pages = len(window.layers), len(window.pages)
        staged = part.holds((num_layers, num_pages * self._stage.page_bytes))
        if not self._stage.head_major or num_layers == 1:
            return staged
        by_layer = staged.new_empty(staged.shape)
        for piece, before_bytes in zip(self._stage.pieces, self._stage.bytes_before(), strict=True):
            shape = (num_pages, piece.num_heads, num_layers, piece.remote.page.page_bytes)
            read = part.holds(shape, before_bytes * num_pages * num_layers).permute(2, 0, 1, 3)
            start, num_bytes = before_bytes * num_pages, piece.num_bytes * num_pages
            by_layer[:, start : start + num_bytes].view(read.shape).copy_(read)
        return by_layer
