# SPDX-License-Identifier: Apache-2.0
"""Which drafted tokens are kept: torch versions of the kernels of vLLM's rejection sampler.

A step verifies, for each of R requests, the drafts that it has (none to K of them, laid one after the other:
T in all). They are kept up to the first that the model would not have chosen; its place takes the model's
own token, and where none was rejected a bonus token follows. Parameters are the Triton kernels', in order.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

REJECTION_SAMPLER = "vllm.v1.sample.rejection_sampler"


def accept_greedy(
    output: torch.Tensor,
    draft_ends: torch.Tensor,
    drafts: torch.Tensor,
    best: torch.Tensor,
    bonus: torch.Tensor,
    is_greedy: torch.Tensor | None,
    max_drafts: int,
    uniform: torch.Tensor | None,
    synthetic_rates: torch.Tensor | None,
    synthetic: bool,
) -> None:
    """Write the tokens of greedy requests to `output`, int32 [R, K + 1]; what is not kept stays as it is.

    draft_ends: int32 [R], cumulative; drafts: int32 [T]; best: [T], the model's choice at each draft's place;
    bonus: [R, 1], its choice after the last; is_greedy: bool [R], None if all are.
    """
    assert not synthetic  # refused by the platform
    rows = _Rows.of(draft_ends, max_drafts)
    chosen = rows.of_requests(best)
    _keep(output, rows, chosen, rows.of_requests(drafts) == chosen, bonus, is_greedy)


def accept_random(
    output: torch.Tensor,
    draft_ends: torch.Tensor,
    drafts: torch.Tensor,
    draft_probs: torch.Tensor | None,
    target_probs: torch.Tensor,
    bonus: torch.Tensor,
    recovered: torch.Tensor,
    uniform: torch.Tensor,
    is_greedy: torch.Tensor,
    max_drafts: int,
    vocab_size: int,
    synthetic_rates: torch.Tensor | None,
    without_draft_probs: bool,
    synthetic: bool,
) -> None:
    """As `accept_greedy` for the other requests: a draft is kept with probability target / draft.

    draft_probs, target_probs: [T, vocabulary]; a draft without probabilities was certain to its drafter.
    recovered: [T], the token in a rejected draft's place; uniform: [T], drawn from [0, 1).
    """
    assert not synthetic  # refused by the platform
    rows = _Rows.of(draft_ends, max_drafts)
    # A negative draft is padding, to be rejected.
    place = drafts.clamp(min=0).long()[:, None]
    target = target_probs.gather(1, place)[:, 0]
    draft = torch.ones_like(target) if draft_probs is None else draft_probs.gather(1, place)[:, 0]
    accepted = (drafts >= 0) & (draft > 0) & (target / draft >= uniform)
    tokens = torch.where(accepted, drafts, recovered)
    _keep(output, rows, rows.of_requests(tokens), rows.of_requests(accepted), bonus, ~is_greedy)


def expand(
    output: torch.Tensor,
    values: torch.Tensor,
    ends: torch.Tensor,
    replaced: int,
    replacement: int,
    max_tokens: int,
) -> None:
    """Write each request's value to all its tokens: `output` is [T], `values` [R], `ends` [R], cumulative."""
    values = torch.where(values == replaced, replacement, values)
    output.copy_(torch.repeat_interleave(values, _counts(ends), output_size=len(output)))


def recover(
    output: torch.Tensor,
    draft_ends: torch.Tensor,
    drafts: torch.Tensor,
    draft_probs: torch.Tensor | None,
    target_probs: torch.Tensor,
    inverse_noise: torch.Tensor,
    vocab_size: int,
    tile: int,
    without_draft_probs: bool,
    double: bool,
) -> None:
    """Draw, for each draft, the token that stands in its place if it is rejected; `output` is [T].

    From what the target gives above the draft: without probabilities of drafts, all but the draft itself.
    inverse_noise: [R, vocabulary], 1 / exponential noise, by which the largest product is a fair draw.
    """
    if draft_probs is None:
        others = target_probs.scatter(1, drafts.clamp(min=0).long()[:, None], 0)
        rest = torch.where((drafts >= 0)[:, None], others, target_probs)
    else:
        rest = (target_probs - draft_probs).clamp(min=0)
    noise = torch.repeat_interleave(inverse_noise, _counts(draft_ends), dim=0, output_size=len(output))
    output.copy_((rest * noise).argmax(-1))


KERNELS: dict[str, Callable[..., None]] = {
    f"{REJECTION_SAMPLER}.rejection_greedy_sample_kernel": accept_greedy,
    f"{REJECTION_SAMPLER}.rejection_random_sample_kernel": accept_random,
    f"{REJECTION_SAMPLER}.expand_kernel": expand,
    f"{REJECTION_SAMPLER}.sample_recovered_tokens_kernel": recover,
}


@dataclass(frozen=True)
class _Rows:
    """Where each request's drafts lie among all."""

    counts: torch.Tensor
    """[R]"""
    places: torch.Tensor
    """int64 [R, K]: of each request's k-th draft, or of any other if it has fewer"""

    @classmethod
    def of(cls, ends: torch.Tensor, max_drafts: int) -> _Rows:
        counts = _counts(ends)
        columns = torch.arange(max_drafts, dtype=ends.dtype, device=ends.device)
        places = (ends - counts)[:, None] + columns
        return cls(counts, torch.where(columns < counts[:, None], places, 0).long())

    def of_requests(self, values: torch.Tensor) -> torch.Tensor:
        """[T] as [R, K]; what a request does not have is filled with something."""
        return values[self.places]


def _keep(
    output: torch.Tensor,
    rows: _Rows,
    tokens: torch.Tensor,
    accepted: torch.Tensor,
    bonus: torch.Tensor,
    which: torch.Tensor | None,
) -> None:
    """Write `tokens`, [R, K], up to and with the first that was not accepted, or all and the bonus."""
    columns = torch.arange(output.shape[1], dtype=rows.counts.dtype, device=output.device)
    counts = rows.counts[:, None]
    rejected = ~accepted & (columns[:-1] < counts)
    none_before = torch.nn.functional.pad(rejected, (1, 0)).cumsum(1) == 0
    kept = none_before & (columns <= counts)
    if which is not None:
        kept &= which.view(-1, 1)
    tokens = torch.where(columns == counts, bonus.view(-1, 1), torch.nn.functional.pad(tokens, (0, 1)))
    output.copy_(torch.where(kept, tokens.to(output.dtype), output))


def _counts(ends: torch.Tensor) -> torch.Tensor:
    """[R], of cumulative ends."""
    return ends.diff(prepend=ends.new_zeros(1))
