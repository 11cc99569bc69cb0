# SPDX-License-Identifier: Apache-2.0
"""vLLM's own MooncakeConnector in the harness of handoff.py: its worker halves, on the same memory, over TCP.

Its prefill ranks push: a decode rank tells them where to, they write and answer. The clock runs from the step
in which decode learns of the request until every decode rank has heard of all its sources; the prefill side
knows by then that the request is ready, as ours does.

Pages are vLLM's LBHNC, which this connector demands: within a layer, a block, heads one behind the other.
That is not how attention on this platform reads that layout (see attention/cache_layout.py: a token's heads
are side by side). Bytes arrive all the same; `check` compares them.
"""

from __future__ import annotations

import itertools
import os
import random
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import torch
from vllm.config import KVTransferConfig, VllmConfig
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole
from vllm.distributed.kv_transfer.kv_connector.v1.mooncake import mooncake_connector
from vllm.distributed.kv_transfer.kv_connector.v1.mooncake.mooncake_connector import (
    MooncakeConnector,
    MooncakeConnectorMetadata,
)

sys.path.append(str(Path(__file__).parents[1]))

from connector.engines import cache_config, device, engine_config, model_folder, name_of
from connector.topologies import Model

TOKENS, LAYERS, HEADS, HEAD_SIZE = 2048, 32, 8, 128
TIMEOUT_S = 120
ANSWER = "seconds: "


@contextmanager
def as_rank(tp_rank: int, tp_size: int) -> Iterator[None]:
    """What the connector asks of vLLM's process groups; ranks are processes there, and objects here."""
    groups = {
        "get_tensor_model_parallel_rank": lambda: tp_rank,
        "get_tensor_model_parallel_world_size": lambda: tp_size,
        "get_pp_group": lambda: mock.Mock(rank_in_group=0),
    }
    with mock.patch.multiple(mooncake_connector, **groups), torch.npu.device(device(tp_rank)):
        yield


class Side:
    """The ranks of an engine."""

    def __init__(self, model: Model, config: VllmConfig, num_blocks: int) -> None:
        self.tp_size = config.parallel_config.tensor_parallel_size
        shape = (
            model.num_layers,
            num_blocks,
            model.heads_on_a_rank(self.tp_size),
            config.cache_config.block_size,
            2 * model.head_size,
        )
        caches = cache_config(
            model, self.tp_size, config.cache_config.block_size, range(model.num_layers), None, num_blocks
        )
        self.memory: list[torch.Tensor] = []
        self.ranks: list[MooncakeConnector] = []
        for rank in range(self.tp_size):
            with as_rank(rank, self.tp_size):
                memory = torch.zeros(shape, dtype=torch.bfloat16, device=device(rank))
                connector = MooncakeConnector(config, KVConnectorRole.WORKER, caches)
                connector.register_kv_caches(
                    {name_of(layer): tensor for layer, tensor in enumerate(memory.unbind())}
                )
            self.memory.append(memory)
            self.ranks.append(connector)

    def tell(self, metadata: MooncakeConnectorMetadata) -> None:
        for connector in self.ranks:
            connector.connector_worker.start_load_kv(metadata)


