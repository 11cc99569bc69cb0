# SPDX-License-Identifier: Apache-2.0
"""Worker half: registers this rank's KV cache, reads other engines' and tells what came of it.

The engine's thread starts pulls and takes results in each step. A reader thread carries one pull from the
question who the peer is to the word that it is done: plan, prove, wait until the blocks are idle, read,
regroup, verify if asked to, ask whether the lease held. It ends as `Loaded` or as `NotLoaded`, never as the
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
    ReadFailed,
    ReadUnsettled,
    TopologyError,
    WireError,
)
from vllm_ascend.kv_transfer.blocks import (
    NULL_BLOCK,
    Blocks,
    Runs,
    neighbours,
    positions_of,
    runs_of,
    tokens_from,
    tokens_seen,
)
from vllm_ascend.kv_transfer.checksum import UNIT_TOKENS, Summer, layer_sums, state_sums, units_of
from vllm_ascend.kv_transfer.config import Options
from vllm_ascend.kv_transfer.handshake import Lines
from vllm_ascend.kv_transfer.local import LocalCache, Stack
from vllm_ascend.kv_transfer.messages import (
    AskForEngine,
    BlockSizes,
    Done,
    DoneNoted,
    Engine,
    Pull,
    RemotePrefill,
    ToSum,
)
from vllm_ascend.kv_transfer.metrics import TransferNumbers
from vllm_ascend.kv_transfer.pairing import PrefillEngine, StackPlans, pair_with
from vllm_ascend.kv_transfer.plan import PairPlan, prove_cover, share_positions
from vllm_ascend.kv_transfer.reader import ReaderPool, Stopwatch, read_all
from vllm_ascend.kv_transfer.regroup import LONGEST_RUN, Fence, Regroup
from vllm_ascend.kv_transfer.staged import StagedRead, staging_of
from vllm_ascend.kv_transfer.sums import LayerSums
from vllm_ascend.kv_transfer.topology import Span
from vllm_ascend.kv_transfer.transport import Copies, Transport
from vllm_ascend.kv_transfer.trust import Trust
from vllm_ascend.kv_transfer.verify import PeerSums, verify, verify_state

logger = init_logger(f"vllm.{__name__}")


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
    kind: str
    """One of metrics.FAILURES."""
    settled: Callable[[], bool]
    """Whether nothing writes them any more."""


@dataclass(frozen=True)
class _StackRead:
    """What a pull reads of one stack's layers."""

    stack: Stack
    tokens: Span
    regroup: Regroup
    plan: PairPlan
    runs: Runs
    copies: list[tuple[int, Copies]]
    """For each source, its prefill rank and the ranges."""
    convert_from: str | None
    staged: StagedRead | None = None
    """What of it goes through staging memory, besides `copies`."""

    @property
    def is_raw(self) -> bool:
        """Whether something is left to do when the bytes are here."""
        return self._is_in_shares or self.convert_from is not None

    @property
    def prefill_ranks(self) -> set[int]:
        """The ranks that are read."""
        return {rank for rank, _ in self.copies} | (self.staged.prefill_ranks if self.staged else set())

    def regroup_heads(self) -> None:
        """Put the heads of several sources side by side."""
        if self._is_in_shares:
            pages = self.runs.in_pages(self.plan.local.page.block_size)
            self.regroup.run(pages.local(), share_positions(pages, self.plan.shares), pages.length)

    def convert(self) -> None:
        """Convert elements of another type. Raises ReadFailed for numbers that this cache cannot hold."""
        if self.convert_from is not None:
            self.regroup.convert(self.plan.local.page, self.runs.local(), self.convert_from)

    @property
    def _is_in_shares(self) -> bool:
        return self.plan.shares > 1 and self.staged is None


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
        self._peer_sums = PeerSums(self._lines, options.peer_timeout_s)
        self._summer = Summer(local.stacks[0].tensors[0].device)
        self._engines: dict[tuple[str, int, str], PrefillEngine] = {}
        self._unsettled: list[NotLoaded] = []
        self._of_tokens = [stack for stack in local.stacks if not stack.is_state]
        self._staging = staging_of(options, [stack.tensors for stack in self._of_tokens])
        transport.register([*local.regions(), *(self._staging.regions if self._staging else ())])
        self._readers: ReaderPool[Loaded | NotLoaded] = ReaderPool(
            options.reader_threads, self._regroups[0].enter_thread
        )

    def start(self, pulls: tuple[Pull, ...]) -> None:
        """Hand `pulls` to the readers, to begin when the work now on this thread's stream is done."""
        if not pulls:
            return
        fence = self._regroups[0].fence()
        for pull in pulls:
            job = partial(self._load, pull, fence, Stopwatch.started())
            self._readers.submit(job, peer=(pull.remote.remote_host, pull.remote.remote_port))

    def sum_up(self, to_sum: ToSum) -> tuple[LayerSums, ...]:
        """This rank's checksums of a finished request, for decode to check what it reads."""
        return tuple(
            found
            for stack in self._local.stacks
            for found in (self._sum_state if stack.is_state else self._sum_stack)(stack, to_sum)
        )

    def take_results(self) -> list[Loaded | NotLoaded]:
        """What has come of pulls since the last call, and whose blocks can be written no more."""
        results = self._readers.take_finished()
        for result in results:
            if isinstance(result, NotLoaded):
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
        self._lines.close()
        self._transport.close()

    def _sum_stack(self, stack: Stack, to_sum: ToSum) -> Iterator[LayerSums]:
        tokens = tokens_seen(Span(0, to_sum.tokens), self._local.description.windows[stack.group])
        units = units_of(tokens)
        blocks = _blocks(to_sum.blocks[stack.group], self._local.blocks)
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

    # From here on: reader threads.

    def _load(self, pull: Pull, fence: Fence, clock: Stopwatch) -> Loaded | NotLoaded:
        outcome: Loaded | NotLoaded
        try:
            outcome = Loaded(pull.request_id, self._read(pull, fence, clock))
        except PeerUnreachable as error:
            # It cannot be told either, and asking again would keep this thread from other peers.
            return _not_loaded(pull, error)
        except KVTransferError as error:
            outcome = _not_loaded(pull, error)
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

    def _read(self, pull: Pull, fence: Fence, clock: Stopwatch) -> TransferNumbers:
        engine = self._engine_of(pull.remote)
        tokens = [
            tokens_seen(tokens_from(pull.first_token, pull.tokens), window)
            for window in self._local.description.windows
        ]
        num_blocks = self._check_blocks(pull, tokens)
        reads = self._plan(pull, engine, tokens)
        copies = [part for read in reads for part in read.copies]
        fence.wait()
        queue_ms = clock.lap_ms()
        read_all(self._transport, [(engine.sessions[rank], part) for rank, part in copies])
        transfer_ms = clock.lap_ms()
        staged = [
            read.staged.run(self._transport, engine.sessions) for read in reads if read.staged is not None
        ]
        clock.lap_ms()
        for read in reads:
            read.regroup_heads()
        regroup_ms = clock.lap_ms()
        if self._options.verify:
            self._verify(pull, reads)
            clock.lap_ms()
        for read in reads:
            read.convert()
        regroup_ms += clock.lap_ms()
        return TransferNumbers(
            prompt_tokens=pull.prompt_tokens,
            tokens=pull.tokens,
            blocks=num_blocks,
            bytes=sum(part.total_bytes for _, part in copies) + sum(part.bytes for part in staged),
            descriptors=sum(len(part) for _, part in copies) + sum(part.descriptors for part in staged),
            sources=tuple(sorted(set().union(*(read.prefill_ranks for read in reads)))),
            queue_ms=queue_ms,
            transfer_ms=transfer_ms + sum(part.transfer_ms for part in staged),
            regroup_ms=(regroup_ms if any(read.is_raw for read in reads) else 0.0)
            + sum(part.regroup_ms for part in staged),
        )

    def _plan(self, pull: Pull, engine: PrefillEngine, tokens: Sequence[Span]) -> list[_StackRead]:
        """The reads of every stack, proved; `tokens` are those wanted of each KV cache group."""
        return [
            self._plan_state(stack, regroup, plans, pull, tokens[stack.group])
            if stack.is_state
            else self._plan_stack(stack, regroup, plans, pull, engine.blocks, tokens[stack.group])
            for stack, regroup, plans in zip(self._local.stacks, self._regroups, engine.stacks, strict=True)
            if len(tokens[stack.group])
        ]

    def _plan_stack(
        self, stack: Stack, regroup: Regroup, plans: StackPlans, pull: Pull, there: BlockSizes, tokens: Span
    ) -> _StackRead:
        plan = plans.next_plan()
        remote = _blocks(pull.remote.remote_block_ids[stack.group], there)
        local = _blocks(pull.local_blocks[stack.group], self._local.blocks)
        for blocks, whose in ((remote, "the prefill engine"), (local, "this engine")):
            if blocks.num_tokens < tokens.stop:
                raise ReadFailed(
                    f"{len(blocks.ids)} blocks of {blocks.block_size} tokens, which {whose} names, cannot "
                    f"hold {tokens.stop} tokens"
                )
        if plan.shares > 1 and self._staging is not None:
            runs = runs_of(tokens, remote, local, plan.local.num_blocks)
            staged = self._staging.read(self._of_tokens.index(stack), plan, runs)
            return _StackRead(stack, tokens, regroup, plan, runs, [], plans.convert_from, staged)
        runs = runs_of(tokens, remote, local, LONGEST_RUN if plan.shares > 1 else plan.local.num_blocks)
        copies = plan.copies(runs)
        prove_cover(plan.local, runs, [part for _, part in copies])
        return _StackRead(stack, tokens, regroup, plan, runs, copies, plans.convert_from)

    def _plan_state(
        self, stack: Stack, regroup: Regroup, plans: StackPlans, pull: Pull, tokens: Span
    ) -> _StackRead:
        """State after the last of `tokens` moves whole, whatever part of the prompt is a prefix hit here."""
        plan = plans.next_plan()
        there, here = (
            np.asarray(blocks[stack.group], dtype=np.int64)
            for blocks in (pull.remote.remote_block_ids, pull.local_blocks)
        )
        runs = neighbours(there, here, size=1, longest=1)
        copies = plan.copies(runs)
        prove_cover(plan.local, runs, [part for _, part in copies])
        return _StackRead(stack, tokens, regroup, plan, runs, copies, plans.convert_from)

    def _verify(self, pull: Pull, reads: Sequence[_StackRead]) -> None:
        """Raise ReadFailed unless every stack holds what the prefill engine computed, in its element type."""
        for read in reads:
            ask = partial(self._peer_sums.of, pull.remote, read.tokens)
            if read.stack.is_state:
                (block,) = pull.local_blocks[read.stack.group]
                verify_state(read.plan, read.stack.tensors, block, self._summer, ask)
                continue
            blocks = _blocks(pull.local_blocks[read.stack.group], self._local.blocks)
            verify(read.plan, read.stack.tensors, blocks, read.tokens, self._summer, ask)

    def _check_blocks(self, pull: Pull, tokens: Sequence[Span]) -> int:
        """How many blocks of this engine are to be written, of all groups.

        Raises ReadFailed if two groups want one: they share memory, and would overwrite each other.
        """
        written: list[int] = []
        for blocks, of_group, keeps in zip(pull.local_blocks, tokens, self._local.keeps, strict=True):
            at = Span(0, 1) if keeps.is_state else positions_of(of_group, self._local.blocks.block_size)
            written.extend(blocks[at.start : at.stop] if len(of_group) else ())
        if len(set(written)) < len(written):
            raise ReadFailed("two KV cache groups were to be read into the same blocks; nothing was read")
        return len(written)

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

    def _engine_of(self, remote: RemotePrefill) -> PrefillEngine:
        key = (remote.remote_host, remote.remote_port, remote.remote_engine_id)
        if key not in self._engines:
            # Two threads may ask at once: their answers are equal, and neither waits for the other.
            self._engines[key] = self._meet(remote)
        return self._engines[key]

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
        engine = pair_with(peer, self._local, self._protocol, self._options.prefill)
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


def _settled() -> bool:
    return True


def _blocks(ids: tuple[int, ...], sizes: BlockSizes) -> Blocks:
    return Blocks(ids, sizes.block_size, sizes.page_size)
