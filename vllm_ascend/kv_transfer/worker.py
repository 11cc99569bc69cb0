# SPDX-License-Identifier: Apache-2.0
"""Worker half: registers this rank's KV cache, reads other engines' and tells what came of it.

The engine's thread starts pulls and takes results in each step. A reader thread carries one pull from the
question who the peer is, through its `Reading`, to the word that it is done, and asks whether the lease held.
A load that grows comes as several pulls, in `Parts`. It ends as `Loaded` or as `NotLoaded`, never as the
first for the second. What was not loaded is told only when its blocks can be written no more, since vLLM then
gives them to others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from vllm.logger import init_logger

from vllm_ascend.errors import (
    KVTransferError,
    LeaseEnded,
    PeerUnreachable,
    ReadUnsettled,
    TopologyError,
    WireError,
)
from vllm_ascend.kv_transfer.blocks import (
    NULL_BLOCK,
    tokens_seen,
)
from vllm_ascend.kv_transfer.checksum import UNIT_TOKENS, layer_sums, state_sums, units_of
from vllm_ascend.kv_transfer.config import Options
from vllm_ascend.kv_transfer.handshake import Lines
from vllm_ascend.kv_transfer.local import LocalCache, Stack, blocks_of
from vllm_ascend.kv_transfer.messages import (
    AskForEngine,
    Done,
    DoneNoted,
    Engine,
    RemotePrefill,
)
from vllm_ascend.kv_transfer.metrics import TransferNumbers
from vllm_ascend.kv_transfer.orders import GiveUp, Pull, ToSum
from vllm_ascend.kv_transfer.pairing import PrefillEngine, pair_with
from vllm_ascend.kv_transfer.parts import Parts, Stopped
from vllm_ascend.kv_transfer.peers import Peers
from vllm_ascend.kv_transfer.reader import ReaderPool, SideBySide, Stopwatch
from vllm_ascend.kv_transfer.reading import Reading
from vllm_ascend.kv_transfer.regroup import Fence, Regroup
from vllm_ascend.kv_transfer.staged import Staging
from vllm_ascend.kv_transfer.sums import LayerSums
from vllm_ascend.kv_transfer.topology import Span
from vllm_ascend.kv_transfer.transport import Transport
from vllm_ascend.kv_transfer.trust import Trust
from vllm_ascend.kv_transfer.verify import PeerSums

logger = init_logger(f"vllm.{__name__}")

_HELPERS_PER_READER = 4
"""Threads for the second and further sources of requests, for each that reads a request."""


@dataclass(frozen=True)
class Loaded:
    """The request's KV is in its blocks, at this rank."""

    request_id: str
    numbers: TransferNumbers


@dataclass(frozen=True)
class NotLoaded:
    """The request's blocks hold anything."""

    request_id: str
    reason: str
    kind: str | None
    """One of metrics.FAILURES; None: it is no failure, since nobody wants them any more."""
    settled: Callable[[], bool]
    """Whether nothing writes them any more."""


@dataclass(frozen=True)
class _Part:
    """A pull, the work before which its blocks are in use, and the time since it was asked for."""

    pull: Pull
    fence: Fence
    clock: Stopwatch


@dataclass
class _Load:
    """One request's load."""

    parts: Parts[_Part]
    _numbers: TransferNumbers | None = None
    """What the parts cost that were read. Its reader's alone."""

    @property
    def numbers(self) -> TransferNumbers:
        assert self._numbers is not None, "nothing was read yet"
        return self._numbers

    def add(self, numbers: TransferNumbers, pull: Pull) -> None:
        """`pull` was read, and cost `numbers`."""
        begins_anew = pull.first_token == pull.load_start
        self._numbers = numbers if self._numbers is None else self._numbers.then(numbers, begins_anew)


