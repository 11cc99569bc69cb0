# SPDX-License-Identifier: Apache-2.0
"""One pull at one rank: plan, prove, wait until the blocks are idle, read, regroup, verify if asked to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from vllm_ascend.errors import ReadFailed
from vllm_ascend.kv_transfer.blocks import (
    Runs,
    neighbours,
    positions_of,
    runs_of,
    tokens_from,
    tokens_seen,
)
from vllm_ascend.kv_transfer.checksum import Summer
from vllm_ascend.kv_transfer.cover import prove_cover
from vllm_ascend.kv_transfer.local import LocalCache, Stack, blocks_of
from vllm_ascend.kv_transfer.messages import BlockSizes
from vllm_ascend.kv_transfer.metrics import TransferNumbers
from vllm_ascend.kv_transfer.orders import Pull
from vllm_ascend.kv_transfer.pairing import PrefillEngine, StackPlans
from vllm_ascend.kv_transfer.plan import PairPlan, share_positions
from vllm_ascend.kv_transfer.reader import SideBySide, Stopwatch
from vllm_ascend.kv_transfer.regroup import LONGEST_RUN, Fence, Regroup
from vllm_ascend.kv_transfer.staged import StagedRead, Staging
from vllm_ascend.kv_transfer.topology import Span
from vllm_ascend.kv_transfer.transport import Copies
from vllm_ascend.kv_transfer.verify import PeerSums, verify, verify_state


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


class Reading:
    """How this rank reads pulls. Any reader thread may `run` one."""

    def __init__(
        self,
        local: LocalCache,
        regroups: Sequence[Regroup],
        sources: SideBySide,
        staging: Staging,
        peer_sums: PeerSums | None,
    ) -> None:
        """`regroups`: one for each stack of the cache. `peer_sums`: where to ask for checksums, to verify."""
        self._local = local
        self._regroups = regroups
        self._sources = sources
        self._staging = staging
        self._peer_sums = peer_sums
        self._summer = Summer(local.stacks[0].tensors[0].device)
        self._of_tokens = [stack for stack in local.stacks if not stack.is_state]

    def prepare(self, engine: PrefillEngine) -> None:
        """Have what reading `engine` needs. Raises TopologyError if it cannot be had."""
        for stack, plans in zip(self._local.stacks, engine.stacks, strict=True):
            for plan in plans.plans:
                if plan.converts:
                    self._staging.prepare(self._of_tokens.index(stack), plan)

    def run(self, pull: Pull, engine: PrefillEngine, fence: Fence, clock: Stopwatch) -> TransferNumbers:
        """Read once `fence` is passed. Returns what it cost. Raises KVTransferError.

        Checksums are those of whole requests: with the last part the whole load is verified, and only then
        converted, since they are of what prefill has.
        """
        tokens = self._seen(tokens_from(pull.first_token, pull.tokens))
        num_blocks = self._check_blocks(pull, tokens)
        reads = self._plan(pull, engine, tokens)
        copies = [part for read in reads for part in read.copies]
        fence.wait()
        queue_ms = clock.lap_ms()
        self._sources.read_all([(engine.sessions[rank], part) for rank, part in copies])
        transfer_ms = clock.lap_ms()
        staged = [
            read.staged.run(self._sources.begin, engine.sessions) for read in reads if read.staged is not None
        ]
        clock.lap_ms()
        for read in reads:
            read.regroup_heads()
        regroup_ms = clock.lap_ms()
        to_convert = reads
        if self._peer_sums is not None:
            to_convert = self._whole_load(pull, engine, reads) if pull.is_last else []
            self._verify(self._peer_sums, pull, to_convert)
            clock.lap_ms()
        for read in to_convert:
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

    def _seen(self, tokens: Span) -> list[Span]:
        """Of `tokens`, those that are wanted of each KV cache group."""
        return [tokens_seen(tokens, window) for window in self._local.description.windows]

    def _whole_load(self, pull: Pull, engine: PrefillEngine, reads: list[_StackRead]) -> list[_StackRead]:
        """What all parts have read together; `reads` are those of the last."""
        if pull.first_token == pull.load_start:
            return reads
        return self._plan(pull, engine, self._seen(Span(pull.load_start, pull.first_token + pull.tokens)))

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
        remote = blocks_of(pull.remote.remote_block_ids[stack.group], there)
        local = blocks_of(pull.local_blocks[stack.group], self._local.blocks)
        for blocks, whose in ((remote, "the prefill engine"), (local, "this engine")):
            if blocks.num_tokens < tokens.stop:
                raise ReadFailed(
                    f"{len(blocks.ids)} blocks of {blocks.block_size} tokens, which {whose} names, cannot "
                    f"hold {tokens.stop} tokens"
                )
        if self._staging.takes(plan):
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

    def _verify(self, peer_sums: PeerSums, pull: Pull, reads: Sequence[_StackRead]) -> None:
        """Raise ReadFailed unless every stack holds what the prefill engine computed, in its element type."""
        for read in reads:
            ask = partial(peer_sums.of, pull.remote, read.tokens)
            if read.stack.is_state:
                (block,) = pull.local_blocks[read.stack.group]
                verify_state(read.plan, read.stack.tensors, block, self._summer, ask)
                continue
            blocks = blocks_of(pull.local_blocks[read.stack.group], self._local.blocks)
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
