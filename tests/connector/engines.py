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
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from vllm.config import CacheConfig, KVTransferConfig, ModelConfig, ParallelConfig, VllmConfig
from vllm.distributed.kv_transfer.kv_connector.utils import KVOutputAggregator
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole
from vllm.sampling_params import SamplingParams
from vllm.v1.core.kv_cache_manager import KVCacheBlocks
from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import KVConnectorOutput, ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus

from vllm_ascend.kv_transfer.connector import MooncakeConnector

LAYERS, BLOCK_SIZE, NUM_BLOCKS, HEAD_SIZE = 3, 16, 24, 16


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
    **transfer: Any,
) -> VllmConfig:
    """The configuration that `vllm serve` would make; port 0 unless `transfer` says otherwise."""
    return VllmConfig(
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
                "kv_connector_extra_config": {"peer_timeout_s": 1, **(extra or {})},
                **transfer,
            },
        ),
    )


def cache_config(
    num_kv_heads: int, tp_size: int, block_size: int = BLOCK_SIZE, layers: range = range(LAYERS)
) -> KVCacheConfig:
    """What vLLM gives a rank that has `layers` of the model."""
    spec = FullAttentionSpec(
        block_size=block_size,
        num_kv_heads=max(1, num_kv_heads // tp_size),
        head_size=HEAD_SIZE,
        dtype=torch.bfloat16,
    )
    names = [f"model.layers.{i}.self_attn.attn" for i in layers]
    return KVCacheConfig(
        num_blocks=NUM_BLOCKS, kv_cache_tensors=[], kv_cache_groups=[KVCacheGroupSpec(names, spec)]
    )


class Engine:
    """One engine: a scheduler half, a worker half per rank, and each rank's KV cache.

    Ranks are counted as vLLM does: stage by stage, in each of them the ranks of tensor parallel.
    """

    def __init__(
        self,
        config: VllmConfig,
        num_kv_heads: int,
        pages_per_block: int = 1,
        layers_per_stage: Sequence[int] = (LAYERS,),
    ) -> None:
        """`pages_per_block`: into how many blocks of its own attention cuts a block of the scheduler."""
        self.tp_size = config.parallel_config.tensor_parallel_size
        assert config.parallel_config.pipeline_parallel_size == len(layers_per_stage)
        self.num_ranks = self.tp_size * len(layers_per_stage)
        ends = [0, *itertools.accumulate(layers_per_stage)]
        self._stages = [range(start, stop) for start, stop in itertools.pairwise(ends)]
        block_size = config.cache_config.block_size
        caches = [cache_config(num_kv_heads, self.tp_size, block_size, layers) for layers in self._stages]
        self._closing: list[MooncakeConnector] = []
        self.scheduler = self._connector(config, KVConnectorRole.SCHEDULER, caches[0])
        self.workers = []
        self.tensors = []
        for rank in range(self.num_ranks):
            (group,) = caches[rank // self.tp_size].kv_cache_groups
            worker = self._connector(
                _at_rank(config, rank), KVConnectorRole.WORKER, caches[rank // self.tp_size]
            )
            num_pages, page_size = NUM_BLOCKS * pages_per_block, block_size // pages_per_block
            heads = group.kv_cache_spec.num_kv_heads
            shape = (len(group.layer_names), num_pages, heads, page_size, 2 * HEAD_SIZE)
            tensor = torch.zeros(shape, dtype=torch.bfloat16, device=device(rank))
            with torch.npu.device(device(rank)):
                worker.register_kv_caches(dict(zip(group.layer_names, tensor, strict=True)))
            self.workers.append(worker)
            self.tensors.append(tensor)
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
        """The rank's cache, its own memory, as bits [layer, page, K/V, token, head, dim]."""
        tensor = self.tensors[rank]
        layers, num_pages, heads, page_size, content = tensor.shape
        return tensor.view(torch.int16).view(layers, num_pages, 2, page_size, heads, content // 2)

    def kv(self, rank: int) -> torch.Tensor:
        """A copy of the rank's cache in main memory, as bits [layer, K/V, slot, head, dim]."""
        layers, num_pages, halves, page_size, heads, dim = self.pages(rank).shape
        by_half = self.pages(rank).cpu().transpose(1, 2)
        return by_half.reshape(layers, halves, num_pages * page_size, heads, dim)

    def fill(self, rank: int, kv: torch.Tensor) -> None:
        """Set the rank's cache to `kv`, bits as `kv()` returns them."""
        layers, num_pages, halves, page_size, heads, dim = self.pages(rank).shape
        by_half = kv.reshape(layers, halves, num_pages, page_size, heads, dim)
        self.pages(rank).copy_(by_half.transpose(1, 2).contiguous())

    def step(self) -> KVConnectorOutput:
        """One engine step with no request scheduled."""
        metadata = self.scheduler.build_connector_meta(SchedulerOutput.make_empty())
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

    def close(self) -> None:
        for connector in self._closing:
            connector.shutdown()

    def _connector(
        self, config: VllmConfig, role: KVConnectorRole, caches: KVCacheConfig
    ) -> MooncakeConnector:
        connector = MooncakeConnector(config, role, caches)
        self._closing.append(connector)
        return connector


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


def prefilled(engine: Engine, request_id: str, num_tokens: int, blocks: Sequence[int]) -> dict[str, Any]:
    """Finish a request on the prefill engine, its KV in `blocks`; the router's view of the answer."""
    done = request(request_id, num_tokens, {"do_remote_decode": True, "do_remote_prefill": False})
    engine.scheduler.on_new_request(done)
    done.num_computed_tokens = num_tokens
    done.status = RequestStatus.FINISHED_LENGTH_CAPPED
    held, params = engine.scheduler.request_finished_all_groups(done, (list(blocks),))
    assert held
    # The router sends JSON.
    return json.loads(json.dumps(params))


def admit(
    engine: Engine,
    request_id: str,
    num_tokens: int,
    blocks: Sequence[int],
    params: dict[str, Any],
    cached: int = 0,
) -> tuple[Request, int]:
    """Admit a request on the decode engine, `cached` tokens of it a prefix hit; the tokens to be pulled."""
    wanted = request(request_id, num_tokens, params)
    engine.scheduler.on_new_request(wanted)
    num_external, is_async = engine.scheduler.get_num_new_matched_tokens(wanted, cached)
    assert is_async == (num_external > 0)
    allocated = KVCacheBlocks(([KVCacheBlock(block) for block in blocks],))
    engine.scheduler.update_state_after_alloc(wanted, allocated, num_external)
    return wanted, num_external


def finish(engine: Engine, ended: Request) -> dict[str, Any] | None:
    """End a request on the decode engine; what its answer carries."""
    ended.status = RequestStatus.FINISHED_STOPPED
    held, params = engine.scheduler.request_finished_all_groups(ended, ([],))
    assert not held
    return params


def _at_rank(config: VllmConfig, rank: int) -> VllmConfig:
    return dataclasses.replace(config, parallel_config=dataclasses.replace(config.parallel_config, rank=rank))
