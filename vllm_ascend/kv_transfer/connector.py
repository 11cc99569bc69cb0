# SPDX-License-Identifier: Apache-2.0
"""MooncakeConnector, what vLLM sees: forwards each call to the half that runs in this process."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from typing import TYPE_CHECKING, Any

from vllm import envs as vllm_envs
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorHandshakeMetadata,
    KVConnectorMetadata,
    KVConnectorRole,
    KVConnectorTransferResults,
    KVConnectorWorkerMetadata,
    SupportsHMA,
)
from vllm.logger import init_logger
from vllm.v1.metrics.cache_hit_source import CacheHitSource

from vllm_ascend.kv_transfer.config import check_cache, options_of
from vllm_ascend.kv_transfer.decode_side import DecodeSide
from vllm_ascend.kv_transfer.local import Rank, block_size_of, keeps_of, local_cache
from vllm_ascend.kv_transfer.messages import (
    BlockSizes,
    CacheDescription,
    Engine,
    Parallel,
    RankRegions,
)
from vllm_ascend.kv_transfer.metrics import TransferCounters, TransferNumbers, TransferStats
from vllm_ascend.kv_transfer.mooncake import MooncakeTransport, default_protocol
from vllm_ascend.kv_transfer.orders import GiveUp, Pull, ToSum
from vllm_ascend.kv_transfer.pace import Pace
from vllm_ascend.kv_transfer.prefill_side import PrefillSide
from vllm_ascend.kv_transfer.regroup import Regroup
from vllm_ascend.kv_transfer.sums import LayerSums
from vllm_ascend.kv_transfer.transport import Transport
from vllm_ascend.kv_transfer.trust import trust_of
from vllm_ascend.kv_transfer.worker import Loaded, WorkerHalf

if TYPE_CHECKING:
    import torch
    from vllm.config import VllmConfig
    from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorStats, PromMetric, PromMetricT
    from vllm.forward_context import ForwardContext
    from vllm.v1.attention.backend import AttentionMetadata
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.outputs import KVConnectorOutput
    from vllm.v1.request import Request

logger = init_logger(f"vllm.{__name__}")

LOOPBACK = "127.0.0.1"


@dataclass
class Step(KVConnectorMetadata):
    """Scheduler half to worker halves, once per step."""

    pulls: tuple[Pull, ...]
    given_up: tuple[GiveUp, ...]
    freed: frozenset[str]
    """Prefilled requests whose blocks may be freed."""
    to_sum: tuple[ToSum, ...]
    """Prefilled requests whose checksums decode may ask for."""


@dataclass
class Numbers(KVConnectorWorkerMetadata):
    """Worker halves to scheduler half: what loads cost, and checksums, by request; and loads that failed."""

    by_request: dict[str, TransferNumbers]
    sums: dict[str, tuple[LayerSums, ...]] = field(default_factory=dict)
    failed: frozenset[str] = frozenset()
    """Told at once, while vLLM hears of a failed load when all ranks are done with it."""

    def aggregate(self, other: KVConnectorWorkerMetadata) -> Numbers:
        assert isinstance(other, Numbers)
        merged = dict(self.by_request)
        for request_id, numbers in other.by_request.items():
            merged[request_id] = merged[request_id].merged(numbers) if request_id in merged else numbers
        sums = dict(self.sums)
        for request_id, layers in other.sums.items():
            sums[request_id] = sums.get(request_id, ()) + layers
        return Numbers(merged, sums, self.failed | other.failed)


@dataclass
class Registered(KVConnectorHandshakeMetadata):
    """Worker half to scheduler half, once: what the rank has registered."""

    protocol: str
    cache: CacheDescription
    blocks: BlockSizes
    regions: RankRegions


class MooncakeConnector(KVConnectorBase_V1, SupportsHMA):
    """`kv_connector: "MooncakeConnectorV1"`. See the package's docstring for the protocol."""

    _cache_hit_source = CacheHitSource.P2P

    def __init__(
        self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: KVCacheConfig
    ) -> None:
        """Raises ConfigError for anything that cannot be honoured."""
        super().__init__(vllm_config, role, kv_cache_config)
        self._options = options_of(vllm_config)
        check_cache(kv_cache_config)
        self._trust = trust_of(self._options.peer_networks)
        self._host = self._options.host or vllm_envs.VLLM_HOST_IP or LOOPBACK
        self._prefill: PrefillSide | None = None
        self._decode: DecodeSide | None = None
        self._worker: WorkerHalf | None = None
        self._pace = Pace()
        self._stats = TransferStats()
        self._numbers: dict[str, TransferNumbers] = {}
        self._sums: dict[str, tuple[LayerSums, ...]] = {}
        self._failed: set[str] = set()
        if role is KVConnectorRole.SCHEDULER:
            self._prefill = self._prefill_side() if self._kv_transfer_config.is_kv_producer else None
            self._decode = (
                DecodeSide(
                    keeps_of(kv_cache_config),
                    block_size_of(kv_cache_config),
                    patience_s=self._options.peer_timeout_s,
                    unheard_s=self._options.lease_s,
                    trust=self._trust,
                )
                if self._kv_transfer_config.is_kv_consumer
                else None
            )
        else:
            # Started here, so that a missing library ends the engine before its cache is allocated.
            self._protocol = self._options.protocol or default_protocol()
            self._transport = self.start_transport(
                vllm_envs.VLLM_HOST_IP or self._host, self._protocol, self._options.read_timeout_s
            )

    # Worker half

    @classmethod
    def start_transport(cls, host: str, protocol: str, timeout_s: float) -> Transport:
        """What moves bytes for this rank. Raises ConfigError if it cannot."""
        return MooncakeTransport(host, protocol, timeout_s)

    @classmethod
    def make_regroup(cls, kv_caches: Sequence[torch.Tensor]) -> Regroup:
        """What regroups the heads of these layers, and fences their use."""
        return Regroup(kv_caches)

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        parallel = self._vllm_config.parallel_config
        tp_size = parallel.tensor_parallel_size
        # vLLM counts ranks in the order DP, PP, TP, and each data-parallel rank is an engine of its own.
        pp_size = parallel.pipeline_parallel_size
        place = parallel.rank % (pp_size * tp_size)
        rank = Rank(
            tp_rank=place % tp_size,
            tp_size=tp_size,
            pp_rank=place // tp_size,
            pp_size=pp_size,
            reader=f"{self._kv_transfer_config.engine_id}/{place}",
        )
        local = local_cache(self._vllm_config, self._kv_cache_config, kv_caches, rank)
        regroups = [self.make_regroup(stack.tensors) for stack in local.stacks]
        self._worker = WorkerHalf(
            local, self._transport, regroups, self._protocol, self._options, self._trust
        )
        self._registered = Registered(
            self._protocol, local.description, local.blocks, local.for_peers(self._transport.session)
        )

    def get_handshake_metadata(self) -> Registered:
        return self._registered

    def start_load_kv(self, forward_context: ForwardContext, **kwargs: Any) -> None:  # Any: as vLLM has it
        assert self._worker is not None
        self._worker.start(self._step().pulls, self._step().given_up)
        for to_sum in self._step().to_sum:
            self._sums[to_sum.request_id] = self._worker.sum_up(to_sum)

    def get_transfer_results(self, finished_req_ids: set[str]) -> KVConnectorTransferResults:
        assert self._worker is not None
        results = KVConnectorTransferResults(finished_sending=set(self._step().freed))
        for result in self._worker.take_results():
            results.finished_recving.add(result.request_id)
            if isinstance(result, Loaded):
                self._numbers[result.request_id] = result.numbers
                self._stats.add(result.numbers)
            else:
                # By request, not by block: vLLM takes block ids of models with one cache group only.
                results.failed_recving.add(result.request_id)
                self._failed.add(result.request_id)
                if result.kind is not None:
                    self._stats.add_failure(result.kind)
        return results

    def build_connector_worker_meta(self) -> Numbers | None:
        report = Numbers(self._numbers, self._sums, frozenset(self._failed))
        self._numbers, self._sums, self._failed = {}, {}, set()
        return report if report.by_request or report.sums or report.failed else None

    def get_kv_connector_stats(self) -> KVConnectorStats | None:
        for side in (self._prefill, self._decode):
            if side is not None:
                side.report(self._stats)
        if self._stats.is_empty():
            return None
        stats, self._stats = self._stats, TransferStats()
        return stats

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Nothing to wait for: a request runs only after its whole load."""

    def save_kv_layer(
        self,
        layer_name: str,
        kv_layer: torch.Tensor,
        attn_metadata: AttentionMetadata,
        **kwargs: Any,  # Any: as vLLM has it
    ) -> None:
        """Nothing to save: decode reads the blocks where they are."""

    def wait_for_save(self) -> None:
        """Nothing to wait for; see `save_kv_layer`."""

    # Scheduler half

    def set_xfer_handshake_metadata_pp_aware(
        self, metadata: Mapping[tuple[int, int], KVConnectorHandshakeMetadata]
    ) -> None:
        if self._prefill is None:
            return
        ranks = [rank for _, rank in sorted(metadata.items()) if isinstance(rank, Registered)]
        parallel = self._vllm_config.parallel_config
        self._prefill.describe(
            Engine(
                engine_id=self._prefill.engine_id,
                protocol=ranks[0].protocol,
                cache=ranks[0].cache,
                # A pipeline stage without attention does not know into which pages others cut a block.
                blocks=min((rank.blocks for rank in ranks), key=attrgetter("page_size")),
                parallel=Parallel(
                    tp_size=parallel.tensor_parallel_size,
                    pp_size=parallel.pipeline_parallel_size,
                    dp_size=parallel.data_parallel_size,
                ),
                verifies=self._options.verify,
                ranks=tuple(rank.regions for rank in ranks),
            )
        )

    def on_new_request(self, request: Request) -> None:
        params = request.kv_transfer_params or {}
        if params.get("do_remote_decode") and self._prefill is not None:
            self._prefill.announce(request)
        if params.get("do_remote_prefill") and self._decode is not None:
            self._decode.announce(request)
        elif params.get("do_remote_prefill"):
            logger.warning("request %s is computed here: this engine is no kv_consumer", request.request_id)

    def get_num_new_matched_tokens(
        self, request: Request, num_computed_tokens: int
    ) -> tuple[int | None, bool]:
        if self._decode is None:
            return 0, False
        num_tokens = self._decode.tokens_to_pull(request, num_computed_tokens)
        return num_tokens, bool(num_tokens)

    def update_state_after_alloc(
        self, request: Request, blocks: KVCacheBlocks, num_external_tokens: int
    ) -> None:
        if self._decode is not None:
            self._decode.allocated(request, blocks, num_external_tokens)

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> Step:
        if scheduler_output.total_num_scheduled_tokens == 0:
            self._rest()
        if self._prefill is not None:
            self._prefill.scheduled(scheduler_output)
        return Step(
            pulls=self._decode.take_pulls() if self._decode is not None else (),
            given_up=self._decode.take_given_up() if self._decode is not None else (),
            freed=self._prefill.take_freed() if self._prefill is not None else frozenset(),
            to_sum=self._prefill.take_to_sum() if self._prefill is not None else (),
        )

    def update_connector_output(self, connector_output: KVConnectorOutput) -> None:
        report = connector_output.kv_connector_worker_meta
        if self._prefill is not None:
            self._prefill.processed()
            if isinstance(report, Numbers):
                self._prefill.add_sums(report.sums)
        if self._decode is None:
            return
        if isinstance(report, Numbers):
            self._decode.add_numbers(report.by_request)
            self._decode.failed_somewhere(report.failed)
        for request_id in connector_output.finished_recving or ():
            self._decode.loaded(request_id, failed=request_id in connector_output.failed_recving)

    def request_finished(
        self, request: Request, block_ids: list[int]
    ) -> tuple[bool, dict[str, Any] | None]:  # Any: JSON
        return self.request_finished_all_groups(request, (block_ids,))

    def request_finished_all_groups(
        self, request: Request, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:  # Any: JSON
        params = request.kv_transfer_params or {}
        if params.get("do_remote_decode") and self._prefill is not None:
            return self._prefill.finished(request, block_ids)
        return False, self._decode.finished(request) if self._decode is not None else None

    def _rest(self) -> None:
        if self._decode is not None and self._decode.waits:
            # Ranks tell of their reads in steps: what the pause saves in work it costs in latency.
            time.sleep(self._pace.next_rest_s(longest_s=0.003))
        elif self._prefill is not None:
            self._prefill.rest(self._pace.next_rest_s(longest_s=0.02))
        self._pace.rested()

    # Both

    def shutdown(self) -> None:
        for part in (self._prefill, self._decode, self._worker):
            if part is not None:
                part.close()

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> KVConnectorStats:
        return TransferStats(data)

    @classmethod
    def build_prom_metrics(
        cls,
        vllm_config: VllmConfig,
        metric_types: dict[type[PromMetric], type[PromMetricT]],
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> TransferCounters:
        return TransferCounters(vllm_config, metric_types, labelnames, per_engine_labelvalues)

    def _step(self) -> Step:
        step = self._get_connector_metadata()
        assert isinstance(step, Step)
        return step

    def _prefill_side(self) -> PrefillSide:
        parallel = self._vllm_config.parallel_config
        port = int(self._kv_transfer_config.kv_port)
        return PrefillSide(
            engine_id=str(self._kv_transfer_config.engine_id),
            host=self._host,
            # Each data-parallel rank is an engine with a listener of its own.
            port=port + parallel.data_parallel_index if port else 0,
            lease_s=self._options.lease_s,
            tp_size=parallel.tensor_parallel_size,
            block_size=block_size_of(self._kv_cache_config),
            keeps=keeps_of(self._kv_cache_config),
            trust=self._trust,
            verify=self._options.verify,
        )
