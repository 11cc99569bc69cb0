# SPDX-License-Identifier: Apache-2.0
"""More than two engines: of different sizes, at the same time, coming and going."""

from __future__ import annotations

import contextlib
import itertools
import socket
import time
from pathlib import Path

import pytest
import torch
from connector.engines import Engine, admit, engine_config, finish, model_folder, prefilled, running
from connector.topologies import Model

HEADS = 4
PROMPT, BLOCKS = 33, 3


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_folder(Path(tmp_path_factory.mktemp("model")), HEADS)


def heads_of_all(engine: Engine) -> torch.Tensor:
    """Every rank's pages side by side, as bits [layer, page, K/V, token, head, dim]."""
    return torch.cat([engine.pages(rank).cpu() for rank in range(engine.tp_size)], dim=-2)


def randomise(engine: Engine) -> None:
    for rank in range(engine.tp_size):
        engine.pages(rank).random_()


def load_all(*decodes: Engine, count: int) -> None:
    """Step the engines in turn, as if they ran side by side, until `count` requests are loaded."""
    loaded: set[str] = set()
    deadline = time.monotonic() + 20
    while len(loaded) < count:
        assert time.monotonic() < deadline, f"of {count} requests only {sorted(loaded)} were loaded"
        for decode in decodes:
            output = decode.step()
            assert not output.failed_recving
            loaded |= output.finished_recving or set()


def test_one_prefill_engine_serves_decode_engines_of_every_size_at_the_same_time(model):
    prefill = Engine(engine_config(model, 2, "kv_producer"), HEADS)
    decodes = [Engine(engine_config(model, size, "kv_consumer"), HEADS) for size in (1, 2, 4)]
    with running(prefill, *decodes):
        randomise(prefill)
        requests = []
        for turn, (decode, number) in enumerate(itertools.product(decodes, range(2))):
            remote = [1 + BLOCKS * turn + i for i in range(BLOCKS)]
            local = [1 + BLOCKS * number + i for i in range(BLOCKS)]
            params = prefilled(prefill, f"p{turn}", PROMPT, remote)
            admit(decode, f"d{turn}", PROMPT, local, params)
            requests.append((decode, remote[:2], local[:2]))
        load_all(*decodes, count=len(requests))
        reference = heads_of_all(prefill)
        for decode, remote, local in requests:
            assert torch.equal(heads_of_all(decode)[:, local], reference[:, remote])
        freed: set[str] = set()
        prefill.step_until(lambda output: freed.update(output.finished_sending or ()) or len(freed) == 6)


def test_requests_of_many_ranges_are_read_from_one_peer_at_the_same_time(model):
    """Row by row, 10 layers of 48 tokens are 960 ranges: seven requests are more than Mooncake queues."""
    deep = Model(HEADS, group_of_layer=(0,) * 10)
    prefill = Engine(engine_config(model, 1, "kv_producer"), deep)
    decode = Engine(engine_config(model, 2, "kv_consumer", {"reader_threads": 7}), deep)
    with running(prefill, decode):
        randomise(prefill)
        for turn in range(7):
            blocks = [1 + BLOCKS * turn + i for i in range(BLOCKS)]
            admit(decode, f"d{turn}", 49, [*blocks, 23], prefilled(prefill, f"p{turn}", 49, [*blocks, 23]))
        load_all(decode, count=7)
        assert torch.equal(heads_of_all(decode)[:, 1:22], heads_of_all(prefill)[:, 1:22])


def test_a_decode_engine_reads_from_prefill_engines_that_come_and_go(model, caplog_vllm):
    decode = Engine(engine_config(model, 2, "kv_consumer"), HEADS)
    sizes = [{"tp_size": 1}, {"tp_size": 4}, {"tp_size": 2, "pp_size": 3}]
    with running(decode), contextlib.ExitStack() as alive:
        prefills = []
        for index, (size, stages) in enumerate(zip(sizes, (None, None, (1, 1, 1)), strict=True)):
            config = engine_config(model, role="kv_producer", engine_id=f"p{index}", **size)
            prefills.append(Engine(config, HEADS, layers_per_stage=stages))
        last = alive.enter_context(contextlib.ExitStack())
        last.enter_context(running(*prefills[1:]))
        with running(prefills[0]):
            wanted = []
            for index, prefill in enumerate(prefills):
                for rank in range(prefill.num_ranks):
                    prefill.pages(rank).fill_(index)
                params = prefilled(prefill, "p", PROMPT, [1, 2, 3])
                local = [1 + BLOCKS * index + i for i in range(BLOCKS)]
                wanted.append(admit(decode, f"d{index}", PROMPT, local, params)[0])
            load_all(decode, count=3)
            sources = [finish(decode, request)["sources"] for request in wanted]
            # Each decode rank wants two heads: of four ranks two, in three stages each the twin.
            assert sources == [(0,), (0, 1, 2, 3), (0, 1, 2, 3, 4, 5)]
            lost = prefilled(prefills[0], "lost", PROMPT, [4, 5, 6])
        for index in range(3):
            for rank in range(2):
                assert (decode.pages(rank)[:, 1 + BLOCKS * index : 3 + BLOCKS * index] == index).all()

        admit(decode, "nobody", PROMPT, [13, 14, 15], lost)
        admit(decode, "somebody", PROMPT, [16, 17, 18], prefilled(prefills[1], "q", PROMPT, [4, 5, 6]))
        ended: dict[str, bool] = {}
        while len(ended) < 2:
            output = decode.step()
            ended |= {name: name in output.failed_recving for name in output.finished_recving or ()}
        assert ended == {"nobody": True, "somebody": False}

        new = Engine(engine_config(model, 1, "kv_producer", engine_id="new"), HEADS)
        with running(new):
            new.pages(0).fill_(9)
            admit(decode, "dn", PROMPT, [19, 20, 21], prefilled(new, "p", PROMPT, [1, 2, 3]))
            load_all(decode, count=1)
            assert (decode.pages(1)[:, 19:21] == 9).all()


def test_data_parallel_ranks_are_engines_with_ports_of_their_own(model):
    """As vLLM configures the engine cores of one `vllm serve`: same options, another index and engine id."""
    port = free_port(beside=3)
    configs = [engine_config(model, 1, "kv_producer", kv_port=port) for _ in range(3)]
    for index, config in enumerate(configs):
        config.parallel_config.data_parallel_index = index
        config.kv_transfer_config.engine_id = f"prefill_dp{index}"
    ranks = [Engine(config, HEADS) for config in configs]
    decode = Engine(engine_config(model, 1, "kv_consumer"), HEADS)
    with running(*ranks, decode):
        for index, rank in enumerate(ranks):
            rank.pages(0)[:, 3].fill_(index)
            params = prefilled(rank, f"p{index}", 16, [3])
            assert params["remote_port"] == port + index
            assert params["remote_engine_id"].startswith(f"prefill_dp{index}-")
            admit(decode, f"d{index}", 16, [8 + index], params)
        loaded: set[str] = set()
        decode.step_until(lambda output: loaded.update(output.finished_recving or ()) or len(loaded) == 3)
        for index in range(3):
            assert (decode.pages(0)[:, 8 + index] == index).all()


def free_port(beside: int = 1) -> int:
    """The first of `beside` ports in a row that nobody listens on now."""
    while True:
        with contextlib.ExitStack() as probes, contextlib.suppress(OSError):
            first = probes.enter_context(socket.socket())
            first.bind(("127.0.0.1", 0))
            port: int = first.getsockname()[1]
            for offset in range(1, beside):
                probes.enter_context(socket.socket()).bind(("127.0.0.1", port + offset))
            return port
