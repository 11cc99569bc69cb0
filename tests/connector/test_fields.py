# SPDX-License-Identifier: Apache-2.0
"""Two engines that do not fit: every field of the handshake, and the sentence that names it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import msgspec
import pytest
from connector.engines import Engine, admit, engine_config, model_folder, prefilled, running

from vllm_ascend.kv_transfer.handshake import Channel, Listener
from vllm_ascend.kv_transfer.messages import Answer, AskForEngine, DoneNoted, Question
from vllm_ascend.kv_transfer.messages import Engine as Description

HEADS = 4


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Engine, Engine]]:
    model = model_folder(tmp_path_factory.mktemp("model"), HEADS)
    prefill = Engine(engine_config(model, 1, "kv_producer"), HEADS)
    decode = Engine(engine_config(model, 1, "kv_consumer"), HEADS)
    with running(prefill, decode):
        yield prefill, decode


def with_cache(engine: Description, **change: Any) -> Description:
    return msgspec.structs.replace(engine, cache=msgspec.structs.replace(engine.cache, **change))


def with_layers(engine: Description, **change: Any) -> Description:
    (rank,) = engine.ranks
    (stack,) = rank.stacks
    kind = msgspec.structs.replace(stack.kind, **change)
    rank = msgspec.structs.replace(rank, stacks=(msgspec.structs.replace(stack, kind=kind),))
    return msgspec.structs.replace(engine, ranks=(rank,))


@pytest.mark.parametrize(
    ("of", "change", "sentence"),
    [
        (with_cache, {"model": "other"}, "model is 'other' there and 'recall' here"),
        (with_cache, {"architecture": "OtherLM"}, "architecture is 'OtherLM' there and 'LlamaForCausalLM'"),
        (with_cache, {"num_layers": 7}, "num_layers is 7 there and 3 here"),
        (with_cache, {"hidden_size": 64}, "hidden_size is 64 there and 128 here"),
        (with_cache, {"vocab_size": 65}, "vocab_size is 65 there and 64 here"),
        (with_cache, {"dtype": "float16"}, "dtype is 'float16' there and 'bfloat16' here"),
        (with_cache, {"quantization": "fp8"}, "quantization is 'fp8' there and 'none' here"),
        (with_cache, {"windows": (16,)}, "windows is (16,) there and (None,) here"),
        (with_layers, {"num_kv_heads": 8}, "num_kv_heads is 8 there and 4 here in layer model.layers.0."),
        (with_layers, {"head_size": 32}, "head_size is 32 there and 16 here in layer"),
        (with_layers, {"cache_dtype": "float32"}, "cache_dtype is 'float32' there and 'bfloat16' here in"),
        (with_layers, {"quantization": "fp8"}, "quantization is 'fp8' there and 'none' here in layer"),
        (with_layers, {"layout": "latent"}, "layout is 'latent' there and 'token-major' here in layer"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_a_difference_is_named(engines, of, change, sentence, caplog_vllm):
    prefill, decode = engines
    params = prefilled(prefill, "p", 20, [1, 2])
    channel = Channel(params["remote_host"], params["remote_port"], 5)
    description = channel.ask(AskForEngine())
    channel.close()
    assert isinstance(description, Description)

    def answer(question: Question) -> Answer:
        return of(description, **change) if isinstance(question, AskForEngine) else DoneNoted(held=True)

    with Listener("127.0.0.1", 0, answer) as other:
        admit(decode, "d", 20, [1, 2], {**params, "remote_port": other.port})
        output = decode.step_until(lambda output: bool(output.finished_recving))
    assert output.failed_recving == {"d"}
    assert f"cannot feed this engine: {sentence}" in caplog_vllm.text
    assert "start both with the same model" in caplog_vllm.text