class Pair:
    """A pair of engines with vLLM's connector, between which one request after the other is handed over."""

    def __init__(
        self, model: Model, prefill_tp: int, decode_tp: int, block_size: int, num_blocks: int, folder: Path
    ) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self._bootstrap = f"127.0.0.1:{free.getsockname()[1]}"
        os.environ["VLLM_HOST_IP"] = "127.0.0.1"
        path = model_folder(
            folder, model.num_kv_heads, num_hidden_layers=model.num_layers, head_dim=model.head_size
        )

        def side(tp_size: int, role: str) -> Side:
            config = engine_config(path, tp_size, role, block_size=block_size)
            extra = {"mooncake_protocol": "tcp"}
            if role == "kv_producer":
                extra["bootstrap_server_address"] = self._bootstrap
            config.kv_transfer_config = KVTransferConfig(
                kv_connector="MooncakeConnector",
                kv_role=role,
                engine_id=role,
                kv_connector_extra_config=extra,
            )
            return Side(model, config, 2 * num_blocks)

        host, port = self._bootstrap.split(":")
        self._server = mooncake_connector.MooncakeBootstrapServer(host, int(port))
        self._server.start()
        self._prefill, self._decode = side(prefill_tp, "kv_producer"), side(decode_tp, "kv_consumer")
        for memory in self._prefill.memory:
            bits = memory.view(torch.int16)
            bits.copy_(torch.randint(-(1 << 15), 1 << 15, bits.shape, dtype=bits.dtype))
        chance = random.Random(0)
        self._remote, self._local = (chance.sample(range(1, 2 * num_blocks), num_blocks) for _ in range(2))
        self._number = itertools.count()

    def __call__(self) -> float:
        """Seconds of one handoff. Raises TimeoutError if it does not end."""
        name = f"request {next(self._number)}"
        params = {
            "transfer_id": name,
            "remote_engine_id": "kv_producer",
            "remote_bootstrap_addr": f"http://{self._bootstrap}",
        }
        ready, wanted = MooncakeConnectorMetadata(), MooncakeConnectorMetadata()
        ready.add_new_req(name, [self._remote], params, load_remote_cache=False)
        announced = MooncakeConnectorMetadata()
        announced.add_new_req(name, [], params, load_remote_cache=False)
        self._prefill.tell(announced)
        self._prefill.tell(ready)
        begin_s = time.perf_counter()
        # Each rank counts its own sources in what it is told.
        for connector in self._decode.ranks:
            wanted = MooncakeConnectorMetadata()
            wanted.add_new_req(name, [self._local], params)
            connector.connector_worker.start_load_kv(wanted)
        for connector in self._decode.ranks:
            while name not in (results := connector.connector_worker.get_transfer_results()).finished_recving:
                if time.perf_counter() - begin_s > TIMEOUT_S:
                    raise TimeoutError(f"{name} was not handed over within {TIMEOUT_S} s")
            if connector.connector_worker.get_block_ids_with_load_errors() or results.failed_recving:
                raise RuntimeError(f"vLLM's MooncakeConnector failed to load {name}; its log says why")
        return time.perf_counter() - begin_s

    def check(self) -> None:
        """The bytes of the last handoff are the prefill engine's."""
        there, here = (
            [memory[:, blocks].cpu() for memory in side.memory]
            for side, blocks in ((self._prefill, self._remote), (self._decode, self._local))
        )
        assert torch.equal(
            torch.cat(there, dim=2).view(torch.int16), torch.cat(here, dim=2).view(torch.int16)
        )


class VllmHandoffs:
    """A `Pair` in a process of its own, killed at the end: its threads do not always end when told to."""

    def __init__(self, prefill_tp: int, decode_tp: int, block_size: int) -> None:
        sizes = map(str, (prefill_tp, decode_tp, block_size))
        self._process = subprocess.Popen(
            [sys.executable, __file__, *sizes], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def __call__(self) -> float:
        """Seconds of one handoff, whose bytes were compared afterwards. Raises RuntimeError if it failed."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print("next", file=self._process.stdin, flush=True)
        for line in self._process.stdout:
            if line.startswith(ANSWER):
                return float(line.removeprefix(ANSWER))
        raise RuntimeError(f"vLLM's MooncakeConnector ended with {self._process.wait()}; its log says why")

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()


def main() -> None:
    from vllm.plugins import load_general_plugins

    load_general_plugins()
    prefill_tp, decode_tp, block_size = map(int, sys.argv[1:])
    model = Model(HEADS, group_of_layer=(0,) * LAYERS, head_size=HEAD_SIZE)
    with tempfile.TemporaryDirectory() as folder:
        pair = Pair(model, prefill_tp, decode_tp, block_size, TOKENS // block_size, Path(folder))
    for _ in sys.stdin:
        seconds = pair()
        pair.check()
        print(f"{ANSWER}{seconds}", flush=True)


if __name__ == "__main__":
    main()