class WorkerHalf:
    """One rank's worker half, from the registration of its cache on."""

    def __init__(
        self,
        local: LocalCache,
        transport: Transport,
        regroups: Sequence[Regroup],
        protocol: str,
        options: Options,
        trust: Trust,
    ) -> None:
        """Register the cache; `regroups`: one for each of its stacks. Raises ConfigError if it cannot."""
        self._local = local
        self._transport = transport
        self._protocol = protocol
        self._options = options
        self._regroups = regroups
        self._trust = trust
        self._lines = Lines(options.peer_timeout_s, trust)
        self._engines: Peers[PrefillEngine] = Peers()
        self._growing: dict[str, _Load] = {}
        self._given_up: list[NotLoaded] = []
        self._unsettled: list[NotLoaded] = []
        of_tokens = [stack for stack in local.stacks if not stack.is_state]
        # Head-major, there are no heads to put side by side.
        token_major = all(stack.memory.page.apart is None for stack in of_tokens)
        transport.register(local.regions())
        staging = Staging(options, [stack.tensors for stack in of_tokens], token_major, transport.register)
        enter_thread = self._regroups[0].enter_thread
        self._readers: ReaderPool[Loaded | NotLoaded] = ReaderPool(options.reader_threads, enter_thread)
        self._sources = SideBySide(transport, _HELPERS_PER_READER * options.reader_threads, enter_thread)
        peer_sums = PeerSums(self._lines, options.peer_timeout_s) if options.verify else None
        self._reading = Reading(local, regroups, self._sources, staging, peer_sums)

    def start(self, pulls: Sequence[Pull], given_up: Sequence[GiveUp] = ()) -> None:
        """Hand `pulls` to the readers, to begin when the work now on this thread's stream is done.

        Of loads that are `given_up` no other part will come.
        """
        for one in given_up:
            self._give_up(one)
        if not pulls:
            return
        fence = self._regroups[0].fence()
        for pull in pulls:
            # One load's parts are read one after the other; the record of it ends with the last of them.
            load = self._growing.pop(pull.request_id, None) or _Load(Parts())
            if not pull.is_last:
                self._growing[pull.request_id] = load
            if load.parts.add(_Part(pull, fence, Stopwatch.started())):
                self._begin(load, pull)

    def sum_up(self, to_sum: ToSum) -> tuple[LayerSums, ...]:
        """This rank's checksums of a finished request, for decode to check what it reads."""
        return tuple(
            found
            for stack in self._local.stacks
            for found in (self._sum_state if stack.is_state else self._sum_stack)(stack, to_sum)
        )

    def take_results(self) -> list[Loaded | NotLoaded]:
        """What has come of pulls since the last call, and whose blocks can be written no more."""
        results = [*self._readers.take_finished(), *self._given_up]
        self._given_up.clear()
        for result in results:
            if isinstance(result, NotLoaded) and result.kind is not None:
                logger.warning("KV of request %s was not loaded: %s", result.request_id, result.reason)
        ended: list[Loaded | NotLoaded] = []
        waiting, self._unsettled = self._unsettled, []
        for result in [*waiting, *results]:
            if isinstance(result, NotLoaded) and not result.settled():
                self._unsettled.append(result)
            else:
                ended.append(result)
        return ended

    def close(self) -> None:
        """Wait for running reads, hang up, withdraw the cache. May be called twice."""
        self._readers.close()
        self._sources.close()
        self._lines.close()
        self._transport.close()

    def _sum_stack(self, stack: Stack, to_sum: ToSum) -> Iterator[LayerSums]:
        tokens = tokens_seen(Span(0, to_sum.tokens), self._local.description.windows[stack.group])
        units = units_of(tokens)
        blocks = blocks_of(to_sum.blocks[stack.group], self._local.blocks)
        slots = blocks.slots(np.arange(units.start * UNIT_TOKENS, tokens.stop, dtype=np.int64))
        for name, layer in zip(stack.memory.layers, stack.tensors, strict=True):
            sums = layer_sums(layer, stack.memory.page, slots)
            yield LayerSums(self._local.rank.place, name, units.start, sums)

    def _sum_state(self, stack: Stack, to_sum: ToSum) -> Iterator[LayerSums]:
        (block,) = to_sum.blocks[stack.group]
        if block == NULL_BLOCK:
            return
        for name, layer in zip(stack.memory.layers, stack.tensors, strict=True):
            yield LayerSums(self._local.rank.place, name, 0, state_sums(layer, block))

    def _give_up(self, given_up: GiveUp) -> None:
        load = self._growing.pop(given_up.request_id, None) or _Load(Parts())
        if load.parts.stop(Stopped(given_up.reason, given_up.kind)):
            self._given_up.append(NotLoaded(given_up.request_id, given_up.reason, given_up.kind, _settled))

    def _begin(self, load: _Load, pull: Pull) -> None:
        """Have a reader take the load's parts, `pull` first, once the peer is met."""
        submit = partial(self._submit_load, load, pull)
        if self._engines.when_met(pull.remote.peer, submit):
            meet = partial(self._engines.meet, pull.remote.peer, partial(self._meet, pull.remote))
            self._readers.submit(meet, peer=_peer_of(pull.remote))

    def _submit_load(self, load: _Load, pull: Pull, engine: PrefillEngine | KVTransferError) -> None:
        read = partial(self._load, pull.request_id, load, engine)
        self._readers.submit(read, _peer_of(pull.remote), size=pull.tokens)

    # From here on: reader threads.

    def _load(
        self, request_id: str, load: _Load, engine: PrefillEngine | KVTransferError
    ) -> Loaded | NotLoaded | None:
        """Read the parts that wait. Returns what came of the load; None: other parts will come."""
        while (part := load.parts.take()) is not None:
            outcome: Loaded | NotLoaded | None
            if isinstance(part, Stopped):
                outcome = NotLoaded(request_id, part.reason, part.kind, _settled)
            else:
                outcome = self._load_part(part, load, engine)
            if outcome is not None:
                load.parts.end()
                return outcome
        return None

    def _load_part(
        self, part: _Part, load: _Load, engine: PrefillEngine | KVTransferError
    ) -> Loaded | NotLoaded | None:
        pull = part.pull
        outcome: Loaded | NotLoaded
        try:
            if isinstance(engine, KVTransferError):
                raise engine
            load.add(self._reading.run(pull, engine, part.fence, part.clock), pull)
            outcome = Loaded(pull.request_id, load.numbers)
        except PeerUnreachable as error:
            # It cannot be told either, and asking again would keep this thread from other peers.
            return _not_loaded(pull, error)
        except KVTransferError as error:
            outcome = _not_loaded(pull, error)
        if not pull.is_last:
            return None if isinstance(outcome, Loaded) else outcome
        # Said after a failure, too: this rank reads no more, and prefill need not hold the blocks for it.
        try:
            held = self._say_done(pull)
        except KVTransferError as error:
            return _not_loaded(pull, error) if isinstance(outcome, Loaded) else outcome
        if isinstance(outcome, Loaded) and not held:
            engine_id = pull.remote.remote_engine_id
            ended = f"its lease at prefill engine {engine_id} ended before the read did; raise lease_s there"
            return _not_loaded(pull, LeaseEnded(ended))
        return outcome

    def _say_done(self, pull: Pull) -> bool:
        """Tell prefill that this rank reads no more. Returns whether its lease held until now."""
        rank, remote = self._local.rank, pull.remote
        done = Done(
            engine_id=remote.remote_engine_id,
            request_id=remote.remote_request_id,
            # A router may send one prefill's answer twice: the second read must not pass for the first.
            reader=f"{rank.reader}/{pull.request_id}",
            num_readers=rank.num_readers,
        )
        answer = self._lines.ask(remote.remote_host, remote.remote_port, done)
        if not isinstance(answer, DoneNoted):
            raise WireError(f"prefill engine {remote.remote_engine_id} answered {done} with {answer}")
        return answer.held

    def _meet(self, remote: RemotePrefill) -> PrefillEngine:
        peer = self._lines.ask(remote.remote_host, remote.remote_port, AskForEngine())
        if not isinstance(peer, Engine):
            raise WireError(f"{remote.remote_host}:{remote.remote_port} answered who it is with {peer}")
        if peer.engine_id != remote.remote_engine_id:
            raise TopologyError(
                f"the prefill engine at {remote.remote_host}:{remote.remote_port} is {peer.engine_id}, which "
                f"replaced {remote.remote_engine_id} and its KV; send the prompt again"
            )
        for rank in peer.ranks:
            self._trust.check_host(rank.session.rpartition(":")[0])
        if self._options.verify and not peer.verifies:
            raise TopologyError(
                f"this engine verifies and prefill engine {peer.engine_id} does not; set verify in "
                f"kv_connector_extra_config of both or none"
            )
        engine = pair_with(peer, self._local, self._protocol, self._options)
        self._reading.prepare(engine)
        sizes = peer.parallel
        logger.info(
            "prefill engine %s joined: tp=%d, pp=%d, dp=%d",
            peer.engine_id,
            sizes.tp_size,
            sizes.pp_size,
            sizes.dp_size,
        )
        return engine


def _not_loaded(pull: Pull, error: KVTransferError) -> NotLoaded:
    settled = error.settled if isinstance(error, ReadUnsettled) else _settled
    return NotLoaded(pull.request_id, str(error), error.kind, settled)


def _peer_of(remote: RemotePrefill) -> tuple[str, int]:
    return remote.remote_host, remote.remote_port


def _settled() -> bool:
    return True
