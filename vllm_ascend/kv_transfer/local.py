# SPDX-License-Identifier: Apache-2.0
"""This rank's KV cache as vLLM hands it over, described for peers, for the planner and for the transport.

Layers that are alike and lie in one KV cache group make a `Stack`: what is planned, read and regrouped
together. Most models have one stack per group. A draft model's layers, which vLLM keeps like any others, may
be of another shape and then make a stack of their own. A layer that reads another one's cache has none of its
own, and is not described.

Layers with recurrent state make stacks, too. Tensor parallel cuts a state into as many parts as there are
ranks, which stand where attention has heads; but no part can be made of others.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from vllm.v1.kv_cache_interface import (
    AttentionSpec,
    KVCacheSpec,
    MambaSpec,
    MLAAttentionSpec,
    SlidingWindowSpec,
    UniformTypeKVCacheSpecs,
)

from vllm_ascend.attention.cache_layout import HALVES, PageLayout, page_layout, state_layout
from vllm_ascend.attention.layout_option import is_head_major
from vllm_ascend.errors import ConfigError
from vllm_ascend.kv_transfer.blocks import Blocks, Keeps
from vllm_ascend.kv_transfer.messages import (
    BlockSizes,
    CacheDescription,
    LayerKind,
    RankRegions,
    StackRegions,
    StateKind,
)
from vllm_ascend.kv_transfer.plan import RankMemory
from vllm_ascend.kv_transfer.topology import heads_on
from vllm_ascend.kv_transfer.transport import Address, Region, Session

if TYPE_CHECKING:
    import torch
    from vllm.config import ModelConfig, VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheGroupSpec


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
    def place(self) -> int:
        """The rank's place among all of its engine, which counts stage by stage."""
        return self.pp_rank * self.tp_size + self.tp_rank

    @property
    def num_readers(self) -> int:
        """How many ranks of this engine read each request: every stage has layers, every rank has heads."""
        return self.tp_size * self.pp_size


@dataclass(frozen=True)
class Stack:
    """This rank's layers of one KV cache group that are alike. Groups share memory, but no block."""

    group: int
    """The KV cache group: which of a request's block lists is theirs."""
    kind: LayerKind | StateKind
    """What a peer's layers of the same names must equal."""
    tensors: tuple[torch.Tensor, ...]
    """Each layer as a view [kernel blocks, heads, tokens of a block, content]; of states
    [blocks, 1, 1, bytes]."""
    memory: RankMemory
    """Where the tensors lie. Of states, the parts stand for heads, and a page is a slot."""

    @property
    def is_state(self) -> bool:
        return isinstance(self.kind, StateKind)

    def for_peers(self) -> StackRegions:
        memory = self.memory
        return StackRegions(
            group=self.group,
            kind=self.kind,
            first_head=memory.heads.start,
            num_heads=len(memory.heads),
            num_blocks=memory.num_blocks,
            page_bytes=memory.page.page_bytes,
            block_stride_bytes=memory.page.block_stride_bytes,
            head_stride_bytes=memory.page.head_stride_bytes,
            layers=memory.layers,
            addresses=memory.addresses,
        )


@dataclass(frozen=True)
class LocalCache:
    """One rank's KV cache."""

    rank: Rank
    stacks: tuple[Stack, ...]
    description: CacheDescription
    """What a peer's must equal."""
    blocks: BlockSizes
    """How every layer of attention is cut into blocks."""
    keeps: tuple[Keeps, ...]
    """For each KV cache group, what its layers keep."""

    def regions(self) -> list[Region]:
        """The layers' memory, neighbours as one region: a card limits how many can be registered."""
        extents = [
            (address, address + stack.memory.page.extent_bytes(stack.memory.num_blocks))
            for stack in self.stacks
            for address in stack.memory.addresses
        ]
        starts, stops = np.array(sorted(extents), dtype=np.int64).T
        # Groups lie over each other; head-major, layers among each other.
        stops = np.maximum.accumulate(stops)
        cuts = np.flatnonzero(starts[1:] > stops[:-1]) + 1
        parts = zip(np.split(starts, cuts), np.split(stops, cuts), strict=True)
        return [Region(Address(int(start[0])), int(stop[-1] - start[0])) for start, stop in parts]

    def for_peers(self, session: Session) -> RankRegions:
        """What a peer needs to know to read this rank through `session`."""
        return RankRegions(
            tp_rank=self.rank.tp_rank,
            pp_rank=self.rank.pp_rank,
            session=session,
            stacks=tuple(stack.for_peers() for stack in self.stacks),
        )


