# SPDX-License-Identifier: Apache-2.0
"""What users of vLLM ask of a server besides greedy tokens, each against transformers or a plain formula.

One engine with random weights and adapters, one with the recall model (which has a tokenizer), and one for
each way to draft tokens are asked everything.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from engine.adapters import save_adapter, save_merged
from engine.ask import Inquiry, Question, Reply, Report
from engine.describe_features import DOCUMENT, FEATURES, with_table
from engine.drafters import save_noisy_copy
from engine.heads import Head, save_with_eagle_head, save_with_next_token_layer
from engine.launch import ON_EMULATOR_WITH_FLOAT32, Running, started
from engine.models import QUESTIONS, RECALL_FOLDER, random_prompts

NUM_TOKENS = 16
NUM_DRAFTS = 3
METHODS = ("eagle", "mtp")
SHORT, LONG = random_prompts((20, 110))
TOLERANCE = 1e-3
"""Of log-probabilities in float32."""
GREEDY: dict[str, Any] = {"temperature": 0, "max_tokens": NUM_TOKENS, "ignore_eos": True, "detokenize": False}

PENALTIES: dict[str, dict[str, float]] = {
    "repetition": {"repetition_penalty": 1.5},
    "presence": {"presence_penalty": 1.5},
    "frequency": {"frequency_penalty": 1.5},
}


@dataclass(frozen=True)
class Folders:
    llama: Path
    adapters: list[Path]
    merged: list[Path]
    drafter: Path
    """A model that drafts for `llama`."""
    heads: Path
    """Of models with a head that drafts for them, one for each of METHODS, and of EAGLE's head."""


