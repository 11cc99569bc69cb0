# SPDX-License-Identifier: Apache-2.0
"""A prompt's KV handed from one engine to another, with transformers on the CPU and a fault on the way.

The prompt's KV is computed, tampered with, and the answer is computed from it. Greedy decoding is right
exactly when, after each right beginning, the next token is right; so one forward pass over the right answer
tells, with no loop.
"""

from collections.abc import Callable, Sequence

import torch
from recall import Question
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

# (keys or values [question, kv_head, token, dim], head) -> wrong content for the head [question, token, dim]
Fault = Callable[[Tensor, int], Tensor]


def lost(clean: Tensor, head: int) -> Tensor:
    return torch.zeros_like(clean[:, head])


def of_another_request(clean: Tensor, head: int) -> Tensor:
    return clean[:, head].roll(1, 0)


def of_another_block(clean: Tensor, head: int) -> Tensor:
    # Half the prompt away: never the same block at the lengths that tests use.
    return clean[:, head].roll(clean.shape[2] // 2, 1)


class Handover:
    """Questions of one length whose prompts' KV is computed once and read with a fault, many times."""

    @torch.no_grad()
    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, questions: list[Question]
    ) -> None:
        self.questions = questions
        self._model = model
        self._length = questions[0].num_prompt_tokens
        texts = [f"{question.prompt} {question.answer}" for question in questions]
        self._ids = torch.tensor(tokenizer(texts).input_ids)
        # The last token of a prompt is computed where the answer is.
        cache = model(self._ids[:, : self._length - 1], use_cache=True, logits_to_keep=1).past_key_values
        self._clean = [(layer.keys, layer.values) for layer in cache.layers]

    @torch.no_grad()
    def right(
        self, layer: int = 0, heads: Sequence[int] = (), fault: Fault | None = None, block_size: int = 0
    ) -> Tensor:
        """bool [question]: is the whole answer right with `fault` in one block that it reads (0: in all)?"""
        cache = DynamicCache()
        for index, clean in enumerate(self._clean):
            found = [content.clone() for content in clean]
            if fault is not None and index == layer:
                struck = self._struck(block_size)[..., None]
                for wrong, content in zip(found, clean, strict=True):
                    for head in heads:
                        wrong[:, head] = torch.where(struck, fault(content, head), content[:, head])
            cache.update(*found, index)
        logits = self._model(self._ids[:, self._length - 1 : -1], past_key_values=cache).logits
        return (logits.argmax(-1) == self._ids[:, self._length :]).all(-1)

    def _struck(self, block_size: int) -> Tensor:
        tokens = torch.arange(self._length - 1)
        if block_size == 0:
            return torch.ones(len(self.questions), len(tokens), dtype=torch.bool)
        first = torch.tensor([[question.pair_positions[0] // block_size] for question in self.questions])
        return tokens // block_size == first