def local_cache(
    vllm_config: VllmConfig,
    kv_cache_config: KVCacheConfig,
    kv_caches: Mapping[str, torch.Tensor],
    rank: Rank,
) -> LocalCache:
    """Describe `kv_caches`, by layer name. Raises ConfigError for shapes that this release does not move."""
    model = vllm_config.model_config
    keeps = keeps_of(kv_cache_config)
    stacks = [
        stack
        for index, group in enumerate(kv_cache_config.kv_cache_groups)
        for stack in _stacks_of(index, group, vllm_config, kv_caches, rank)
    ]
    description = CacheDescription(
        model=str(model.served_model_name),
        # transformers notes the commit where it downloaded the files, and has no public name for it.
        revision=getattr(model.hf_config, "_commit_hash", None) or model.revision,
        architecture=model.architecture,
        num_layers=model.get_total_num_hidden_layers(),
        hidden_size=model.get_hidden_size(),
        vocab_size=model.get_vocab_size(),
        dtype=_name(model.dtype),
        quantization=model.quantization or "none",
        windows=tuple(group.window for group in keeps),
    )
    page_sizes = {stack.memory.page.block_size for stack in stacks if isinstance(stack.kind, LayerKind)}
    if len(page_sizes) > 1:
        raise ConfigError(
            f"MooncakeConnectorV1 moves layers with attention blocks of one size and this model's have "
            f"{sorted(page_sizes)} tokens, which it does not support yet; serve it without "
            f"--kv-transfer-config"
        )
    block_size = block_size_of(kv_cache_config)
    blocks = BlockSizes(block_size=block_size, page_size=page_sizes.pop() if page_sizes else block_size)
    return LocalCache(rank, tuple(stacks), description, blocks, keeps)


def num_heads_of(kind: LayerKind | StateKind) -> int:
    """KV heads of a layer, or parts of its state, over all ranks."""
    return kind.parts if isinstance(kind, StateKind) else kind.num_kv_heads


def keeps_of(kv_cache_config: KVCacheConfig) -> tuple[Keeps, ...]:
    """For each KV cache group, what its layers keep."""
    return tuple(_keeps(group) for group in kv_cache_config.kv_cache_groups)


def block_size_of(kv_cache_config: KVCacheConfig) -> int:
    """Tokens per block of attention, which `check_cache` has found to be one number.

    vLLM's own `cache_config.block_size` may be that of states. 1 where there is no attention.
    """
    sizes = [
        group.kv_cache_spec.block_size
        for group in kv_cache_config.kv_cache_groups
        if not _keeps(group).is_state
    ]
    return sizes[0] if sizes else 1


def _keeps(group: KVCacheGroupSpec) -> Keeps:
    spec = group.kv_cache_spec
    match spec.first_spec if isinstance(spec, UniformTypeKVCacheSpecs) else spec:
        case MambaSpec(block_size=tokens):
            return Keeps(tokens_per_state=tokens)
        case SlidingWindowSpec(sliding_window=window):
            return Keeps(window=window)
        case _:
            # Without vLLM's hybrid manager, layers with a window are kept as if they had none.
            return Keeps()


