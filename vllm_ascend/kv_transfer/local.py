# SPDX-License-Identifier: Apache-2.0
"""This rank's KV cache as vLLM hands it over, described for peers, for the planner and for the transport."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from vllm_ascend.attention.cache_layout import LAYOUT_NAME, PageLayout, page_layout
from vllm_ascend.errors import ConfigError
from vllm_ascend.kv_transfer.messages import BlockSizes, CacheDescription, RankRegions
from vllm_ascend.kv_transfer.plan import RankMemory
from vllm_ascend.kv_transfer.topology import heads_on
from vllm_ascend.kv_transfer.transport import Address, Region, Session

if TYPE_CHECKING:
    import torch
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig


@dataclass(frozen=True)
class Rank:
    """Where a worker stands in its engine."""

    tp_rank: int
    tp_size: int
    pp_rank: int
    pp_size: int
    reader: str
    """How it signs when it reads: unique among all readers of a prefill engine."""

    @property
    def num_readers(self) -> int:
        """How many ranks of this engine read each request: every stage has layers, every rank has heads."""
        return self.tp_size * self.pp_size


@dataclass(frozen=True)
class LocalCache:
    """One rank's KV cache."""

    rank: Rank
    tensors: tuple[torch.Tensor, ...]
    """Each layer as vLLM's view [kernel blocks, heads, kernel block size, 2 * head_size]."""
    description: CacheDescription
    """What a peer's must equal."""
    memory: RankMemory
    """Where the tensors lie."""
    blocks: BlockSizes
    """How they are cut into blocks."""

    def regions(self) -> list[Region]:
        """The layers' memory, neighbours as one region: a card limits how many can be registered."""
        layer_bytes = self.memory.num_blocks * self.memory.page.page_bytes
        starts = np.sort(np.array(self.memory.addresses, dtype=np.int64))
        cuts = np.flatnonzero(np.diff(starts) != layer_bytes) + 1
        return [Region(Address(int(part[0])), len(part) * layer_bytes) for part in np.split(starts, cuts)]

    def for_peers(self, session: Session) -> RankRegions:
        """What a peer needs to know to read this rank through `session`."""
        return RankRegions(
            tp_rank=self.rank.tp_rank,
            pp_rank=self.rank.pp_rank,
            session=session,
            num_blocks=self.memory.num_blocks,
            page_bytes=self.memory.page.page_bytes,
            layers=self.memory.layers,
            addresses=self.memory.addresses,
        )


def local_cache(
    vllm_config: VllmConfig,
    kv_cache_config: KVCacheConfig,
    kv_caches: Mapping[str, torch.Tensor],
    rank: Rank,
) -> LocalCache:
    """Describe `kv_caches`, by layer name. Raises ConfigError for shapes that this release does not move."""
    layers = tuple(kv_cache_config.kv_cache_groups[0].layer_names)
    tensors = tuple(kv_caches[layer] for layer in layers)
    model = vllm_config.model_config
    page = _one_layout(tensors)
    description = CacheDescription(
        model=str(model.served_model_name),
        architecture=model.architecture,
        num_layers=model.get_total_num_hidden_layers(),
        hidden_size=model.get_hidden_size(),
        vocab_size=model.get_vocab_size(),
        num_kv_heads=model.get_total_num_kv_heads(),
        head_size=page.head_size,
        cache_dtype=str(tensors[0].dtype).removeprefix("torch."),
        layout=LAYOUT_NAME,
    )
    blocks = BlockSizes(block_size=vllm_config.cache_config.block_size, page_size=page.block_size)
    memory = RankMemory(
        heads=heads_on(rank.tp_rank, rank.tp_size, description.num_kv_heads),
        page=page,
        num_blocks=tensors[0].shape[0],
        layers=layers,
        addresses=tuple(Address(tensor.data_ptr()) for tensor in tensors),
    )
    return LocalCache(rank, tensors, description, memory, blocks)


def _one_layout(tensors: tuple[torch.Tensor, ...]) -> PageLayout:
    layouts = {page_layout(tensor) for tensor in tensors}
    if len(layouts) > 1:
        raise ConfigError(
            f"MooncakeConnectorV1 moves layers of one shape and this model has {len(layouts)} "
            f"({', '.join(map(str, layouts))}), which it does not support yet; serve it without "
            f"--kv-transfer-config"
        )
    return layouts.pop()
