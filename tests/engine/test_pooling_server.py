# SPDX-License-Identifier: Apache-2.0
"""`vllm serve` of a model that embeds: vectors by OpenAI's API, scores and ranks as transformers has them."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from engine.pooling import (
    COSINE_DISTANCE_TOLERANCE,
    POOLING_FAMILIES,
    PROMPT_LENGTHS,
    prompts_of,
    reference,
    save,
)
from servers import Server, engine, running

NAME = "BertModel"
SERVED = "embedder"
# A card's attention takes no float32, in which transformers computes.
EMULATOR = ("--devices", "1", "--memory", "1GiB", "--allow-fp32")
PROMPTS = [prompt.tokens for prompt in prompts_of(NAME)]
TEXTS = [" ".join(f"w{token}" for token in prompt) for prompt in PROMPTS]
CLEARLY_DIFFERENT = 10
"""By how many tolerances the cosines of two documents differ: less, and either might be ranked first."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(NAME)
    save(NAME, folder)
    return folder


@pytest.fixture(scope="module")
def server(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    # vLLM refuses a text of more characters than as many of its longest words have, before it counts tokens.
    max_tokens = 2 * max(PROMPT_LENGTHS)
    options = (
        *("--dtype", "float32", "--max-model-len", str(max_tokens), "--max-num-seqs", "4"),
        *("--pooler-config", f'{{"seq_pooling_type": "{POOLING_FAMILIES[NAME].pooling}"}}'),
        *("--served-model-name", SERVED),
    )
    log_dir = tmp_path_factory.mktemp("server")
    serve = engine("embedder", folder, devices=[0], log_dir=log_dir, emulator=EMULATOR, options=options)
    with running([serve]):
        yield serve


@pytest.fixture(scope="module")
def expected(folder: Path) -> torch.Tensor:
    """float32 [prompts, size], of length 1, as OpenAI's are."""
    return torch.nn.functional.normalize(torch.stack(reference(NAME, folder)))


@pytest.fixture(scope="module")
def cosines(expected: torch.Tensor) -> list[float]:
    """Of the first prompt with each other one."""
    values: list[float] = (expected[1:] @ expected[0]).tolist()
    apart = [abs(one - other) for i, one in enumerate(values) for other in values[:i]]
    assert min(apart) > CLEARLY_DIFFERENT * COSINE_DISTANCE_TOLERANCE
    return values


@pytest.mark.parametrize(
    ("inputs", "encoding"),
    [
        pytest.param(TEXTS, "float", id="texts"),
        pytest.param(PROMPTS, "float", id="token ids"),
        pytest.param(TEXTS, "base64", id="base64, which OpenAI's client asks for"),
    ],
)
def test_embeddings_are_those_of_transformers(
    inputs: list[str] | list[list[int]], encoding: str, server: Server, expected: torch.Tensor
) -> None:
    answer = server.post("/v1/embeddings", {"model": SERVED, "input": inputs, "encoding_format": encoding})
    entries = answer["data"]
    assert [entry["index"] for entry in entries] == list(range(len(inputs)))
    vectors = [entry["embedding"] for entry in entries]
    if encoding == "base64":
        vectors = [torch.frombuffer(bytearray(base64.b64decode(v)), dtype=torch.float32) for v in vectors]
    given = torch.stack([torch.as_tensor(vector) for vector in vectors])
    torch.testing.assert_close(given.norm(dim=1), torch.ones(len(given)))
    assert (1 - torch.cosine_similarity(given, expected)).max() <= COSINE_DISTANCE_TOLERANCE
    assert answer["usage"]["prompt_tokens"] == sum(PROMPT_LENGTHS)


def test_scores_are_cosines_of_embeddings(server: Server, cosines: list[float]) -> None:
    answer = server.post("/score", {"model": SERVED, "queries": TEXTS[0], "documents": TEXTS[1:]})
    scores = [entry["score"] for entry in answer["data"]]
    assert scores == pytest.approx(cosines, abs=COSINE_DISTANCE_TOLERANCE)


def test_documents_are_ranked_by_them(server: Server, cosines: list[float]) -> None:
    answer = server.post("/rerank", {"model": SERVED, "query": TEXTS[0], "documents": TEXTS[1:]})
    order = [entry["index"] for entry in answer["results"]]
    assert order == sorted(range(len(cosines)), key=lambda i: -cosines[i])
    scores = [entry["relevance_score"] for entry in answer["results"]]
    assert scores == pytest.approx([cosines[i] for i in order], abs=COSINE_DISTANCE_TOLERANCE)
