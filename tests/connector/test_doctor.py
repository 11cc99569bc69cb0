# SPDX-License-Identifier: Apache-2.0
"""`python -m vllm_ascend.doctor` as a user runs it: a sound machine, and faults that it tells apart.

A run takes its time, and each finding is there whatever the others are: so a run has several faults.
"""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from connector.engines import Engine, engine_config, model_folder, prefilled, running

from vllm_ascend.doctor.__main__ import main
from vllm_ascend.envs import KV_SECRET

SECRET = "correct horse battery staple"


def doctor(*arguments: str, **environment: str | None) -> tuple[int, str]:
    """The exit status and what it prints; `environment` adds to this process's, None takes away."""
    given = {**os.environ, KV_SECRET.name: SECRET, **environment}
    done = subprocess.run(
        [sys.executable, "-m", "vllm_ascend.doctor", *arguments],
        env={name: value for name, value in given.items() if value is not None},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert "Traceback" not in done.stdout
    return done.returncode, done.stdout


def finding(output: str, subject: str) -> tuple[str, str]:
    """The last finding on `subject`, and its cure."""
    found = re.findall(rf"^(\w+ +{re.escape(subject)} .*)\n(?: +-> (.*)\n)?", output, re.MULTILINE)
    assert found, output
    return found[-1]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def peer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a prefill engine with two ranks and a secret."""
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv(KV_SECRET.name, SECRET)
        config = engine_config(model_folder(tmp_path_factory.mktemp("model"), 4), 2, "kv_producer")
        engine = Engine(config, 4)
    with running(engine):
        params = prefilled(engine, "p", 20, [1, 2])
        yield f"{params['remote_host']}:{params['remote_port']}"


def test_a_sound_machine_and_a_sound_peer_and_a_taken_port_that_is_no_failure(peer):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        status, output = doctor("--port", str(port), "--peer", peer)
    assert status == 0, output
    assert "FAIL" not in output
    assert finding(output, "CANN")[0].endswith("libascendcl.so")
    assert re.search(r"ok +device +\d+ visible; npu:0 .* computes", output)
    assert re.search(r"ok +environment +a secret is set", output)
    assert re.search(r"ok +loopback +16777216 bytes read and compared", output)
    assert "serves recall (LlamaForCausalLM, 3 layers) with TP 2, PP 1, DP 1" in output
    # 16 tokens, K and V, 2 heads of 16 elements of 2 bytes.
    for rank in ("rank 0", "rank 1"):
        assert re.search(rf"ok +{rank} +2048 bytes read from 127.0.0.1:\d+", output)
    found, cure = finding(output, "port")
    assert found.startswith("warn")
    assert f"port {port} on 127.0.0.1 is taken" in found
    assert "kv_port" in cure
    assert output.endswith("0 problems found\n")
    assert SECRET not in output


def test_a_peer_with_another_secret_and_a_device_that_is_not_there(peer):
    status, output = doctor("--port", "0", "--device", "99", "--peer", peer, VLLM_ASCEND_KV_SECRET=None)
    assert status == 1
    assert output.endswith("2 problems found\n")
    assert finding(output, "environment")[0].startswith("warn")
    found, cure = finding(output, "peer")
    assert "broke off the handshake" in found
    assert cure == "set the same VLLM_ASCEND_KV_SECRET for both"
    found, cure = finding(output, "device")
    assert "so there is no npu:99" in found
    assert "ASCEND_RT_VISIBLE_DEVICES" in cure


def test_nobody_at_the_peers_address_and_a_variable_with_a_typo():
    port = free_port()
    address = f"127.0.0.1:{port}"
    status, output = doctor("--port", "0", "--peer", address, VLLM_ASCEND_KV_SECRETS="x")
    assert status == 1
    assert output.endswith("2 problems found\n")
    found, cure = finding(output, "peer")
    assert found.endswith(f"prefill engine at {address} did not answer within 5 s")
    assert cure.startswith("start it, or set kv_connector_extra_config.host")
    assert "is not a variable of vllm-ascend" in finding(output, "environment")[0]


def test_no_runtime_and_a_short_secret():
    status, output = doctor("--port", "0", LD_LIBRARY_PATH=None, VLLM_ASCEND_KV_SECRET="hunter2")
    assert status == 1
    assert output.endswith("2 problems found\n")
    found, cure = finding(output, "CANN")
    assert "libascendcl.so: cannot open shared object file" in found
    assert "source set_env.sh of CANN" in cure
    # The transfer engine is tried all the same.
    assert re.search(r"ok +memory +16 MiB of main memory registered", output)
    found, cure = finding(output, "environment")
    assert "at least 16 characters" in found
    assert "openssl" in cure
    assert "hunter2" not in output


def test_a_library_that_mooncake_links_is_missing(tmp_path: Path):
    # What the loader finds first is no library.
    (tmp_path / "libibverbs.so.1").touch()
    path = f"{tmp_path}:{os.environ['LD_LIBRARY_PATH']}"
    status, output = doctor("--port", "0", LD_LIBRARY_PATH=path)
    assert status == 1
    found, cure = finding(output, "transfer")
    assert "libibverbs.so.1" in found
    assert "apt-get install libibverbs1" in cure


def test_an_address_that_is_none_is_refused_with_an_example(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as ended:
        main(["--peer", "prefill"])
    assert ended.value.code == 2
    assert "is not HOST:PORT, such as 10.0.0.5:14579" in capsys.readouterr().err
