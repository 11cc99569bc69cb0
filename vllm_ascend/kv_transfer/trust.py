# SPDX-License-Identifier: Apache-2.0
"""Whom an engine talks to: those who share its secret, in the networks that it lists.

With a secret, every line between engines is encrypted and authenticated both ways by ZMQ's CURVE (RFC 26):
the listener proves that it knows the secret, and so does whoever calls. Both key pairs are derived from the
secret, so there is one thing to hand out and nothing to exchange.

The first message of CURVE lets whoever records it try secrets at leisure. So keys are derived by scrypt
(RFC 7914), which makes every try cost 32 MiB and some 0.1 s, and secrets are long. Its salt is fixed, since
two engines must find the same keys before they have talked.

`remote_host` comes with a request, through a client's hands. With listed networks a request cannot point
decode at an address elsewhere; names are refused then, since what they stand for can change between a check
and its use.
"""

from __future__ import annotations

import functools
import hashlib
import ipaddress
from dataclasses import dataclass, field

import zmq
from zmq.utils import z85

from vllm_ascend.envs import KV_SECRET, KV_SECRET_FILE
from vllm_ascend.errors import ConfigError, PeerNotAdmitted

Network = ipaddress.IPv4Network | ipaddress.IPv6Network

_KEY_BYTES = 32
_SCRYPT_COST = 2**15
_SCRYPT_BLOCKS = 8
_SALT = b"vllm-ascend-kv: listener key, caller key; 1"


@dataclass(frozen=True)
class KeyPair:
    """A CURVE key pair, both keys in Z85 text."""

    public: bytes
    private: bytes = field(repr=False)


@dataclass(frozen=True)
class Keys:
    """Both ends of every line between engines that share a secret."""

    listener: KeyPair
    caller: KeyPair


@dataclass(frozen=True)
class Trust:
    """Whom to listen to and whom to call. The default: anyone, in clear."""

    keys: Keys | None = None
    networks: tuple[Network, ...] = ()
    """Where peers may be; none listed: anywhere."""

    def admits(self, address: str) -> bool:
        """Whether a peer may be at `address`, an IP address in text; brackets of IPv6 may stand."""
        if not self.networks:
            return True
        try:
            found = ipaddress.ip_address(address.strip("[]"))
        except ValueError:
            return False
        return any(found in network for network in self.networks)

    def check_host(self, host: str) -> None:
        """Raise PeerNotAdmitted, naming the listed networks, unless a peer may be at `host`."""
        if not self.admits(host):
            raise PeerNotAdmitted(
                f"{host} is not an address in peer_networks ({', '.join(map(str, self.networks))}); list its "
                f"network in kv_connector_extra_config, or set host there to an address that is listed"
            )

    def lock_listener(self, socket: zmq.Socket[bytes]) -> None:
        """Let `socket`, not yet bound, take only lines of callers that know the secret."""
        # Without a domain ZMQ does not ask the handler about lines in clear.
        socket.setsockopt(zmq.ZAP_DOMAIN, b"vllm-ascend-kv")
        if self.keys is not None:
            socket.setsockopt(zmq.CURVE_SERVER, 1)
            socket.setsockopt(zmq.CURVE_PUBLICKEY, self.keys.listener.public)
            socket.setsockopt(zmq.CURVE_SECRETKEY, self.keys.listener.private)

    def lock_caller(self, socket: zmq.Socket[bytes]) -> None:
        """Let `socket`, not yet connected, talk only to a listener that knows the secret."""
        if self.keys is not None:
            socket.setsockopt(zmq.CURVE_SERVERKEY, self.keys.listener.public)
            socket.setsockopt(zmq.CURVE_PUBLICKEY, self.keys.caller.public)
            socket.setsockopt(zmq.CURVE_SECRETKEY, self.keys.caller.private)


OPEN = Trust()
"""Anyone, anywhere, in clear."""


def trust_of(networks: tuple[Network, ...]) -> Trust:
    """What the environment's secret, if any, and the option `peer_networks` say. Raises ConfigError."""
    secret = shared_secret()
    return Trust(None if secret is None else derive_keys(secret), networks)


def shared_secret() -> str | None:
    """The secret that the environment gives. Raises ConfigError if it gives two, or an unusable one."""
    secret, from_file = KV_SECRET.get(), KV_SECRET_FILE.get()
    if secret is not None and from_file is not None:
        raise ConfigError(f"{KV_SECRET.name} and {KV_SECRET_FILE.name} are both set; unset one")
    return secret if secret is not None else from_file


@functools.lru_cache(maxsize=8)
def derive_keys(secret: str) -> Keys:
    """The keys of all engines that share `secret`."""
    material = hashlib.scrypt(
        secret.encode(),
        salt=_SALT,
        n=_SCRYPT_COST,
        r=_SCRYPT_BLOCKS,
        p=1,
        # What these costs need, 128 * n * r, and some room for OpenSSL's own.
        maxmem=2 * 128 * _SCRYPT_COST * _SCRYPT_BLOCKS,
        dklen=2 * _KEY_BYTES,
    )
    return Keys(_key_pair(material[:_KEY_BYTES]), _key_pair(material[_KEY_BYTES:]))


def _key_pair(private: bytes) -> KeyPair:
    # Any 32 bytes are a private key of Curve25519; its bits are clamped where it is used.
    text = z85.encode(private)
    return KeyPair(zmq.curve_public(text), text)
