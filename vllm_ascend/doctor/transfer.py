# SPDX-License-Identifier: Apache-2.0
"""The transfer engine, ports, registered memory, and a peer."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from vllm_ascend.doctor.findings import Finding, fail, from_sentence, ok, warn
from vllm_ascend.envs import check_all
from vllm_ascend.errors import ConfigError, KVTransferError, WireError
from vllm_ascend.kv_transfer.handshake import Channel, Listener
from vllm_ascend.kv_transfer.messages import AskForEngine, Engine, RankRegions, Released
from vllm_ascend.kv_transfer.mooncake import MooncakeTransport
from vllm_ascend.kv_transfer.transport import Address, Copies, Region, Session
from vllm_ascend.kv_transfer.trust import Trust, shared_secret, trust_of

_PEER_TIMEOUT_S = 5.0
_BUFFER_BYTES = 16 * 2**20


@dataclass(frozen=True)
class Here:
    """How this machine takes part."""

    host: str
    port: int
    protocol: str
    device: int | None
    """The NPU whose memory is registered; None: main memory, since there is no device."""


def environment() -> Finding:
    """VLLM_ASCEND_* variables, and whether there is a secret."""
    try:
        check_all()
        secret = shared_secret()
    except ConfigError as error:
        return from_sentence("environment", error)
    if secret is None:
        return warn(
            "environment",
            "no secret is set: whoever reaches a KV listener is answered",
            "set the same VLLM_ASCEND_KV_SECRET for engines that exchange KV; openssl rand -hex 32 makes one",
        )
    return ok("environment", "a secret is set")


def port(here: Here) -> Finding:
    """Whether a listener could be bound."""
    try:
        with Listener(here.host, here.port, lambda _: Released()) as listener:
            return ok("port", f"{here.host}:{listener.port} is free for a KV listener")
    except ConfigError as error:
        wrong = from_sentence("port", error)
        # Taken by an engine that runs, it is as it should be.
        return warn(wrong.subject, wrong.found, wrong.cure)


def memory(here: Here) -> Iterator[Finding]:
    """Register device memory, and read it back through two transfer engines of this process."""
    try:
        with _transport(here) as giver, _transport(here) as taker:
            yield ok("Mooncake", f"starts with protocol {here.protocol} at {giver.session}")
            source, target = _Buffer(here.device), _Buffer(here.device)
            source.fill(7)
            giver.register([source.region])
            taker.register([target.region])
            where = "main memory" if here.device is None else f"memory of npu:{here.device}"
            yield ok("memory", f"{_BUFFER_BYTES >> 20} MiB of {where} registered, twice")
            seconds = _read(taker, giver.session, source.region.address, target, _BUFFER_BYTES)
            yield _compared("loopback", target.all_are(7), _BUFFER_BYTES, seconds)
    except (ConfigError, KVTransferError) as error:
        yield from_sentence("transfer", error)


def peer(here: Here, host: str, port: int) -> Iterator[Finding]:
    """Ask a prefill engine who it is, and read a page from each of its ranks."""
    try:
        trust = trust_of(())
        description = _ask(host, port, trust)
    except (ConfigError, KVTransferError) as error:
        yield from_sentence("peer", error)
        return
    sizes, cache = description.parallel, description.cache
    yield ok(
        "peer",
        f"{description.engine_id} serves {cache.model} ({cache.architecture}, {cache.num_layers} layers) "
        f"with TP {sizes.tp_size}, PP {sizes.pp_size}, DP {sizes.dp_size}, protocol "
        f"{description.protocol}, blocks of {description.blocks.block_size} tokens, "
        f"{'verifies' if description.verifies else 'does not verify'}",
    )
    if description.protocol != here.protocol:
        yield warn(
            "protocol",
            f"the peer transfers by {description.protocol} and this machine by {here.protocol}",
            f"set protocol to {description.protocol!r} here, or {here.protocol!r} there, in "
            f"kv_connector_extra_config; --protocol {description.protocol} tries it now",
        )
        return
    for rank in description.ranks:
        yield _read_from(here, rank)


def _read_from(here: Here, rank: RankRegions) -> Finding:
    subject = f"rank {rank.pp_rank}.{rank.tp_rank}" if rank.pp_rank else f"rank {rank.tp_rank}"
    stack = rank.stacks[0]
    # Block 0 is vLLM's null block: it holds nobody's prompt.
    num_bytes = min(stack.page_bytes, _BUFFER_BYTES)
    try:
        with _transport(here) as transport:
            target = _Buffer(here.device)
            transport.register([target.region])
            seconds = _read(transport, Session(rank.session), Address(stack.addresses[0]), target, num_bytes)
    except (ConfigError, KVTransferError) as error:
        return fail(
            subject,
            str(error),
            f"let {rank.session} through firewalls, and set VLLM_HOST_IP there to an address that this "
            f"machine reaches",
        )
    return ok(subject, f"{num_bytes} bytes read from {rank.session} in {seconds * 1000:.1f} ms")


def _ask(host: str, port: int, trust: Trust) -> Engine:
    channel = Channel(host, port, _PEER_TIMEOUT_S, trust)
    try:
        answer = channel.ask(AskForEngine())
    finally:
        channel.close()
    if not isinstance(answer, Engine):
        raise WireError(f"{host}:{port} answered who it is with {answer}; name a prefill engine's listener")
    return answer


def _read(
    transport: MooncakeTransport, session: Session, remote: Address, target: _Buffer, num_bytes: int
) -> float:
    """Seconds that one read took."""
    started_s = time.monotonic()
    ranges = (np.array([value], dtype=np.int64) for value in (remote, target.region.address, num_bytes))
    transport.read(session, Copies(*ranges))
    return time.monotonic() - started_s


def _compared(subject: str, equal: bool, num_bytes: int, seconds: float) -> Finding:
    if not equal:
        return from_sentence(
            subject,
            "the transfer engine reported success and the bytes differ; report it with this output",
        )
    return ok(subject, f"{num_bytes} bytes read and compared, {num_bytes / seconds / 1e9:.2f} GB/s")


@contextmanager
def _transport(here: Here) -> Iterator[MooncakeTransport]:
    transport = MooncakeTransport(here.host, here.protocol)
    try:
        yield transport
    finally:
        transport.close()


class _Buffer:
    """Memory to register: of a device, or main memory where there is none."""

    def __init__(self, device: int | None) -> None:
        if device is None:
            self._bytes: Any = np.zeros(_BUFFER_BYTES, dtype=np.uint8)  # Any: or a tensor, of another library
            address = self._bytes.ctypes.data
        else:
            import torch

            self._bytes = torch.zeros(_BUFFER_BYTES, dtype=torch.uint8, device=f"npu:{device}")
            address = self._bytes.data_ptr()
        self.region = Region(Address(address), _BUFFER_BYTES)

    def fill(self, value: int) -> None:
        self._bytes[:] = value
        # Waits for the device: the transfer engine reads past its stream.
        assert self.all_are(value)

    def all_are(self, value: int) -> bool:
        return bool((self._bytes == value).all())
