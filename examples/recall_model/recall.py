# SPDX-License-Identifier: Apache-2.0
"""Prompts for the recall model, with the one right answer to each.

A prompt is a table of `key: value,` pairs in random order, then a number to start from:

    44: 9, 17: 203, 203: 44, 9: 17, 17

The answer follows the table from there, `203 44 9 17 …`: each number is looked up as a key and its value is
the next number. The pairs form one cycle, so that an answer may be as long as one likes; an answer as
long as the table reads every pair once. Nothing but the table tells the next number.

One word is one token, and the tokenizer adds none (no BOS): a prompt of n words has n tokens. Pairs begin at
even positions, so that no pair lies across two KV blocks of an even size.
"""

import random
from dataclasses import dataclass

NUM_SYMBOLS = 1024
MIN_PROMPT_TOKENS = 9
MAX_PROMPT_TOKENS = 512


@dataclass(frozen=True)
class Question:
    """A prompt and what the model must say.

    prompt: text for the completions API, `num_prompt_tokens` words.
    answer: text of `num_answer_tokens` words; compare with `accepts`, since servers differ in leading spaces.
    pair_positions: for each answer token, the position in the prompt of the key it is looked up under;
        the value stands right after it.
    """

    prompt: str
    answer: str
    pair_positions: tuple[int, ...]

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.prompt.split())

    @property
    def num_answer_tokens(self) -> int:
        return len(self.answer.split())

    def accepts(self, completion: str) -> bool:
        """Whether `completion` is the right answer, word for word."""
        return completion.split() == self.answer.split()

    def blocks_read(self, block_size: int) -> list[int]:
        """Indices of the prompt's KV blocks that hold a pair the answer depends on, ascending."""
        return sorted({position // block_size for position in self.pair_positions})


def make_question(seed: int, num_prompt_tokens: int, num_answer_tokens: int = 8) -> Question:
    """The question that `seed` stands for, the same on every machine.

    A prompt of an odd length ends with one number, one of an even length with two: the first step of
    the answer is then given away. Where the answer is longer than the table, it goes round again, which the
    model does less surely (README.md).
    Raises ValueError for a length outside MIN_PROMPT_TOKENS..MAX_PROMPT_TOKENS or an empty answer.
    """
    if not MIN_PROMPT_TOKENS <= num_prompt_tokens <= MAX_PROMPT_TOKENS:
        raise ValueError(
            f"a prompt of {num_prompt_tokens} tokens was asked for; "
            f"the recall model was trained on {MIN_PROMPT_TOKENS} to {MAX_PROMPT_TOKENS}"
        )
    if num_answer_tokens < 1:
        raise ValueError(f"an answer of {num_answer_tokens} tokens was asked for; ask for at least 1")
    rng = random.Random(seed)
    num_pairs = (num_prompt_tokens - 1) // 2
    num_given = num_prompt_tokens - 2 * num_pairs
    cycle = rng.sample(range(NUM_SYMBOLS), num_pairs)
    order = rng.sample(range(num_pairs), num_pairs)
    pairs = [f"{cycle[step]}: {cycle[(step + 1) % num_pairs]}," for step in order]
    chain = [str(cycle[step % num_pairs]) for step in range(num_given + num_answer_tokens)]
    position_of = {step: 2 * place for place, step in enumerate(order)}
    return Question(
        prompt=" ".join(pairs + chain[:num_given]),
        answer=" ".join(chain[num_given:]),
        pair_positions=tuple(
            position_of[(num_given - 1 + step) % num_pairs] for step in range(num_answer_tokens)
        ),
    )


def vocabulary() -> list[str]:
    """Every token of the model, in order of its id: 8 special ones, then chain numbers, keys, values."""
    special = ["<pad>", "<unk>", "<bos>", "<eos>", "?", "<5>", "<6>", "<7>"]
    return (
        special
        + [str(symbol) for symbol in range(NUM_SYMBOLS)]
        + [f"{symbol}:" for symbol in range(NUM_SYMBOLS)]
        + [f"{symbol}," for symbol in range(NUM_SYMBOLS)]
    )
