# SPDX-License-Identifier: Apache-2.0
"""Whether this rank can read a prefill engine, and how: checked and planned once, when the two meet.

All that decode knows of a peer is what its listener says; nobody configures the other side's sizes. Layers
are paired by name. What does not fit is refused by the name of the field, with both values.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import msgspec

from vllm_ascend.attention.cache_layout import (
    HEAD_MAJOR_OF,
    HeadMajor,
    PageLayout,
    can_convert,
    can_rearrange,
)
from vllm_ascend.errors import TopologyError
from vllm_ascend.kv_transfer.config import Options, Sizes, check_sizes
from vllm_ascend.kv_transfer.local import LocalCache, Rank, Stack, num_heads_of
from vllm_ascend.kv_transfer.messages import (
    BlockSizes,
    Engine,
    LayerKind,
    RankRegions,
    StackRegions,
    StateKind,
    differences,
)
from vllm_ascend.kv_transfer.plan import PairPlan, RankMemory, plan_pair
from vllm_ascend.kv_transfer.topology import Span, num_turns, turns_of
from vllm_ascend.kv_transfer.transport import Address, Session


@dataclass(frozen=True)
class StackPlans:
    """How to read the layers of one stack."""

    plans: tuple[PairPlan, ...]
    """One for each turn among prefill ranks that store the same heads."""
    turn: itertools.count[int]
    convert_from: str | None
    """Element type of what is read, where it is not this rank's."""

    def next_plan(self) -> PairPlan:
        """The plans in turn, so that ranks with the same heads are read equally often."""
        return self.plans[next(self.turn) % len(self.plans)]


@dataclass(frozen=True)
class PrefillEngine:
    """A peer that this rank can read."""

    sessions: tuple[Session, ...]
    """How to address each of its ranks."""
    stacks: tuple[StackPlans, ...]
    """For each stack of this rank."""
    blocks: BlockSizes
    """How it cuts its cache."""


def pair_with(peer: Engine, local: LocalCache, protocol: str, options: Options) -> PrefillEngine:
    """Check the peer's description against this rank and plan the reads.

    Of `options`, the prefill sizes that the user gave are checked, if any, and whether reads are staged is
    planned for. Raises TopologyError naming what does not fit.
    """
    _check_same(peer, local)
    sizes = peer.parallel
    found = Sizes(tp_size=sizes.tp_size, dp_size=sizes.dp_size, pp_size=sizes.pp_size)
    if complaint := check_sizes(options.prefill, found, "prefill"):
        raise TopologyError(complaint)
    if peer.protocol != protocol:
        raise TopologyError(
            f"prefill engine {peer.engine_id} transfers by {peer.protocol!r} and this engine by "
            f"{protocol!r}; set the same protocol in kv_connector_extra_config of both"
        )
    return PrefillEngine(
        sessions=tuple(Session(rank.session) for rank in peer.ranks),
        stacks=tuple(_plans(stack, peer, local.rank, options.uses_staging) for stack in local.stacks),
        blocks=peer.blocks,
    )


def _check_same(peer: Engine, local: LocalCache) -> None:
    """Raise TopologyError naming every field in which models, or layers of one name, differ."""
    fields = differences(peer.cache, local.description)
    of_layers = {
        (theirs.kind, stack.kind): layer
        for rank in peer.ranks
        for stack in local.stacks
        for theirs, layer in _in_common(rank, stack)
    }
    for (there, here), layer in of_layers.items():
        _check_parts(peer, there, here, layer)
        fields += [f"{field} in layer {layer}" for field in _kinds_differ(there, here)]
    if fields:
        raise TopologyError(
            f"prefill engine {peer.engine_id} cannot feed this engine: {'; '.join(fields)}; "
            f"start both with the same model, --revision, --dtype, --quantization and --kv-cache-dtype"
        )


def _check_parts(peer: Engine, there: LayerKind | StateKind, here: LayerKind | StateKind, layer: str) -> None:
    if isinstance(there, StateKind) and isinstance(here, StateKind) and there.parts != here.parts:
        raise TopologyError(
            f"layer {layer} keeps recurrent state, which tensor parallel cuts into {there.parts} parts in "
            f"prefill engine {peer.engine_id} and into {here.parts} in this one, and no part can be made of "
            f"others; start both with the same --tensor-parallel-size"
        )


