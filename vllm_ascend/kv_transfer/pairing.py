# SPDX-License-Identifier: Apache-2.0
"""Whether this rank can read a prefill engine, and how: checked and planned once, when the two meet.

All that decode knows of a peer is what its listener says; nobody configures the other side's sizes. What does
not fit is refused by the name of the field, with both values.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

from vllm_ascend.errors import TopologyError
from vllm_ascend.kv_transfer.config import Sizes, check_sizes
from vllm_ascend.kv_transfer.local import LocalCache
from vllm_ascend.kv_transfer.messages import BlockSizes, Engine, RankRegions, check_same_cache
from vllm_ascend.kv_transfer.plan import PairPlan, RankMemory, plan_pair
from vllm_ascend.kv_transfer.topology import heads_on, num_turns, turns_of
from vllm_ascend.kv_transfer.transport import Address, Session


@dataclass(frozen=True)
class PrefillEngine:
    """A peer that this rank can read."""

    sessions: tuple[Session, ...]
    """How to address each of its ranks."""
    plans: tuple[PairPlan, ...]
    """How to read it, one plan for each turn among ranks that store the same heads."""
    turn: itertools.count[int]
    blocks: BlockSizes
    """How it cuts its cache."""

    def next_plan(self) -> PairPlan:
        """The plans in turn, so that ranks with the same heads are read equally often."""
        return self.plans[next(self.turn) % len(self.plans)]


def pair_with(peer: Engine, local: LocalCache, protocol: str, configured: Sizes) -> PrefillEngine:
    """Check the peer's description against this rank and plan the reads.

    `configured` are the prefill sizes that the user gave, if any. Raises TopologyError naming what does
    not fit.
    """
    check_same_cache(peer.cache, local.description, peer.engine_id)
    sizes = peer.parallel
    found = Sizes(tp_size=sizes.tp_size, dp_size=sizes.dp_size, pp_size=sizes.pp_size)
    if complaint := check_sizes(configured, found, "prefill"):
        raise TopologyError(complaint)
    if peer.protocol != protocol:
        raise TopologyError(
            f"prefill engine {peer.engine_id} transfers by {peer.protocol!r} and this engine by "
            f"{protocol!r}; set the same protocol in kv_connector_extra_config of both"
        )
    ranks = [_memory_of(rank, peer, local) for rank in peer.ranks]
    held_by_rank = [heads_on(rank, sizes.tp_size, peer.cache.num_kv_heads) for rank in range(sizes.tp_size)]
    own = local.rank
    return PrefillEngine(
        sessions=tuple(Session(rank.session) for rank in peer.ranks),
        plans=tuple(plan_pair(local.memory, ranks, turn) for turn in range(num_turns(held_by_rank))),
        turn=turns_of(own.tp_rank, own.tp_size, local.description.num_kv_heads),
        blocks=peer.blocks,
    )


def _memory_of(rank: RankRegions, peer: Engine, local: LocalCache) -> RankMemory:
    heads = heads_on(rank.tp_rank, peer.parallel.tp_size, peer.cache.num_kv_heads)
    page = local.memory.page.of_size(peer.blocks.page_size, len(heads))
    if rank.page_bytes != page.page_bytes or len(rank.layers) != len(rank.addresses):
        raise TopologyError(
            f"rank {rank.tp_rank} of prefill engine {peer.engine_id} has pages of {rank.page_bytes} bytes, "
            f"which for {page.block_size} tokens of {len(heads)} heads should be {page.page_bytes}; "
            f"run the same release on both sides"
        )
    addresses = tuple(Address(address) for address in rank.addresses)
    return RankMemory(heads, page, rank.num_blocks, rank.layers, addresses)
