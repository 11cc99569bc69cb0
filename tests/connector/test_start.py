# SPDX-License-Identifier: Apache-2.0
"""Mistakes that users make: each ends in one sentence that says what to change, and leaves nothing behind."""

from __future__ import annotations

import dataclasses
import os
import socket
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from connector.engines import (
    Engine,
    admit,
    cache_config,
    called,
    engine_config,
    model_folder,
    prefilled,
    running,
)
from connector.topologies import Model
from vllm.config import KVTransferConfig
from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole

from vllm_ascend.errors import ConfigError
from vllm_ascend.kv_transfer.connector import MooncakeConnector
from vllm_ascend.kv_transfer.mooncake import MooncakeTransport
from vllm_ascend.kv_transfer.transport import Address, Region

HEADS = 4


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_folder(Path(tmp_path_factory.mktemp("model")), HEADS)


@pytest.mark.parametrize("connector", ["MooncakeConnector", "NixlConnector"])
def test_connectors_that_would_hand_over_wrong_kv_are_refused(model, connector):
    config = engine_config(model, 1, "kv_consumer")
    transfer = KVTransferConfig(kv_connector=connector, kv_role="kv_consumer")
    with pytest.raises(
        ValueError, match=f"'{connector}' cuts a page .* set kv_connector to 'MooncakeConnectorV1'"
    ):
        dataclasses.replace(config, kv_transfer_config=transfer)


@pytest.mark.parametrize(
    ("extra", "sentence"),
    [
        pytest.param({"protocl": "tcp"}, "has 'protocl', which Mooncake", id="unknown option"),
        pytest.param({"protocol": "smoke"}, "must be one of tcp, rdma, ascend", id="unknown protocol"),
        pytest.param(
            {"protocol": "ascend"},
            "protocol 'ascend' needs mooncake-transfer-engine-npu, which is not installed",
            id="a card's protocol off a card",
        ),
        pytest.param({"decode": {"tp_size": 2}}, r"decode\.tp_size is 2, but .* with 1", id="own size"),
    ],
)
def test_options_are_refused_before_anything_starts(model, extra, sentence):
    # vLLM's configuration passes the sentence on in an error of its own, which is a ValueError as well.
    with pytest.raises(ValueError, match=sentence):
        MooncakeConnector(
            engine_config(model, 1, "kv_consumer", extra),
            KVConnectorRole.WORKER,
            cache_config(Model(HEADS), 1),
        )


@pytest.mark.parametrize("host", ["0.0.0.0", "*"])
def test_an_address_of_no_machine_is_refused(model, host):
    with pytest.raises(ValueError, match="host must be an address of this machine"):
        engine_config(model, 1, "kv_producer", {"host": host})


def test_an_address_of_another_machine_cannot_be_bound(model):
    config = engine_config(model, 1, "kv_producer", {"host": "203.0.113.7"})
    with pytest.raises(ConfigError, match=r"cannot bind 203\.0\.113\.7:0 .* to an address of this machine"):
        MooncakeConnector(config, KVConnectorRole.SCHEDULER, cache_config(Model(HEADS), 1))


def test_a_port_that_is_taken_is_named_and_no_thread_stays(model):
    threads = threading.active_count()
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        config = engine_config(model, 1, "kv_producer", kv_port=port)
        with pytest.raises(ConfigError, match=rf"port {port} on 127\.0\.0\.1 is taken; give each engine"):
            MooncakeConnector(config, KVConnectorRole.SCHEDULER, cache_config(Model(HEADS), 1))
    assert threading.active_count() == threads


def test_a_port_given_as_text_and_an_own_engine_id_work_and_the_port_is_free_afterwards(model):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    for _ in range(2):
        config = engine_config(model, 1, "kv_both", kv_port=str(port), engine_id="0")
        engine = Engine(config, HEADS)
        with running(engine):
            params = prefilled(engine, "p", 20, [1, 2])
            assert params["remote_port"] == port
            assert params["remote_engine_id"].startswith("0-")
            assert params["tp_size"] == 1


@pytest.mark.parametrize("name", ["MooncakeConnectorV1", "MooncakeConnector"])
def test_the_module_path_of_existing_deployments_leads_here(model, name):
    config = engine_config(model, 1, "kv_consumer")
    config.kv_transfer_config.kv_connector = name
    config.kv_transfer_config.kv_connector_module_path = "vllm_ascend.distributed.mooncake_connector"
    assert KVConnectorFactory.get_connector_class(config.kv_transfer_config) is MooncakeConnector


def test_an_engine_that_is_both_reads_from_itself(model):
    engine = Engine(engine_config(model, 1, "kv_both"), HEADS)
    with running(engine):
        engine.pages(0)[:, 3].fill_(5)
        params = prefilled(engine, "p", 16, [3])
        admit(engine, "d", 16, [8], params)
        engine.step_until(lambda output: output.finished_recving == {"d"})
        assert (engine.pages(0)[:, 8] == 5).all()


