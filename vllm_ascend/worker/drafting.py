# SPDX-License-Identifier: Apache-2.0
"""A drafter's batch: torch versions of the kernels that vLLM's proposers prepare it with.

After a step of the model, a drafter is given the tokens of this step, rejected drafts among them as padding,
and then its own, one per request. Nothing here waits for the device. Parameters are the Triton kernels', in
their order; R is the number of requests.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

PROPOSERS = "vllm.v1.spec_decode.utils"
REJECTED = -1


def step(
    positions: torch.Tensor,
    block_table: torch.Tensor,
    block_table_stride: int,
    seq_lens: torch.Tensor,
    next_positions: torch.Tensor,
    slot_mapping: torch.Tensor,
    block_size: int,
    max_model_len: int,
    blocks_per_request: int,
    pad_id: int,
    num_requests: int,
) -> None:
    """Move every request one token on; one that would exceed the model's length is parked at position 0.

    positions, next_positions: int64 [R]; block_table: int32 [R, blocks]; seq_lens: int32 [R], read and
    written; slot_mapping: int64 [R or more], written: the slot of each request's new token, `pad_id` for the
    parked and beyond R.
    """
    moved = positions[:num_requests] + 1
    parked = moved >= max_model_len
    moved = torch.where(parked, 0, moved)
    columns = (moved // block_size).clamp(max=blocks_per_request - 1)
    blocks = block_table[:num_requests].gather(1, columns[:, None])[:, 0]
    slots = blocks * block_size + moved % block_size
    lengths = torch.where(parked, 1, seq_lens[:num_requests] + 1).clamp(max=max_model_len)
    next_positions[:num_requests] = moved
    slot_mapping[:num_requests] = torch.where(parked, pad_id, slots)
    slot_mapping[num_requests:] = pad_id
    seq_lens[:num_requests] = lengths.to(seq_lens.dtype)


def last_kept(
    draft_ends: torch.Tensor,
    num_kept: torch.Tensor,
    query_starts: torch.Tensor,
    last_rows: torch.Tensor,
    num_rejected: torch.Tensor,
    num_requests: int,
) -> None:
    """Write the row of each request's last kept token to `last_rows`, and how many after it were rejected.

    draft_ends: int32 [R], cumulative; num_kept: [R], accepted drafts and one more; query_starts: [R + 1].
    """
    drafts = draft_ends.diff(prepend=draft_ends.new_zeros(1))
    rejected = torch.where(drafts > 0, drafts + 1 - num_kept, 0)
    last_rows.copy_(query_starts[1 : num_requests + 1] - 1 - rejected)
    num_rejected.copy_(rejected)


def next_tokens(
    sampled: torch.Tensor,
    discarded: torch.Tensor,
    backup: torch.Tensor,
    tokens: torch.Tensor,
    num_kept: torch.Tensor,
    vocab_size: int,
    tokens_per_request: int,
    num_requests: int,
    stride: int,
    tile: int,
) -> None:
    """Write each request's last sampled token to `tokens`, int32 [R], and how many it has to `num_kept`.

    sampled: int32 [R, tokens per request], rejected ones negative; a request that is discarded (bool [R]: its
    prompt is not finished) or has none gets its token of `backup`, int32 [R].
    """
    sampled = sampled[:num_requests, :tokens_per_request]
    kept = (sampled != REJECTED) & (sampled < vocab_size) & ~discarded[:num_requests, None]
    columns = torch.arange(tokens_per_request, device=sampled.device)
    last = torch.where(kept, columns, -1).amax(1)
    chosen = sampled.gather(1, last.clamp(min=0)[:, None])[:, 0]
    tokens[:num_requests] = torch.where(last >= 0, chosen, backup[:num_requests])
    num_kept[:num_requests] = kept.sum(1).to(num_kept.dtype)


def copy_and_expand(
    target_tokens: torch.Tensor,
    target_positions: torch.Tensor,
    new_tokens: torch.Tensor,
    tokens: torch.Tensor,
    positions: torch.Tensor,
    is_rejected: torch.Tensor,
    is_masked: torch.Tensor,
    new_rows: torch.Tensor,
    hidden_rows: torch.Tensor,
    query_starts: torch.Tensor,
    last_rows: torch.Tensor,
    padding_token: int,
    masked_token: int,
    num_rows: int,
    slots_per_request: int,
    shifted: bool,
    tile: int,
) -> None:
    """Copy each request's kept tokens, then its new token, masked slots to draft in parallel, and padding.

    target_tokens, target_positions: [num_rows]; new_tokens, last_rows: [R]; query_starts: [R + 1]. A request
    of n rows gets n + slots_per_request of `tokens`, `positions`, `is_rejected` and `is_masked`; one fewer
    where its first token is left out (`shifted`). new_rows: [R * slots_per_request], the rows of new and
    masked tokens; hidden_rows: [num_rows], where each row's hidden state goes, written if shifted.
    """
    requests = torch.arange(len(last_rows), device=last_rows.device)
    starts, ends = query_starts[:-1].long(), query_starts[1:].long()
    out_starts = starts + requests * (slots_per_request - shifted)
    num_copied = last_rows.long() + 1 - starts - int(shifted)
    sizes = ends - starts + slots_per_request - int(shifted)
    total = num_rows + len(requests) * (slots_per_request - shifted)

    of_row = torch.repeat_interleave(requests, sizes, output_size=total)
    column = torch.arange(total, device=last_rows.device) - out_starts[of_row]
    after_copied = column - num_copied[of_row]
    source = (starts[of_row] + column + int(shifted)).clamp(max=num_rows - 1)
    rejected = after_copied >= slots_per_request
    masked = (after_copied > 0) & ~rejected
    values = torch.where(after_copied == 0, new_tokens[of_row], target_tokens[source])
    values = torch.where(masked, masked_token, torch.where(rejected, padding_token, values))
    tokens[:total] = values.to(tokens.dtype)
    positions[:total] = torch.where(rejected, 0, target_positions[starts][of_row] + column)
    is_rejected[:total] = rejected
    is_masked[:total] = masked
    slots = torch.arange(slots_per_request, device=last_rows.device)
    new_rows.copy_((out_starts + num_copied)[:, None].add(slots).flatten())
    if shifted:
        of_source = torch.repeat_interleave(requests, ends - starts, output_size=num_rows)
        within = torch.arange(num_rows, device=last_rows.device) - starts[of_source]
        hidden_rows[:num_rows] = (out_starts[of_source] + within).to(hidden_rows.dtype)


KERNELS: dict[str, Callable[..., None]] = {
    f"{PROPOSERS}.eagle_step_slot_mapping_metadata_kernel": step,
    f"{PROPOSERS}.eagle_prepare_inputs_padded_kernel": last_kept,
    f"{PROPOSERS}.eagle_prepare_next_token_padded_kernel": next_tokens,
    f"{PROPOSERS}.copy_and_expand_eagle_inputs_kernel": copy_and_expand,
}
