# SPDX-License-Identifier: Apache-2.0
"""What the connector needs of the prompt that a vLLM `Request` has."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm_ascend.kv_transfer.messages import prompt_digest

if TYPE_CHECKING:
    from vllm.v1.request import Request


def digest_of(request: Request, num_tokens: int) -> str | None:
    """What tells the KV of the request's first `num_tokens` prompt tokens from others; None if it brings
    embeddings.

    Two pictures may stand behind the same tokens: each counts by vLLM's hash of it, an adapter by its name.
    """
    token_ids = request.prompt_token_ids
    if token_ids is None:
        return None
    marks = [
        f"{feature.mm_position.offset} {feature.identifier}"
        for feature in request.mm_features
        if feature.mm_position.offset < num_tokens
    ]
    if request.lora_request is not None:
        marks.append(f"lora {request.lora_request.lora_name}")
    return prompt_digest(token_ids[:num_tokens], marks)


def drop_last_token(request: Request) -> None:
    """End the request's prompt one token earlier, unless it has only one.

    vLLM has no call for this. Its `Request` keeps the prompt in several places, which must agree.
    """
    if request.num_prompt_tokens < 2:
        return
    # New ones: the output processor may hold the old, in the same process.
    for name in ("prompt_token_ids", "prompt_is_token_ids", "prompt_embeds"):
        if (prompt := getattr(request, name)) is not None:
            setattr(request, name, prompt[:-1])
    del request._all_token_ids[-1]
    request.num_prompt_tokens -= 1
    # The last block's hash may have counted the token.
    del request.block_hashes[-1:]
    request.update_block_hashes()
