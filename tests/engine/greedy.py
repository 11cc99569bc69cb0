# SPDX-License-Identifier: Apache-2.0
"""What transformers generates: the reference for engines' answers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import transformers


@dataclass(frozen=True)
class Greedy:
    """A continuation, always as long as was asked."""

    num_prompt_tokens: int
    tokens: list[int]
    log_probabilities: torch.Tensor
    """float32 [tokens]"""


def greedy(model: Any, num_new_tokens: int, **inputs: torch.Tensor) -> Greedy:
    """The model's greedy continuation of one prompt; `inputs` are its, such as `input_ids` [1, tokens]."""
    # Whisper's own way to generate cuts recordings and forces tokens.
    output = transformers.GenerationMixin.generate(
        model.eval(),
        **inputs,
        do_sample=False,
        max_new_tokens=num_new_tokens,
        eos_token_id=None,
        pad_token_id=0,
        return_dict_in_generate=True,
        output_logits=True,
    )
    num_prompt_tokens = output.sequences.shape[1] - num_new_tokens
    new = output.sequences[0, num_prompt_tokens:]
    chosen = torch.cat(output.logits).log_softmax(-1).gather(1, new[:, None])[:, 0]
    return Greedy(num_prompt_tokens, new.tolist(), chosen)


def greedy_after(model: Any, num_new_tokens: int, prompt: list[int]) -> Greedy:
    """The same for a prompt of tokens alone."""
    inputs = torch.tensor([prompt])
    return greedy(model, num_new_tokens, input_ids=inputs, attention_mask=torch.ones_like(inputs))