def _stacks_of(
    index: int,
    group: KVCacheGroupSpec,
    vllm_config: VllmConfig,
    kv_caches: Mapping[str, torch.Tensor],
    rank: Rank,
) -> Iterator[Stack]:
    alike: dict[tuple[LayerKind | StateKind, PageLayout], list[str]] = {}
    for name in _owners(group, kv_caches):
        kind, page = _describe(name, _spec_of(name, group), vllm_config, kv_caches[name], rank)
        alike.setdefault((kind, page), []).append(name)
    for (kind, page), names in alike.items():
        tensors = tuple(_as_pages(kv_caches[name]) for name in names)
        heads = heads_on(rank.tp_rank, rank.tp_size, num_heads_of(kind))
        addresses = tuple(Address(tensor.data_ptr()) for tensor in tensors)
        memory = RankMemory(heads, page, tensors[0].shape[0], tuple(names), addresses)
        yield Stack(index, kind, tensors, memory)


def _owners(group: KVCacheGroupSpec, kv_caches: Mapping[str, torch.Tensor]) -> list[str]:
    """The group's layers without those that read another one's cache, which vLLM lists behind them."""
    first_at: dict[int, str] = {}
    for name in group.layer_names:
        first_at.setdefault(kv_caches[name].data_ptr(), name)
    return list(first_at.values())


def _describe(
    name: str, spec: KVCacheSpec, vllm_config: VllmConfig, kv_cache: torch.Tensor, rank: Rank
) -> tuple[LayerKind | StateKind, PageLayout]:
    if isinstance(spec, MambaSpec):
        state = StateKind(
            parts=1 if spec.tp_replicated else rank.tp_size,
            shapes=tuple(tuple(shape) for shape in spec.shapes),
            dtypes=tuple(_name(dtype) for dtype in spec.dtypes),
        )
        return state, state_layout(kv_cache)
    assert isinstance(spec, AttentionSpec)
    planes = 1 if _is_latent(spec) else HALVES
    page = page_layout(_as_pages(kv_cache), planes, is_head_major(vllm_config))
    kind = LayerKind(
        num_kv_heads=1 if _is_latent(spec) else _num_kv_heads(name, page, vllm_config, rank),
        head_size=page.head_size,
        cache_dtype=_name(kv_cache.dtype),
        quantization=spec.kv_quant_mode.name.lower(),
        layout=page.name,
    )
    return kind, page


def _spec_of(name: str, group: KVCacheGroupSpec) -> KVCacheSpec:
    spec = group.kv_cache_spec
    return spec.kv_cache_specs[name] if isinstance(spec, UniformTypeKVCacheSpecs) else spec


def _is_latent(spec: KVCacheSpec) -> bool:
    return isinstance(spec, MLAAttentionSpec)


def _name(dtype: object) -> str:
    return str(dtype).removeprefix("torch.")


def _as_pages(kv_cache: torch.Tensor) -> torch.Tensor:
    """vLLM's view with an axis for heads, which it leaves out for latents."""
    return kv_cache.unsqueeze(1) if kv_cache.dim() == 3 else kv_cache


def _num_kv_heads(name: str, page: PageLayout, vllm_config: VllmConfig, rank: Rank) -> int:
    """KV heads of a layer, over all ranks."""
    num_heads = _model_of(name, vllm_config).get_total_num_kv_heads()
    if max(1, num_heads // rank.tp_size) == page.num_heads:
        return num_heads
    if page.num_heads > 1:
        # The layer differs from most of its model; only copies of one head do not tell how many there are.
        return page.num_heads * rank.tp_size
    raise ConfigError(
        f"layer {name} has 1 KV head on each of {rank.tp_size} ranks where its model's configuration says "
        f"{num_heads} in all, so MooncakeConnectorV1 cannot tell copies from parts; serve it without "
        f"--kv-transfer-config"
    )


def _model_of(name: str, vllm_config: VllmConfig) -> ModelConfig:
    """The model that the layer belongs to: a draft model's layers are numbered behind the target's."""
    speculative, target = vllm_config.speculative_config, vllm_config.model_config
    numbers = [int(part) for part in name.split(".") if part.isdigit()]
    if speculative is None or not numbers or numbers[0] < target.get_total_num_hidden_layers():
        return target
    return speculative.draft_model_config


def blocks_of(ids: tuple[int, ...], sizes: BlockSizes) -> Blocks:
    """A request's blocks on an engine with blocks and pages of these sizes."""
    return Blocks(ids, sizes.block_size, sizes.page_size)