@pytest.mark.parametrize(
    ("changes", "extra", "sentence"),
    [
        pytest.param({"vocab_size": 65}, {}, "vocab_size is 64 there and 65 here", id="another vocabulary"),
        pytest.param({"hidden_size": 256}, {}, "hidden_size is 128 there and 256 here", id="another width"),
        pytest.param(
            {},
            {"prefill": {"tp_size": 4}},
            "says prefill.tp_size is 4, but that engine runs with 1",
            id="sizes",
        ),
    ],
)
def test_engines_that_do_not_fit_name_the_field_and_both_values(
    model, tmp_path, caplog_vllm, changes, extra, sentence
):
    prefill = Engine(engine_config(model, 1, "kv_producer"), HEADS)
    other = model_folder(tmp_path, HEADS, **changes)
    decode = Engine(engine_config(other, 1, "kv_consumer", extra), HEADS)
    with running(prefill, decode):
        params = prefilled(prefill, "p", 20, [1, 2])
        admit(decode, "d", 20, [1, 2], params)
        output = decode.step_until(lambda output: bool(output.finished_recving))
        assert output.failed_recving == {"d"}
        assert sentence in caplog_vllm.text
        freed = prefill.step_until(lambda output: bool(output.finished_sending), timeout_s=5)
        assert freed.finished_sending == {"p"}


@pytest.mark.parametrize(
    ("of_prefill", "of_decode", "sentence"),
    [
        pytest.param(
            Model(HEADS),
            Model(HEADS, dtype="float32"),
            "cache_dtype is 'bfloat16' there and 'float32' here in layer model.layers.0.self_attn.attn",
            id="element type",
        ),
        pytest.param(
            Model(1, latent=True),
            Model(HEADS),
            "layout is 'latent' there and 'token-major' here in layer model.layers.0.self_attn.attn",
            id="latents and heads",
        ),
        pytest.param(
            Model(HEADS),
            Model(HEADS, draft_heads=HEADS),
            "layer model.layers.3.self_attn.attn is stored by 0 pipeline stages of the prefill engine",
            id="no draft model there",
        ),
        pytest.param(
            Model(HEADS, draft_heads=2),
            Model(HEADS, draft_heads=HEADS),
            "num_kv_heads is 2 there and 4 here in layer model.layers.3.self_attn.attn",
            id="another draft model",
        ),
        pytest.param(
            Model(HEADS, windows=(24, 24), group_of_layer=(0, 1, 1)),
            Model(HEADS, windows=(24, 24), group_of_layer=(0, 0, 1)),
            "are in KV cache group 0 here and in 0, 1 of prefill engine",
            id="other groups",
        ),
    ],
)
def test_layers_that_differ_are_named(model, caplog_vllm, of_prefill, of_decode, sentence):
    prefill = Engine(engine_config(model, 1, "kv_producer"), of_prefill)
    decode = Engine(engine_config(model, 1, "kv_consumer"), of_decode)
    with running(prefill, decode):
        lists = tuple([1 + 2 * group, 2 + 2 * group] for group in range(len(of_decode.windows)))
        admit(decode, "d", 20, lists, prefilled(prefill, "p", 20, lists))
        output = decode.step_until(lambda output: bool(output.finished_recving))
        assert output.failed_recving == {"d"}
        assert sentence in caplog_vllm.text


def test_a_peer_that_was_restarted_is_not_mistaken_for_its_predecessor(model, caplog_vllm):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    decode = Engine(engine_config(model, 1, "kv_consumer"), HEADS)
    with running(decode):
        first = Engine(engine_config(model, 1, "kv_producer", kv_port=port, engine_id="0"), HEADS)
        with running(first):
            params = prefilled(first, "p", 20, [1, 2])
            admit(decode, "d1", 20, [1, 2], params)
            decode.step_until(lambda output: output.finished_recving == {"d1"})
            stale = prefilled(first, "q", 20, [1, 2])
        second = Engine(engine_config(model, 1, "kv_producer", kv_port=port, engine_id="0"), HEADS)
        with running(second):
            admit(decode, "d2", 20, [1, 2], stale)
            output = decode.step_until(lambda output: bool(output.finished_recving))
            assert output.failed_recving == {"d2"}
            params = prefilled(second, "p", 20, [1, 2])
            admit(decode, "d3", 20, [1, 2], params)
            output = decode.step_until(lambda output: bool(output.finished_recving))
            assert not output.failed_recving


def test_a_missing_library_is_named_with_its_package(tmp_path):
    # A file that is no library stands where the loader looks first, as good as none.
    (tmp_path / "libibverbs.so.1").write_bytes(b"")
    path = f"{tmp_path}:{os.environ.get('LD_LIBRARY_PATH', '')}"
    start = "from vllm_ascend.kv_transfer.mooncake import MooncakeTransport as T; T('127.0.0.1', 'tcp')"
    ended = subprocess.run(
        [sys.executable, "-c", start],
        env={**os.environ, "LD_LIBRARY_PATH": path},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    last_line = ended.stderr.strip().splitlines()[-1]
    assert ended.returncode != 0
    assert "libibverbs.so.1" in last_line
    assert "apt-get install libibverbs1" in last_line


def test_memory_that_mooncake_does_not_register_is_an_error_that_names_the_limit():
    transport = MooncakeTransport("127.0.0.1", "tcp")
    memory = np.zeros(4096, dtype=np.uint8)
    region = Region(Address(memory.ctypes.data), memory.nbytes)
    transport.register([region])
    # Twice the same, which the engine refuses as it refuses more than it may lock.
    with pytest.raises(ConfigError, match=r"cannot register 4096 bytes of KV cache.*ulimit -l"):
        transport.register([region])
    with called([transport.session]):
        transport.close()