@pytest.fixture(scope="module")
def folders(checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Folders:
    folder, llama = tmp_path_factory.mktemp("features"), checkpoints["llama"]
    adapters = [folder / f"adapter-{seed}" for seed in (1, 2)]
    merged = [folder / f"merged-{seed}" for seed in (1, 2)]
    for seed, (adapter, model) in enumerate(zip(adapters, merged, strict=True)):
        save_adapter(llama, adapter, seed)
        save_merged(llama, adapter, model)
    save_noisy_copy(llama, folder / "noisy")
    (folder / "heads").mkdir()
    return Folders(llama, adapters, merged, folder / "noisy", folder / "heads")


@pytest.fixture(scope="module")
def heads(folders: Folders) -> dict[str, Head]:
    return {
        "eagle": save_with_eagle_head(folders.heads / "eagle", folders.heads / "eagle_head"),
        "mtp": save_with_next_token_layer(folders.heads / "mtp"),
    }


def of_random_model() -> dict[str, Question]:
    return {
        "log-probabilities": Question(LONG, GREEDY | {"logprobs": 3, "prompt_logprobs": 2}),
        "three samples": Question(
            SHORT, GREEDY | {"n": 3, "temperature": 1.0, "seed": 5, "logprobs": 0, "max_tokens": 8}
        ),
        "three of the best token": Question(SHORT, GREEDY | {"n": 3, "temperature": 1.0, "top_k": 1}),
        "stop token": Question(SHORT, GREEDY | {"max_tokens": 64, "stop_token_ids": list(range(128))}),
        **{name: Question(SHORT, GREEDY | penalty) for name, penalty in PENALTIES.items()},
    }


def of_adapters(folders: Folders) -> list[Question]:
    return [Question(LONG, GREEDY, str(folder) if folder else None) for folder in (None, *folders.adapters)]


PRIORITIES = [Question(QUESTIONS[0].prompt, GREEDY, priority=priority) for priority in (3, 2, 1, 0)]
CHOICES = ["0", "4", "7", "9"]
"""Of one token each, and no other way to write them."""
IN_WORDS: dict[str, Question] = {
    "choice": Question(QUESTIONS[2].prompt, {"temperature": 0, "choice": CHOICES, "max_tokens": 1}),
    "unconstrained beside it": Question(QUESTIONS[2].prompt, {"temperature": 0, "max_tokens": 8}),
    "regex": Question(QUESTIONS[3].prompt, {"temperature": 0, "regex": "(7:|8:)(5|6)", "max_tokens": 2}),
    "stop string": Question(
        QUESTIONS[2].prompt,
        {"temperature": 0, "max_tokens": 12, "stop": [QUESTIONS[2].answer.split()[4]]},
    ),
}


def with_a_drafter(folders: Folders) -> Inquiry:
    speculative = {"method": "draft_model", "model": str(folders.drafter)}
    return drafted(folders.llama, speculative)


def with_a_head(folders: Folders, method: str) -> Inquiry:
    speculative = {"method": method}
    if method == "eagle":
        speculative["model"] = str(folders.heads / "eagle_head")
    # After a chunk of a prompt, vLLM gives a head the prompt's last token, not the one that comes next.
    return drafted(folders.heads / method, speculative, max_num_batched_tokens=256)


def drafted(model: Path, speculative: dict[str, str], **more: Any) -> Inquiry:
    options = usual(speculative_config=speculative | {"num_speculative_tokens": NUM_DRAFTS}) | more
    options["skip_tokenizer_init"] = True
    asked = [Question(LONG, GREEDY), Question(SHORT, GREEDY | {"temperature": 1.0, "top_k": 1})]
    return Inquiry(str(model), options, [asked])


def usual(**options: Any) -> dict[str, Any]:
    return {
        "dtype": "float32",
        "max_model_len": 384,
        "max_num_batched_tokens": 96,
        "max_num_seqs": 8,
        "kv_cache_memory_bytes": 32 << 20,
    } | options


def inquiries(folders: Folders) -> list[Inquiry]:
    """What the engines are asked, one after the other."""
    return [
        Inquiry(
            str(folders.llama),
            usual(enable_lora=True, max_loras=2, max_lora_rank=8, skip_tokenizer_init=True),
            [list(of_random_model().values()), of_adapters(folders)],
        ),
        Inquiry(
            str(RECALL_FOLDER),
            usual(scheduling_policy="priority", max_num_seqs=2, async_scheduling=False),
            [PRIORITIES, list(IN_WORDS.values())],
        ),
        Inquiry(
            str(RECALL_FOLDER),
            usual(
                speculative_config={
                    "method": "ngram",
                    "num_speculative_tokens": 3,
                    "prompt_lookup_min": 1,
                    "prompt_lookup_max": 2,
                }
            ),
            [[Question(q.prompt, GREEDY | {"max_tokens": 32}) for q in QUESTIONS[:4]]],
        ),
        with_a_drafter(folders),
        *(with_a_head(folders, method) for method in METHODS),
    ]


@pytest.fixture(scope="module")
def engines(
    folders: Folders, heads: dict[str, Head], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Running]:
    """Needs the models that `heads` writes."""
    with started(inquiries(folders), tmp_path_factory.mktemp("asked"), ON_EMULATOR_WITH_FLOAT32) as running:
        yield running


@pytest.fixture(scope="module")
def reports(engines: Running) -> list[Report]:
    return engines.reports()


@pytest.fixture(scope="module")
def replies(reports: list[Report]) -> dict[str, Reply]:
    """Of the model with random weights, and of the recall model in words."""
    random, words = reports[0].batches[0], reports[1].batches[1]
    return dict(zip((*of_random_model(), *IN_WORDS), (*random, *words), strict=True))


Logits = Callable[[list[int]], torch.Tensor]


def logits_of(folder: Path) -> Logits:
    """Tokens to what follows each of them, float32 [tokens, vocabulary], by transformers."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    def logits(tokens: list[int]) -> torch.Tensor:
        with torch.inference_mode():
            result: torch.Tensor = model(torch.tensor([tokens])).logits[0]
        return result

    return logits


@pytest.fixture(scope="module")
def llama(folders: Folders, engines: Running) -> Logits:
    """The engines start before it is loaded."""
    return logits_of(folders.llama)


def assert_greedy(tokens: list[int], logits: Logits, prompt: list[int]) -> None:
    """Each token is the likeliest after those before it."""
    assert logits(prompt + tokens)[len(prompt) - 1 : -1].argmax(-1).tolist() == tokens


def test_log_probabilities(replies: dict[str, Reply], llama: Logits) -> None:
    (completion,) = replies["log-probabilities"].completions
    assert_greedy(completion.tokens, llama, LONG)
    expected = llama(LONG + completion.tokens).log_softmax(-1)
    given = [*replies["log-probabilities"].prompt_log_probabilities, *completion.log_probabilities]
    numbers = [2] * (len(LONG) - 1) + [3] * NUM_TOKENS
    following = LONG[1:] + completion.tokens
    for values, row, token, number in zip(given, expected[:-1], following, numbers, strict=True):
        assert set(values) == {token, *row.topk(number).indices.tolist()}
        assert all(abs(value - row[i].item()) <= TOLERANCE for i, value in values.items())


def test_several_samples(replies: dict[str, Reply], llama: Logits) -> None:
    samples = replies["three samples"].completions
    assert len({tuple(sample.tokens) for sample in samples}) == 3
    for sample in samples:
        expected = llama(SHORT + sample.tokens).log_softmax(-1)[len(SHORT) - 1 : -1]
        given = [values[token] for values, token in zip(sample.log_probabilities, sample.tokens, strict=True)]
        chosen = expected.gather(1, torch.tensor(sample.tokens)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(given), chosen, rtol=0, atol=TOLERANCE)
    best = replies["three of the best token"].completions
    assert len(best) == 3
    for completion in best:
        assert_greedy(completion.tokens, llama, SHORT)


def penalised(logits: torch.Tensor, output: list[int], kind: str) -> torch.Tensor:
    """OpenAI's and CTRL's definitions, token by token."""
    (strength,) = PENALTIES[kind].values()
    result = logits.clone()
    for token in set(SHORT + output):
        if kind == "repetition":
            result[token] = logits[token] / strength if logits[token] > 0 else logits[token] * strength
        elif kind == "presence":
            result[token] -= strength * (token in output)
        else:
            result[token] -= strength * output.count(token)
    return result


@pytest.mark.parametrize("kind", PENALTIES)
def test_penalties(kind: str, replies: dict[str, Reply], llama: Logits) -> None:
    output: list[int] = []
    for _ in range(NUM_TOKENS):
        output.append(int(penalised(llama(SHORT + output)[-1], output, kind).argmax()))
    assert replies[kind].completions[0].tokens == output


def test_stop_tokens(replies: dict[str, Reply], llama: Logits) -> None:
    (completion,) = replies["stop token"].completions
    assert_greedy(completion.tokens, llama, SHORT)
    assert completion.stop_reason == completion.tokens[-1] < 128
    assert all(token >= 128 for token in completion.tokens[:-1])


def test_adapters_in_one_batch(reports: list[Report], folders: Folders, llama: Logits) -> None:
    """Each request has its own adapter or none; the same as models with merged weights."""
    tokens = [reply.completions[0].tokens for reply in reports[0].batches[1]]
    models = [llama, *map(logits_of, folders.merged)]
    for output, model in zip(tokens, models, strict=True):
        assert_greedy(output, model, LONG)
    assert len({tuple(output) for output in tokens}) == 3


def test_priorities(reports: list[Report]) -> None:
    """Two at a time; the lowest number first."""
    times = [reply.first_token_s for reply in reports[1].batches[0]]
    assert max(times[2:]) < min(times[:2])


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return transformers.AutoTokenizer.from_pretrained(RECALL_FOLDER)


@pytest.fixture(scope="module")
def recall(engines: Running) -> Logits:
    return logits_of(RECALL_FOLDER)


def test_a_choice_is_the_likeliest_of_those_allowed(
    replies: dict[str, Reply], tokenizer: Any, recall: Logits
) -> None:
    allowed = [tokenizer.convert_tokens_to_ids(choice) for choice in CHOICES]
    after = recall(tokenizer(QUESTIONS[2].prompt).input_ids)[-1]
    best = max(range(len(CHOICES)), key=lambda i: after[allowed[i]])
    assert replies["choice"].completions[0].text.strip() == CHOICES[best]
    assert QUESTIONS[2].answer.startswith(replies["unconstrained beside it"].completions[0].text.strip())


def test_a_regular_expression_is_kept_to(replies: dict[str, Reply]) -> None:
    key, value = replies["regex"].completions[0].text.split()
    assert key in ("7:", "8:")
    assert value in ("5", "6")


def test_stop_strings(replies: dict[str, Reply]) -> None:
    (completion,) = replies["stop string"].completions
    words = QUESTIONS[2].answer.split()
    assert completion.text.split() == words[:4]
    assert (completion.finish_reason, completion.stop_reason) == ("stop", words[4])


def test_drafts_from_the_prompt_change_no_token(
    reports: list[Report], tokenizer: Any, recall: Logits
) -> None:
    """The recall model's answers repeat their prompts, if in another order."""
    for question, reply in zip(QUESTIONS, reports[2].batches[0], strict=False):
        assert_greedy(reply.completions[0].tokens, recall, tokenizer(question.prompt).input_ids)
    assert 0 < reports[2].accepted < reports[2].drafted


def test_a_drafter_changes_no_token(reports: list[Report], folders: Folders) -> None:
    report = reports[3]
    logits = logits_of(folders.llama)
    for prompt, reply in zip((LONG, SHORT), report.batches[0], strict=True):
        assert_greedy(reply.completions[0].tokens, logits, prompt)
    assert 0 < report.accepted < report.drafted


@pytest.mark.parametrize("method", METHODS)
def test_a_head_changes_no_token_and_its_drafts_are_kept(
    method: str, reports: list[Report], heads: dict[str, Head]
) -> None:
    report, head = reports[4 + METHODS.index(method)], heads[method]
    for prompt, reply in zip((LONG, SHORT), report.batches[0], strict=True):
        assert reply.completions[0].tokens == head.continued(prompt, NUM_TOKENS)
    counts = [head.drafted_and_kept(prompt, NUM_TOKENS, NUM_DRAFTS) for prompt in (LONG, SHORT)]
    drafted, kept = (sum(count) for count in zip(*counts, strict=True))
    assert 0 < kept < drafted
    assert (report.drafted, report.accepted) == (drafted, kept)


def test_the_table_of_features_is_in_step() -> None:
    document = DOCUMENT.read_text()
    assert with_table(document) == document, (
        "write docs/features.md anew; engine/describe_features.py says how"
    )


def test_the_tests_that_the_table_names_are_there() -> None:
    for feature in FEATURES:
        file, function = feature.file_and_function()
        assert f"\ndef {function}(" in file.read_text(), feature.test
