# SPDX-License-Identifier: Apache-2.0
"""Engines without a model: the real connector on every rank, vLLM's objects, Mooncake, in one process.

Rank r uses device r. A "step" does what vLLM's engine does with a connector: the scheduler half makes the
step's metadata, every worker half starts and reports, vLLM's aggregator joins the reports, the scheduler half
learns.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from connector.topologies import HEAD_SIZE, LAYERS, Model
from vllm.config import (
    CacheConfig,
    KVTransferConfig,
    ModelConfig,
    ParallelConfig,
    SpeculativeConfig,
    VllmConfig,
)
from vllm.distributed.kv_transfer.kv_connector.utils import KVOutputAggregator
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole
from vllm.sampling_params import SamplingParams
from vllm.v1.core.kv_cache_manager import KVCacheBlocks
from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheGroupSpec,
    KVCacheSpec,
    MambaSpec,
    MLAAttentionSpec,
    SlidingWindowSpec,
    UniformTypeKVCacheSpecs,
)
from vllm.v1.outputs import KVConnectorOutput, ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus

from vllm_ascend.attention.layout_option import HEAD_MAJOR, TOKEN_MAJOR, is_head_major
from vllm_ascend.kv_transfer.connector import MooncakeConnector

BLOCK_SIZE, NUM_BLOCKS = 16, 24
PEER_TIMEOUT_S = 3

Blocks = list[int] | tuple[list[int], ...]
"""A request's blocks, of the only KV cache group or of each."""


def model_folder(folder: Path, num_kv_heads: int, **changes: Any) -> Path:
    """A model as far as its configuration goes."""
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 128,
        "intermediate_size": 128,
        "num_attention_heads": 8,
        "num_key_value_heads": num_kv_heads,
        "head_dim": HEAD_SIZE,
        "num_hidden_layers": LAYERS,
        "vocab_size": 64,
        "max_position_embeddings": 512,
        "dtype": "bfloat16",
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    return folder


def engine_config(
    model: Path,
    tp_size: int,
    role: str,
    extra: Mapping[str, Any] | None = None,
    *,
    block_size: int = BLOCK_SIZE,
    pp_size: int = 1,
    draft: Path | None = None,
    head_major: bool = False,
    **transfer: Any,
) -> VllmConfig:
    """The configuration that `vllm serve` would make; port 0 unless `transfer` says otherwise.

    `draft`: a draft model's folder. `head_major`: how the cache is laid out, which vLLM settles before it
    makes one.
    """
    config = VllmConfig(
        model_config=ModelConfig(
            model=str(model),
            skip_tokenizer_init=True,
            dtype="bfloat16",
            max_model_len=256,
            served_model_name="recall",
            enforce_eager=True,
        ),
        cache_config=CacheConfig(block_size=block_size),
        parallel_config=ParallelConfig(tensor_parallel_size=tp_size, pipeline_parallel_size=pp_size),
        kv_transfer_config=KVTransferConfig(
            kv_connector="MooncakeConnectorV1",
            kv_role=role,
            **{
                "kv_port": 0,
                "engine_id": role,
                "kv_connector_extra_config": {"peer_timeout_s": PEER_TIMEOUT_S, **(extra or {})},
                **transfer,
            },
        ),
    )
    config.cache_config.kv_cache_layout = (HEAD_MAJOR if head_major else TOKEN_MAJOR).name
    if draft is not None:
        # Afterwards, since an NPU engine does not speculate yet; a draft model's cache moves all the same.
        config.speculative_config = SpeculativeConfig(
            method="eagle",
            model=str(draft),
            num_speculative_tokens=1,
            target_model_config=config.model_config,
            target_parallel_config=config.parallel_config,
        )
    return config


