# SPDX-License-Identifier: Apache-2.0
"""The table of pairs of engines that `test_transfer.py` carries KV between, each row a kind of its own.

docs/kv_transfer.md shows it; `python tests/connector/topologies.py` brings the page in step.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs" / "kv_transfer.md"
BEGIN, END = "<!-- tests/connector/topologies.py writes from here -->\n", "<!-- to here -->\n"


LAYERS, HEAD_SIZE = 3, 16


@dataclass(frozen=True)
class Model:
    """What the KV cache of a model is like."""

    num_kv_heads: int
    windows: tuple[int | None, ...] = (None,)
    """Of each KV cache group the sliding window in tokens; None: full attention."""
    group_of_layer: tuple[int, ...] = (0,) * LAYERS
    draft_heads: int | None = None
    """KV heads of the one layer of a draft model, behind the model's own layers and in the first group."""
    latent: bool = False
    """A layer keeps one row per token (MLA)."""
    state_groups: tuple[int, ...] = ()
    """KV cache groups whose layers keep recurrent state."""
    state_heads: int = 8
    """Heads of their recurrence."""
    every_rank_has_states: bool = False
    """Tensor parallel does not cut them."""
    read_by_another: tuple[int, ...] = ()
    """Layers whose cache one more layer reads, which has none of its own."""
    dtype: str = "bfloat16"
    head_size: int = HEAD_SIZE

    @property
    def num_layers(self) -> int:
        """Layers without that of a draft model."""
        return len(self.group_of_layer)

    def group_of(self, layer: int) -> int:
        return 0 if layer == self.num_layers else self.group_of_layer[layer]

    def heads_of(self, layer: int) -> int:
        """KV heads of a layer, over all ranks."""
        if layer == self.num_layers:
            assert self.draft_heads is not None
            return self.draft_heads
        return self.num_kv_heads

    def heads_on_a_rank(self, tp_size: int, layer: int = 0) -> int:
        return max(1, self.heads_of(layer) // tp_size)

    def keeps_state(self, layer: int) -> bool:
        return self.group_of(layer) in self.state_groups

    def layers_of(self, group: int, layers: range) -> list[int]:
        """Which of `layers` the group has."""
        return [layer for layer in layers if self.group_of(layer) == group]

    def __str__(self) -> str:
        heads = "latent rows" if self.latent else f"{self.num_kv_heads} heads"
        if len(self.state_groups) == len(self.windows):
            heads = "none"
        kinds = [self._kind(group) for group in range(len(self.windows))]
        groups = f", layers {' and '.join(kinds)}" if any(self.windows) or self.state_groups else ""
        draft = "" if self.draft_heads is None else f", draft layer of {self.draft_heads}"
        return f"{heads}{groups}{draft}"

    def _kind(self, group: int) -> str:
        count, window = self.group_of_layer.count(group), self.windows[group]
        if group in self.state_groups:
            return f"{count} with state{' on every rank' if self.every_rank_has_states else ''}"
        return f"{count} with a window of {window}" if window else "full attention"


@dataclass(frozen=True)
class Side:
    """One engine."""

    tp_size: int
    block_size: int = 16
    pages_per_block: int = 1
    """Into how many blocks of its own attention cuts a block of the scheduler."""
    layers_per_stage: tuple[int, ...] = (LAYERS,)
    """How the model's three layers are split among pipeline stages."""
    dtype: str = "bfloat16"
    """Element type of the cache."""
    regroup: str = "operators"
    """How heads of several sources get side by side."""
    tokens_per_state: int | None = None
    """After how many tokens vLLM keeps recurrent state in another block; None: as many as a block has."""
    head_major: bool = False
    """Pages of one head, among those of the other layers."""

    @property
    def page_size(self) -> int:
        return self.block_size // self.pages_per_block

    def __str__(self) -> str:
        num_stages = len(self.layers_per_stage)
        stages = f" PP {num_stages} {self.layers_per_stage}" if num_stages > 1 else ""
        pages = f" in {self.pages_per_block} pages" if self.pages_per_block > 1 else ""
        dtype = "" if self.dtype == "bfloat16" else f", {self.dtype}"
        regroup = "" if self.regroup == "operators" else f", regroup {self.regroup}"
        state = "" if self.tokens_per_state is None else f", of state {self.tokens_per_state}"
        layout = ", head-major" if self.head_major else ""
        return f"TP {self.tp_size}{stages}, blocks of {self.block_size}{pages}{state}{dtype}{regroup}{layout}"


@dataclass(frozen=True)
class Pair:
    """A prefill engine, a decode engine, and their model; an integer is a plain model's number of heads."""

    prefill: Side
    decode: Side
    of: Model | int

    @property
    def model(self) -> Model:
        return self.of if isinstance(self.of, Model) else Model(self.of)

    def __str__(self) -> str:
        return f"{self.prefill}, to {self.decode}; {self.model}"


LATENT = Model(1, latent=True)
HYBRID = Model(4, windows=(None, 40, 24), group_of_layer=(0, 1, 2))
WINDOWED = Model(4, windows=(24,))
STATEFUL = Model(4, windows=(None, None), group_of_layer=(0, 1, 1), state_groups=(1,))
STATEFUL_WINDOWED = Model(4, windows=(None, 24, None), group_of_layer=(1, 2, 0), state_groups=(2,))
STATE_COPIED = dataclasses.replace(STATEFUL, every_rank_has_states=True)
ALL_STATE = Model(4, group_of_layer=(0, 0, 0), state_groups=(0,))


TABLE = (
    # As many ranks on both sides: pages move whole, from twin to twin.
    Pair(Side(1), Side(1), 4),
    Pair(Side(2), Side(2), 8),
    Pair(Side(8), Side(8), 8),
    # More prefill ranks, down to one: pages move whole and are regrouped.
    Pair(Side(2), Side(1), 4),
    Pair(Side(2), Side(1), 8),
    Pair(Side(4), Side(1), 4),
    Pair(Side(4), Side(2), 8),
    Pair(Side(8), Side(1), 8),
    Pair(Side(8), Side(2), 8),
    Pair(Side(3), Side(1), 6),
    # Fewer prefill ranks: each decode rank reads its rows of a page.
    Pair(Side(1), Side(2), 4),
    Pair(Side(1), Side(8), 8),
    Pair(Side(2), Side(4), 8),
    Pair(Side(1), Side(3), 6),
    # Sizes that do not divide one another.
    Pair(Side(3), Side(2), 6),
    Pair(Side(2), Side(3), 6),
    Pair(Side(6), Side(4), 12),
    Pair(Side(4), Side(6), 12),
    # More ranks than heads: copies, on either side and on both.
    Pair(Side(8), Side(1), 4),
    Pair(Side(8), Side(1), 1),
    Pair(Side(8), Side(4), 2),
    Pair(Side(4), Side(8), 4),
    Pair(Side(2), Side(8), 2),
    Pair(Side(1), Side(8), 1),
    Pair(Side(8), Side(8), 4),
    Pair(Side(6), Side(4), 2),
    Pair(Side(4), Side(6), 2),
    # Multi-head attention: as many KV heads as heads of queries.
    Pair(Side(2), Side(1), 24),
    Pair(Side(1), Side(4), 24),
    # Blocks of different sizes, and blocks that attention cuts into pages.
    Pair(Side(1, 16), Side(1, 32), 4),
    Pair(Side(1, 32), Side(1, 16), 4),
    Pair(Side(2, 16), Side(1, 32), 4),
    Pair(Side(1, 64), Side(2, 16), 4),
    Pair(Side(1, 32), Side(1, 48), 2),
    Pair(Side(2, 32, 2), Side(1, 32, 2), 4),
    Pair(Side(2, 64, 4), Side(1, 32, 2), 4),
    Pair(Side(1, 32, 2), Side(1, 32), 4),
    Pair(Side(3, 32), Side(2, 64, 4), 6),
    # Pipeline stages on either side and on both, in different numbers and uneven.
    Pair(Side(1, layers_per_stage=(2, 1)), Side(1), 4),
    Pair(Side(1), Side(1, layers_per_stage=(1, 2)), 4),
    Pair(Side(2, layers_per_stage=(2, 1)), Side(2, layers_per_stage=(2, 1)), 4),
    Pair(Side(2, layers_per_stage=(2, 1)), Side(1, layers_per_stage=(1, 2)), 4),
    Pair(Side(1, layers_per_stage=(1, 1, 1)), Side(2, layers_per_stage=(1, 2)), 4),
    Pair(Side(4, layers_per_stage=(1, 2)), Side(2, layers_per_stage=(1, 1, 1)), 2),
    Pair(Side(2, 32, layers_per_stage=(2, 1)), Side(3, 16, layers_per_stage=(1, 2)), 6),
    # Latent attention: every rank has the same rows, and one is read.
    Pair(Side(1), Side(1), LATENT),
    Pair(Side(4), Side(1), LATENT),
    Pair(Side(1), Side(4), LATENT),
    Pair(Side(4), Side(2), LATENT),
    Pair(Side(2, 64, 4), Side(3, 32), LATENT),
    Pair(Side(2, layers_per_stage=(2, 1)), Side(1), LATENT),
    # Sliding windows, alone and beside full attention: of a window only what is still seen.
    Pair(Side(2), Side(1), WINDOWED),
    Pair(Side(1), Side(1), HYBRID),
    Pair(Side(2), Side(1), HYBRID),
    Pair(Side(1), Side(2), HYBRID),
    Pair(Side(4), Side(8), HYBRID),
    Pair(Side(2, 32), Side(1, 16), HYBRID),
    Pair(Side(1, 16), Side(2, 64, 4), HYBRID),
    Pair(Side(1, layers_per_stage=(2, 1)), Side(1), HYBRID),
    Pair(Side(2), Side(1, layers_per_stage=(1, 2)), HYBRID),
    # A draft model's layer, of the model's shape and of its own.
    Pair(Side(2), Side(1), Model(4, draft_heads=4)),
    Pair(Side(4), Side(2), Model(8, draft_heads=2)),
    Pair(Side(1), Side(4), Model(4, draft_heads=8)),
    Pair(Side(1, layers_per_stage=(2, 1)), Side(2, layers_per_stage=(1, 2)), Model(4, draft_heads=4)),
    Pair(Side(2), Side(4), Model(1, latent=True, draft_heads=1)),
    # Element types that are converted: with heads regrouped, row by row, between pages of other sizes.
    Pair(Side(1, dtype="float16"), Side(1), 4),
    Pair(Side(2), Side(1, dtype="float16"), 4),
    Pair(Side(2, 32, dtype="float16"), Side(4, 16), HYBRID),
    Pair(Side(1), Side(2, 64, dtype="float16"), LATENT),
    # Recurrent state, alone and beside attention: whole, rank to rank, or from any rank that has all of it.
    Pair(Side(1), Side(1), STATEFUL),
    Pair(Side(2), Side(2), STATEFUL),
    Pair(Side(4), Side(4), STATEFUL),
    Pair(Side(1, 32, 2), Side(1, 16), STATEFUL),
    Pair(Side(2, 16), Side(2, 64, 4), STATEFUL),
    Pair(Side(1, tokens_per_state=256), Side(1), STATEFUL),
    Pair(Side(2), Side(2, 32, tokens_per_state=256), STATEFUL),
    Pair(Side(1, layers_per_stage=(2, 1)), Side(1), STATEFUL),
    Pair(Side(2), Side(2, layers_per_stage=(1, 2)), STATEFUL),
    Pair(Side(2, 32, 2, (2, 1)), Side(2, 32, 2, (1, 1, 1)), STATEFUL_WINDOWED),
    Pair(Side(1, dtype="float16"), Side(1), STATEFUL),
    Pair(Side(4), Side(2), STATE_COPIED),
    Pair(Side(1), Side(2), STATE_COPIED),
    Pair(Side(2), Side(1, regroup="staged"), STATE_COPIED),
    Pair(Side(2), Side(2), ALL_STATE),
    Pair(Side(1, layers_per_stage=(2, 1)), Side(1, layers_per_stage=(1, 2)), ALL_STATE),
    # Regrouped out of staging memory.
    Pair(Side(2), Side(1, regroup="staged"), 4),
    Pair(Side(8), Side(1, regroup="staged"), 8),
    Pair(Side(8), Side(2, regroup="staged"), 8),
    Pair(Side(3), Side(1, regroup="staged"), 6),
    Pair(Side(8), Side(2, regroup="staged"), 4),
    Pair(Side(2, 64, 4), Side(1, 32, 2, regroup="staged"), 4),
    Pair(Side(2, layers_per_stage=(2, 1)), Side(1, layers_per_stage=(1, 2), regroup="staged"), 4),
    Pair(Side(2), Side(1, regroup="staged"), HYBRID),
    Pair(Side(4), Side(2, regroup="staged"), Model(8, draft_heads=4)),
    Pair(Side(2), Side(1, dtype="float16", regroup="staged"), 4),
    Pair(Side(1), Side(2, regroup="staged"), 4),
    Pair(Side(3), Side(2, regroup="staged"), 6),
    Pair(Side(1, 64, 4), Side(4, 48, regroup="staged"), 8),
    Pair(Side(2), Side(1, regroup="staged"), LATENT),
    # Head-major on both sides: as many ranks, more, fewer, sizes that do not divide one another, copies.
    *(
        Pair(Side(prefill, head_major=True), Side(decode, head_major=True), heads)
        for prefill, decode, heads in ((2, 2, 8), (8, 1, 8), (1, 8, 8), (3, 2, 6), (4, 6, 12), (8, 2, 4))
    ),
    # With blocks of other sizes, pipeline stages, groups, another element type, latents.
    Pair(Side(2, 32, head_major=True), Side(1, 48, head_major=True), 4),
    Pair(
        Side(2, layers_per_stage=(2, 1), head_major=True),
        Side(1, layers_per_stage=(1, 2), head_major=True),
        4,
    ),
    Pair(Side(4, head_major=True), Side(2, head_major=True), HYBRID),
    Pair(Side(2, dtype="float16", head_major=True), Side(1, regroup="staged", head_major=True), 4),
    Pair(Side(2, head_major=True), Side(1, 32, head_major=True), LATENT),
    # One side head-major, the other token-major, which is converted: as many ranks, more, fewer, sizes that
    # do not divide one another, copies.
    *(
        Pair(Side(prefill, head_major=there), Side(decode, head_major=not there), heads)
        for prefill, decode, heads in ((2, 2, 8), (4, 1, 8), (1, 4, 8), (3, 2, 6), (8, 2, 4))
        for there in (False, True)
    ),
    # With blocks of other sizes on either side, pipeline stages, groups, another element type.
    *(
        pair
        for there in (False, True)
        for pair in (
            Pair(Side(1, 48, head_major=there), Side(2, 32, head_major=not there), 4),
            Pair(Side(2, 64, 4, head_major=there), Side(1, 128, head_major=not there), 4),
            Pair(
                Side(2, layers_per_stage=(2, 1), head_major=there),
                Side(1, layers_per_stage=(1, 2), head_major=not there),
                4,
            ),
            Pair(Side(4, head_major=there), Side(2, head_major=not there), HYBRID),
            Pair(Side(1, head_major=there), Side(2, 32, dtype="float16", head_major=not there), 4),
            Pair(Side(2, head_major=there), Side(1, head_major=not there), Model(4, draft_heads=2)),
        )
    ),
    # Nothing to convert, since token-major pages have one head or a latent row.
    Pair(Side(4), Side(2, head_major=True), 4),
    Pair(Side(1, head_major=True), Side(2, 32), 2),
    Pair(Side(2), Side(1, 32, head_major=True), LATENT),
    Pair(Side(2, head_major=True, layers_per_stage=(2, 1)), Side(1), LATENT),
)


def as_markdown() -> str:
    """The table as the page shows it."""
    return "".join(f"{line}\n" for line in _lines())


def page_with_table(page: str) -> str:
    """`page` with the table between its marks. Raises ValueError if it has no marks."""
    before, rest = page.split(BEGIN)
    _, after = rest.split(END)
    return f"{before}{BEGIN}{as_markdown()}{END}{after}"


def _lines() -> Iterator[str]:
    yield "| KV heads of a layer | prefill | decode |"
    yield "|---|---|---|"
    for pair in TABLE:
        yield f"| {pair.model} | {pair.prefill} | {pair.decode} |"


if __name__ == "__main__":
    PAGE.write_text(page_with_table(PAGE.read_text()))