def _kinds_differ(there: LayerKind | StateKind, here: LayerKind | StateKind) -> list[str]:
    match there, here:
        case LayerKind(), LayerKind():
            if can_convert(there.cache_dtype, here.cache_dtype):
                there = msgspec.structs.replace(there, cache_dtype=here.cache_dtype)
            if can_rearrange(there.layout, here.layout):
                there = msgspec.structs.replace(there, layout=here.layout)
            return differences(there, here)
        case StateKind(), StateKind():
            return differences(there, here)
        case _:
            kept = ["state" if isinstance(kind, StateKind) else "tokens" for kind in (there, here)]
            return [f"what is kept is {kept[0]!r} there and {kept[1]!r} here"]


def _in_common(rank: RankRegions, stack: Stack) -> Iterator[tuple[StackRegions, str]]:
    """Those stacks of the peer's rank that have layers of `stack`, each with the first of these layers."""
    wanted = set(stack.memory.layers)
    for theirs in rank.stacks:
        common = [layer for layer in theirs.layers if layer in wanted]
        if common:
            yield theirs, common[0]


def _plans(stack: Stack, peer: Engine, own: Rank, staged_parts: bool) -> StackPlans:
    ranks = [_memory_of(rank, stack, peer) for rank in peer.ranks]
    # Turns are taken among the ranks of one pipeline stage.
    turns = math.lcm(
        *(
            num_turns([rank.heads for rank in ranks if rank.layers == layers])
            for layers in {rank.layers for rank in ranks if rank.layers}
        )
    )
    return StackPlans(
        plans=tuple(plan_pair(stack.memory, ranks, turn, staged_parts) for turn in range(turns)),
        turn=turns_of(own.tp_rank, own.tp_size, num_heads_of(stack.kind)),
        convert_from=_other_dtype(stack, peer),
    )


def _other_dtype(stack: Stack, peer: Engine) -> str | None:
    if isinstance(stack.kind, StateKind):
        return None  # States of other types are refused.
    kinds = [theirs.kind for rank in peer.ranks for theirs, _ in _in_common(rank, stack)]
    found = {(kind.cache_dtype, kind.layout) for kind in kinds if isinstance(kind, LayerKind)}
    if len(found) > 1:
        ways = sorted(f"{dtype} {layout}" for dtype, layout in found)
        raise TopologyError(
            f"prefill engine {peer.engine_id} keeps layers that are alike here in {', '.join(ways)}; "
            f"start all its ranks with the same options"
        )
    ((dtype, _),) = found
    return dtype if dtype != stack.kind.cache_dtype else None


def _memory_of(rank: RankRegions, stack: Stack, peer: Engine) -> RankMemory:
    """What the peer's rank stores of the stack's layers and of others that are alike; maybe nothing."""
    found = list(_in_common(rank, stack))
    if not found:
        return RankMemory(Span(0, 0), stack.memory.page, 0, (), ())
    theirs, layer = found[0]
    if len(found) > 1 or theirs.group != stack.group:
        groups = ", ".join(str(one.group) for one, _ in found)
        raise TopologyError(
            f"layer {layer} and its like are in KV cache group {stack.group} here and in {groups} of prefill "
            f"engine {peer.engine_id}; start both with the same model and options"
        )
    return _as_memory(rank, theirs, stack, peer)


def _as_memory(rank: RankRegions, theirs: StackRegions, stack: Stack, peer: Engine) -> RankMemory:
    heads = Span(theirs.first_head, theirs.first_head + theirs.num_heads)
    page = _page_of(theirs, stack, peer)
    if theirs.page_bytes != page.page_bytes or len(theirs.layers) != len(theirs.addresses):
        raise TopologyError(
            f"rank {rank.tp_rank} of prefill engine {peer.engine_id} has pages of {theirs.page_bytes} bytes, "
            f"which for {page.block_size} tokens of {page.row_heads} heads should be {page.page_bytes}; "
            f"run the same release on both sides"
        )
    addresses = tuple(Address(address) for address in theirs.addresses)
    return RankMemory(heads, page, theirs.num_blocks, theirs.layers, addresses)


def _page_of(theirs: StackRegions, stack: Stack, peer: Engine) -> PageLayout:
    """The layout that the peer's pages should have; states may be padded there as they are not here."""
    page = stack.memory.page
    if isinstance(theirs.kind, StateKind):
        return page.padded_to(max(theirs.page_bytes, page.page_bytes - page.padding_bytes))
    if theirs.kind.layout not in HEAD_MAJOR_OF.values():
        return page.of_size(peer.blocks.page_size, theirs.num_heads)
    # How far the peer's pages are apart, only it knows.
    apart = HeadMajor(theirs.head_stride_bytes, theirs.block_stride_bytes)
    return page.of_size(peer.blocks.page_size, theirs.num_heads, apart)
