# SPDX-License-Identifier: Apache-2.0
"""From a secret to keys, and from listed networks to who may be a peer."""

from __future__ import annotations

import ipaddress
import subprocess
import sys
from pathlib import Path

import pytest
from zmq.utils import z85

from vllm_ascend.envs import KV_SECRET, KV_SECRET_FILE
from vllm_ascend.errors import ConfigError, PeerNotAdmitted
from vllm_ascend.kv_transfer.trust import OPEN, Trust, derive_keys, shared_secret, trust_of

SECRET = "correct horse battery staple"


@pytest.fixture(autouse=True)
def _no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(KV_SECRET.name, raising=False)
    monkeypatch.delenv(KV_SECRET_FILE.name, raising=False)


def test_keys_are_those_of_scrypt_and_curve25519():
    # Found with the package `cryptography` (Scrypt, X25519PrivateKey). Other keys need another wire version.
    keys = derive_keys(SECRET)
    assert z85.decode(keys.listener.private).hex() == (
        "f4c448031092188f3822e1242b2ebd2cc63be09e5de7fb25d5c97811f2781a07"
    )
    assert z85.decode(keys.listener.public).hex() == (
        "160908477c9b27eb27e7c64c859ca2a6ea4141e789cb2ab76b82cc383da07a2b"
    )
    assert z85.decode(keys.caller.private).hex() == (
        "8fa9fdd10cf90d8f9465e987207e7488dfb8527661e215e3137db72fa762dfa1"
    )
    assert z85.decode(keys.caller.public).hex() == (
        "beb95d2bba93fd35eada7a2a87d8931f9cc642c511be05f50367370bc71f0877"
    )


def test_no_private_key_is_ever_shown():
    keys = derive_keys(SECRET)
    shown = repr(Trust(keys))
    assert keys.listener.private.decode() not in shown
    assert keys.caller.private.decode() not in shown


def test_a_secret_comes_from_the_environment_or_a_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    assert shared_secret() is None
    assert trust_of(()) == OPEN
    file = tmp_path / "secret"
    file.write_text(f"{SECRET}\n")
    monkeypatch.setenv(KV_SECRET_FILE.name, str(file))
    assert shared_secret() == SECRET
    monkeypatch.setenv(KV_SECRET.name, SECRET)
    with pytest.raises(ConfigError, match="are both set; unset one"):
        shared_secret()


def test_a_short_secret_is_refused_and_not_shown(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(KV_SECRET.name, "hunter2")
    with pytest.raises(ConfigError, match="at least 16 characters and this one 7; make one with") as error:
        shared_secret()
    assert "hunter2" not in str(error.value)


def test_a_file_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(KV_SECRET_FILE.name, "/nowhere/secret")
    with pytest.raises(ConfigError, match=r"/nowhere/secret.*cannot be read \(No such file"):
        shared_secret()


def test_another_secret_gives_other_keys_in_every_process():
    code = f"from vllm_ascend.kv_transfer import trust; print(trust.derive_keys({SECRET!r}).listener.public)"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert shown.strip() == repr(derive_keys(SECRET).listener.public)
    assert derive_keys(SECRET + "r").listener.public != derive_keys(SECRET).listener.public


@pytest.mark.parametrize(
    ("address", "admitted"),
    [
        pytest.param("10.1.2.3", True, id="in the first network"),
        pytest.param("10.2.2.3", False, id="beside it"),
        pytest.param("fd00::7", True, id="in the second"),
        pytest.param("[fd00::7]", True, id="in brackets"),
        pytest.param("prefill.example", False, id="a name may change its meaning"),
        pytest.param("10.66051", False, id="a spelling that only the system understands"),
        pytest.param("167838211", False, id="an address as one number"),
        pytest.param("::ffff:10.1.2.3", False, id="one family in the other's clothes"),
        pytest.param("", False, id="nothing"),
    ],
)
def test_who_may_be_a_peer(address: str, admitted: bool):
    trust = Trust(networks=(ipaddress.ip_network("10.1.0.0/16"), ipaddress.ip_network("fd00::/64")))
    assert trust.admits(address) is admitted
    assert OPEN.admits(address)


def test_a_peer_elsewhere_is_refused_with_the_networks():
    trust = Trust(networks=(ipaddress.ip_network("10.1.0.0/16"),))
    with pytest.raises(PeerNotAdmitted, match=r"192\.0\.2\.1 is not an address in peer_networks \(10\.1"):
        trust.check_host("192.0.2.1")
