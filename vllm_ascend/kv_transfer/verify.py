# SPDX-License-Identifier: Apache-2.0
"""Whether what decode has in its blocks is what prefill computed: checksums of both sides, compared.

Done after the regroup, for every layer and head that this rank pulled and every unit of tokens. So it sees a
source block that was given away, bytes that changed on the way or after it, heads in the wrong order, and
blocks in the wrong place.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import numpy as np
import torch

from vllm_ascend.errors import PeerUnreachable, ReadDiffers, ReadFailed, WireError
from vllm_ascend.kv_transfer.blocks import Blocks
from vllm_ascend.kv_transfer.checksum import UNIT_TOKENS, Summer, UnitSums, units_of, units_of_state
from vllm_ascend.kv_transfer.handshake import Lines
from vllm_ascend.kv_transfer.messages import AskSums, RemotePrefill, Sums, SumsPending
from vllm_ascend.kv_transfer.plan import PairPlan
from vllm_ascend.kv_transfer.topology import Span

AskSumsOf = Callable[[int, str, Span], UnitSums]
"""The sums [heads, units] that the prefill rank found in the layer, for an interval of units."""

_ASK_AGAIN_S = 0.005


class PeerSums:
    """Asks prefill engines for their sums. For any thread."""

    def __init__(self, lines: Lines, patience_s: float) -> None:
        """`patience_s`: how long to wait for a rank that has not summed yet, since its engine is busy."""
        self._lines = lines
        self._patience_s = patience_s

    def of(self, remote: RemotePrefill, tokens: Span, rank: int, layer: str, units: Span) -> UnitSums:
        """What a rank of the prefill engine found in a layer, [heads, units].

        Raises PeerUnreachable or WireError, and ReadFailed if it did not sum the same `tokens`.
        """
        question = AskSums(
            engine_id=remote.remote_engine_id,
            request_id=remote.remote_request_id,
            rank=rank,
            layer=layer,
            first_unit=units.start,
            num_units=len(units),
        )
        answer = self._wait_for(remote, question)
        if answer.tokens != tokens.stop and (tokens.stop % UNIT_TOKENS or answer.tokens < tokens.stop):
            raise ReadFailed(
                f"prefill engine {remote.remote_engine_id} summed {answer.tokens} tokens and {tokens.stop} "
                f"were read; send the same prompt to both"
            )
        words, rest = divmod(len(answer.sums), 8 * len(units))
        if rest:
            raise WireError(
                f"prefill engine {remote.remote_engine_id} sent {len(answer.sums)} bytes for {len(units)} "
                f"units, which is no whole number of heads; run the same release on both sides"
            )
        return np.frombuffer(answer.sums, dtype="<u8").reshape(words, len(units))

    def _wait_for(self, remote: RemotePrefill, question: AskSums) -> Sums:
        give_up_s = time.monotonic() + self._patience_s
        while True:
            answer = self._lines.ask(remote.remote_host, remote.remote_port, question)
            if isinstance(answer, Sums):
                return answer
            if not isinstance(answer, SumsPending):
                raise WireError(f"prefill engine {remote.remote_engine_id} answered {question} with {answer}")
            if time.monotonic() > give_up_s:
                raise PeerUnreachable(
                    f"rank {question.rank} of prefill engine {remote.remote_engine_id} did not sum layer "
                    f"{question.layer} of request {question.request_id} within {self._patience_s:g} s; raise "
                    f"peer_timeout_s in kv_connector_extra_config"
                )
            time.sleep(_ASK_AGAIN_S)


def verify(
    plan: PairPlan,
    layers: Sequence[torch.Tensor],
    blocks: Blocks,
    tokens: Span,
    summer: Summer,
    ask: AskSumsOf,
) -> None:
    """Raise ReadDiffers, naming layer, head and tokens, unless `tokens` in `blocks` are what was computed.

    `layers` are those of `plan.local`, one tensor each.
    """
    units = units_of(tokens)
    slots = blocks.slots(np.arange(units.start * UNIT_TOKENS, tokens.stop, dtype=np.int64))
    for name, layer in zip(plan.local.layers, layers, strict=True):
        found = summer.sums(layer, plan.local.page, slots)
        wrong = np.argwhere(found != _expected(plan, name, units, ask))
        if len(wrong):
            head, unit = wrong[0].tolist()
            first = (units.start + unit) * UNIT_TOKENS
            raise _differs(
                f"its KV is not what the prefill engine computed, in layer {name} at {len(wrong)} places, "
                f"first in head {plan.local.heads.start + head}, tokens {first} to {first + UNIT_TOKENS - 1}"
            )


def verify_state(
    plan: PairPlan, layers: Sequence[torch.Tensor], block: int, summer: Summer, ask: AskSumsOf
) -> None:
    """Raise ReadDiffers, naming the layer, unless the state in `block` is what was computed.

    `layers` are those of `plan.local`, one tensor each.
    """
    units = units_of_state(plan.local.page.row_bytes)
    for name, layer in zip(plan.local.layers, layers, strict=True):
        wrong = np.argwhere(summer.state_sums(layer, block) != _expected(plan, name, units, ask))
        if len(wrong):
            raise _differs(
                f"its recurrent state is not what the prefill engine computed, in layer {name} at "
                f"{len(wrong)} places, first in its MiB {wrong[0, 1]}"
            )


def _expected(plan: PairPlan, layer: str, units: Span, ask: AskSumsOf) -> UnitSums:
    own = plan.local.heads
    expected = np.zeros((len(own), len(units)), dtype=np.uint64)
    compared = np.zeros(len(own), dtype=np.int64)
    for source in plan.sources:
        if layer not in source.remote.layers:
            continue
        theirs, common = source.remote.heads, own & source.remote.heads
        sums = ask(source.prefill_rank, layer, units)
        if sums.shape != (len(theirs), len(units)):
            raise ReadFailed(
                f"prefill rank {source.prefill_rank} has sums of {sums.shape[0]} heads in layer {layer} "
                f"instead of {len(theirs)}; run the same release on both sides"
            )
        here, there = common.relative_to(own.start), common.relative_to(theirs.start)
        expected[here.start : here.stop] = sums[there.start : there.stop]
        compared[here.start : here.stop] += 1
    assert (compared == 1).all(), "each head is read from one rank"
    return expected


def _differs(sentence: str) -> ReadDiffers:
    return ReadDiffers(f"{sentence}; report it with the output of python -m vllm_ascend.doctor")