def cache_config(
    model: Model,
    tp_size: int,
    block_size: int = BLOCK_SIZE,
    layers: range = range(LAYERS),
    tokens_per_state: int | None = None,
    num_blocks: int = NUM_BLOCKS,
) -> KVCacheConfig:
    """What vLLM gives a rank that has `layers` of the model."""
    groups = []
    for group in range(len(model.windows)):
        own = model.layers_of(group, layers)
        size = tokens_per_state or block_size if group in model.state_groups else block_size
        specs = {name_of(layer): spec_of(model, layer, tp_size, size) for layer in own}
        # A pipeline stage knows groups of which it has no layer.
        first = spec_of(model, model.group_of_layer.index(group), tp_size, size)
        alike = all(spec == first for spec in specs.values())
        spec = first if alike else UniformTypeKVCacheSpecs(block_size=block_size, kv_cache_specs=specs)
        groups.append(KVCacheGroupSpec(list(specs), spec))
    return KVCacheConfig(num_blocks=num_blocks, kv_cache_tensors=[], kv_cache_groups=groups)


def spec_of(model: Model, layer: int, tp_size: int, block_size: int) -> KVCacheSpec:
    if model.keeps_state(layer):
        return MambaSpec(
            block_size=block_size,
            shapes=state_shapes(model, tp_size),
            dtypes=(torch.bfloat16, torch.float32),
            tp_replicated=model.every_rank_has_states,
        )
    shape = {
        "block_size": block_size,
        "num_kv_heads": model.heads_on_a_rank(tp_size, layer),
        "head_size": model.head_size,
        "dtype": getattr(torch, model.dtype),
    }
    if model.latent:
        return MLAAttentionSpec(**shape)
    if (window := model.windows[model.group_of(layer)]) is not None:
        return SlidingWindowSpec(**shape, sliding_window=window)
    return FullAttentionSpec(**shape)


def state_shapes(model: Model, tp_size: int) -> tuple[tuple[int, ...], ...]:
    """Of a layer's states on a rank: a convolution's of 24 channels, a recurrence's."""
    ranks = 1 if model.every_rank_has_states else tp_size
    return (3, 24 // ranks), (model.state_heads // ranks, 4, 4)


def state_bytes(model: Model, tp_size: int) -> int:
    convolution, recurrence = state_shapes(model, tp_size)
    return 2 * math.prod(convolution) + 4 * math.prod(recurrence)


def reader_of(layer: int) -> str:
    """The name of the layer that reads the cache of `layer`."""
    return f"model.layers.{100 + layer}.self_attn.attn"


def name_of(layer: int) -> str:
    return f"model.layers.{layer}.self_attn.attn"


class Engine:
    """One engine: a scheduler half, a worker half per rank, and each rank's KV cache.

    Ranks are counted as vLLM does: stage by stage, in each of them the ranks of tensor parallel.
    """

    def __init__(
        self,
        config: VllmConfig,
        model: Model | int,
        pages_per_block: int = 1,
        layers_per_stage: Sequence[int] | None = None,
        connector: type[MooncakeConnector] = MooncakeConnector,
        tokens_per_state: int | None = None,
        num_blocks: int = NUM_BLOCKS,
    ) -> None:
        """`model`: an integer is a plain model's number of KV heads.

        `pages_per_block`: into how many blocks of its own attention cuts a block of the scheduler.
        `tokens_per_state`: after how many tokens vLLM keeps state in another block, if not those of a block.
        """
        self._connector_class = connector
        self._num_blocks = num_blocks
        self._head_major = is_head_major(config)
        self.model = model if isinstance(model, Model) else Model(model)
        self.tp_size = config.parallel_config.tensor_parallel_size
        layers_per_stage = layers_per_stage or (self.model.num_layers,)
        assert config.parallel_config.pipeline_parallel_size == len(layers_per_stage)
        self.num_ranks = self.tp_size * len(layers_per_stage)
        ends = [0, *itertools.accumulate(layers_per_stage)]
        if self.model.draft_heads is not None:
            ends[-1] += 1
        self._stages = [range(start, stop) for start, stop in itertools.pairwise(ends)]
        self.block_size = config.cache_config.block_size
        self.page_size = self.block_size // pages_per_block
        caches = [
            cache_config(self.model, self.tp_size, self.block_size, layers, tokens_per_state, num_blocks)
            for layers in self._stages
        ]
        self._closing: list[MooncakeConnector] = []
        self.scheduler = self._connector(config, KVConnectorRole.SCHEDULER, caches[0])
        self.workers = []
        self._memory: list[torch.Tensor] = []
        self._rows: list[dict[int, torch.Tensor]] = []
        self._tensors: list[dict[int, torch.Tensor]] = []
        for rank in range(self.num_ranks):
            worker = self._connector(
                _at_rank(config, rank), KVConnectorRole.WORKER, caches[rank // self.tp_size]
            )
            self._allocate(rank)
            with torch.npu.device(device(rank)):
                tensors = {name_of(layer): tensor for layer, tensor in self._tensors[rank].items()}
                # vLLM hands these over with the others; `cache_config` lists them or not.
                tensors |= {reader_of(i): tensors[name_of(i)] for i in self.model.read_by_another}
                worker.register_kv_caches(tensors)
            self.workers.append(worker)
        self.scheduler.set_xfer_handshake_metadata_pp_aware(
            {
                divmod(rank, self.tp_size): worker.get_handshake_metadata()
                for rank, worker in enumerate(self.workers)
            }
        )
        self._aggregator = KVOutputAggregator(self.num_ranks)

    def layers(self, rank: int) -> range:
        """The layers of the rank's stage."""
        return self._stages[rank // self.tp_size]

    def pages(self, rank: int) -> torch.Tensor:
        """The rank's cache, its own memory, as bits [layer, page, K/V, token, head, dim].

        Groups lie over each other in it; a draft model's layer is not in it. Token-major only.
        """
        assert not self._head_major
        memory = self._memory[rank].view(torch.int16)
        layers, num_pages, heads, page_size, content = memory.shape
        head_size = self.model.head_size
        return memory.view(layers, num_pages, content // head_size, page_size, heads, head_size)

    def layer(self, rank: int, layer: int) -> torch.Tensor:
        """One layer, its own memory, as bits [page, plane, token, head, dim]."""
        tensor = self._tensors[rank][layer].view(torch.int16)
        heads = self.model.heads_on_a_rank(self.tp_size, layer)
        if self._head_major:
            by_head = tensor.unflatten(0, (len(tensor), -1)) if self.model.latent else tensor
            pages = by_head.flatten(2).unflatten(2, (-1, self.page_size, self.model.head_size))
            return pages.permute(0, 2, 3, 1, 4)
        return tensor.view(len(tensor), -1, self.page_size, heads, self.model.head_size)

    def row(self, rank: int, layer: int) -> torch.Tensor:
        """The layer's memory and what pads it, as bytes [block, byte]; head-major as `layer` has it."""
        return self.layer(rank, layer) if self._head_major else self._rows[rank][layer]

    def state(self, rank: int, layer: int) -> torch.Tensor:
        """A layer's states, its own memory, as bytes [block, byte]."""
        return self._tensors[rank][layer][:, 0, 0, :]

    def layers_at(self, rank: int, layer: int) -> list[int]:
        """The layers that share the layer's memory, itself among them."""
        start = self._tensors[rank][layer].data_ptr()
        return [other for other, tensor in self._tensors[rank].items() if tensor.data_ptr() == start]

    def kv(self, rank: int, layer: int) -> torch.Tensor:
        """A copy of one layer in main memory, as bits [plane, slot, head, dim]."""
        by_page = self.layer(rank, layer).contiguous().cpu()
        return by_page.transpose(0, 1).reshape(by_page.shape[1], -1, *by_page.shape[3:])

    def fill(self, rank: int, layer: int, kv: torch.Tensor) -> None:
        """Set one layer to `kv`, bits as `kv()` returns them."""
        pages = self.layer(rank, layer)
        by_plane = kv.reshape(pages.shape[1], pages.shape[0], *pages.shape[2:])
        pages.copy_(by_plane.transpose(0, 1).contiguous())

    def step(self, scheduled: SchedulerOutput | None = None) -> KVConnectorOutput:
        """One engine step, by default with no request scheduled."""
        metadata = self.scheduler.build_connector_meta(scheduled or SchedulerOutput.make_empty())
        outputs = []
        for rank, worker in enumerate(self.workers):
            with torch.npu.device(device(rank)):
                worker.bind_connector_metadata(metadata)
                worker.start_load_kv(None)
                worker.wait_for_save()
                results = worker.get_transfer_results(set())
                outputs.append(
                    ModelRunnerOutput(
                        req_ids=[],
                        req_id_to_index={},
                        kv_connector_output=KVConnectorOutput(
                            finished_sending=results.finished_sending,
                            finished_recving=results.finished_recving,
                            failed_recving=results.failed_recving,
                            kv_connector_worker_meta=worker.build_connector_worker_meta(),
                        ),
                    )
                )
                worker.clear_connector_metadata()
        output = self._aggregator.aggregate(outputs).kv_connector_output
        self.scheduler.update_connector_output(output)
        return output

    def step_until(
        self, met: Callable[[KVConnectorOutput], bool], timeout_s: float = 20.0
    ) -> KVConnectorOutput:
        """Step until an output meets a condition; fails after `timeout_s`."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            output = self.step()
            if met(output):
                return output
            time.sleep(0.002)
        raise AssertionError(f"nothing of the kind within {timeout_s:g} s")

    def holds(self) -> bool:
        """Whether the scheduler half keeps blocks for somebody or waits for some."""
        prefill, decode = self.scheduler._prefill, self.scheduler._decode
        return (prefill is not None and len(prefill._leases) > 0) or (decode is not None and decode.waits)

    def close(self) -> None:
        sessions = [worker.get_handshake_metadata().regions.session for worker in self.workers]
        with called(sessions):
            for connector in self._closing:
                connector.shutdown()

    def _allocate(self, rank: int) -> None:
        """Memory for the rank's layers. As vLLM lays them, the n-th layers of all groups share theirs."""
        model, layers = self.model, self.layers(rank)
        of_model = range(layers.start, min(layers.stop, model.num_layers))
        of_groups = [model.layers_of(group, of_model) for group in range(len(model.windows))]
        memory = self._zeros(rank, max(map(len, of_groups)), model.heads_on_a_rank(self.tp_size))
        tensors = {
            layer: tensor
            for of_group in of_groups
            for layer, tensor in zip(of_group, self._layers_in(memory, len(of_group)), strict=True)
        }
        if model.num_layers in layers:
            heads = model.heads_on_a_rank(self.tp_size, model.num_layers)
            (tensors[model.num_layers],) = self._zeros(rank, 1, heads)
        self._memory.append(memory)
        rows = {}
        if not self._head_major:
            rows = {i: tensor.view(torch.int8).view(self._num_blocks, -1) for i, tensor in tensors.items()}
        self._rows.append(rows)
        for i in filter(model.keeps_state, layers):
            states = rows[i][:, : state_bytes(model, self.tp_size)]
            tensors[i] = states[:, None, None, :]
        # vLLM's view of latents has no axis for heads.
        self._tensors.append({i: t.squeeze(1) if model.latent else t for i, t in tensors.items()})

    def _layers_in(self, memory: torch.Tensor, num_layers: int) -> list[torch.Tensor]:
        """Views [page, head, token, content] of a group's layers in the rank's memory."""
        if not self._head_major:
            return list(memory[:num_layers])
        _, num_blocks, *page = memory.shape
        blocks = memory.view(num_blocks, -1, *page[1:])
        heads = page[0]
        return (
            list(blocks[:, : heads * num_layers].unflatten(1, (heads, num_layers)).unbind(2))
            if num_layers
            else []
        )

    def _zeros(self, rank: int, num_layers: int, heads: int) -> torch.Tensor:
        num_pages = self._num_blocks * self.block_size // self.page_size
        planes = 1 if self.model.latent else 2
        shape = (num_layers, num_pages, heads, self.page_size, planes * self.model.head_size)
        return torch.zeros(shape, dtype=getattr(torch, self.model.dtype), device=device(rank))

    def _connector(
        self, config: VllmConfig, role: KVConnectorRole, caches: KVCacheConfig
    ) -> MooncakeConnector:
        connector = self._connector_class(config, role, caches)
        self._closing.append(connector)
        return connector


@contextmanager
def called(sessions: Sequence[str]) -> Iterator[None]:
    """Call Mooncake engines again and again while they end.

    Each looks once a second, or when somebody calls, whether it should end, and Python's lock is held
    meanwhile: so another process calls.
    """
    ports = [session.rpartition(":")[2] for session in sessions]
    caller = subprocess.Popen([sys.executable, "-I", "-S", "-c", CALL, *ports], stdin=subprocess.PIPE)
    try:
        yield
    finally:
        caller.communicate()


CALL = """
import select, socket, sys
while not select.select([sys.stdin], [], [], 0.01)[0]:
    for port in map(int, sys.argv[1:]):
        with socket.socket() as one:
            one.connect_ex(("127.0.0.1", port))
"""


@contextmanager
def running(*engines: Engine) -> Iterator[None]:
    try:
        yield
    finally:
        for engine in engines:
            engine.close()


def device(rank: int) -> torch.device:
    return torch.device("npu", rank % torch.npu.device_count())


def request(request_id: str, num_prompt_tokens: int, params: dict[str, Any]) -> Request:
    """A request as the engine core gets it."""
    sampling = SamplingParams(max_tokens=1, extra_args={"kv_transfer_params": params})
    return Request(
        request_id=request_id,
        prompt_token_ids=list(range(num_prompt_tokens)),
        sampling_params=sampling,
        pooling_params=None,
    )


def prefilled(engine: Engine, request_id: str, num_tokens: int, blocks: Blocks) -> dict[str, Any]:
    """Finish a request on the prefill engine, its KV in `blocks`; the router's view of the answer."""
    done = request(request_id, num_tokens, {"do_remote_decode": True, "do_remote_prefill": False})
    return finished(engine, done, blocks)


def finished(engine: Engine, done: Request, blocks: Blocks) -> dict[str, Any]:
    """The same, of a request that was made elsewhere."""
    engine.scheduler.on_new_request(done)
    done.num_computed_tokens = done.num_prompt_tokens
    done.status = RequestStatus.FINISHED_LENGTH_CAPPED
    held, params = engine.scheduler.request_finished_all_groups(done, _by_group(blocks))
    assert held
    # The router sends JSON.
    return json.loads(json.dumps(params))


def admit(
    engine: Engine,
    request_id: str,
    num_tokens: int,
    blocks: Blocks,
    params: dict[str, Any],
    cached: int = 0,
) -> tuple[Request, int]:
    """Admit a request on the decode engine, `cached` tokens of it a prefix hit; the tokens to be pulled."""
    wanted = request(request_id, num_tokens, params)
    engine.scheduler.on_new_request(wanted)
    num_external, is_async = engine.scheduler.get_num_new_matched_tokens(wanted, cached)
    assert is_async == (num_external > 0)
    allocated = KVCacheBlocks(tuple([KVCacheBlock(block) for block in group] for group in _by_group(blocks)))
    engine.scheduler.update_state_after_alloc(wanted, allocated, num_external)
    return wanted, num_external


def finish(engine: Engine, ended: Request) -> dict[str, Any] | None:
    """End a request on the decode engine; what its answer carries."""
    ended.status = RequestStatus.FINISHED_STOPPED
    held, params = engine.scheduler.request_finished_all_groups(ended, ([],))
    assert not held
    return params


def _by_group(blocks: Blocks) -> tuple[list[int], ...]:
    return blocks if isinstance(blocks, tuple) else (blocks,)


def _at_rank(config: VllmConfig, rank: int) -> VllmConfig:
    parallel = dataclasses.replace(config.parallel_config, rank=rank)
    at_rank = dataclasses.replace(config, parallel_config=parallel, speculative_config=None)
    at_rank.speculative_config = config.speculative_config
    return at_rank
