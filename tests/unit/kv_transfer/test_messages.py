# SPDX-License-Identifier: Apache-2.0
"""What travels between engines, and what is refused before it is understood."""

from __future__ import annotations

import contextlib

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_ascend.errors import WireError
from vllm_ascend.kv_transfer.messages import (
    AskForEngine,
    BlockSizes,
    CacheDescription,
    Done,
    DoneNoted,
    Engine,
    LayerKind,
    Parallel,
    RankRegions,
    Refused,
    Release,
    Renew,
    Renewed,
    StackRegions,
    StateKind,
    decode_answer,
    decode_question,
    differences,
    encode,
)

CACHE = CacheDescription(
    model="m",
    revision=None,
    architecture="LlamaForCausalLM",
    num_layers=2,
    hidden_size=64,
    vocab_size=100,
    windows=(None, 512),
    dtype="bfloat16",
    quantization="none",
)
KIND = LayerKind(
    num_kv_heads=4, head_size=16, cache_dtype="bfloat16", quantization="none", layout="token-major"
)
BLOCKS = BlockSizes(block_size=256, page_size=128)

STACK = StackRegions(
    group=1,
    kind=KIND,
    first_head=2,
    num_heads=2,
    num_blocks=3,
    page_bytes=64,
    block_stride_bytes=64,
    head_stride_bytes=0,
    layers=("a", "b"),
    addresses=(1, 2),
)
STATES = StackRegions(
    group=0,
    kind=StateKind(parts=2, shapes=((3, 12), (4, 4, 4)), dtypes=("bfloat16", "float32")),
    first_head=1,
    num_heads=1,
    num_blocks=3,
    page_bytes=512,
    block_stride_bytes=512,
    head_stride_bytes=0,
    layers=("c",),
    addresses=(3,),
)
RANK = RankRegions(tp_rank=0, pp_rank=0, session="h:1", stacks=(STACK, STATES))


def rank_with(**changes: object) -> dict[str, object]:
    """What RANK is on the wire, but for one stack's fields."""
    return {**msgspec.to_builtins(RANK), "stacks": [{**msgspec.to_builtins(STACK), **changes}]}


@pytest.mark.parametrize(
    "question",
    [
        AskForEngine(),
        Renew(engine_id="e", request_ids=("a", "b")),
        Done(engine_id="e", request_id="a", reader="d/0", num_readers=2),
        Release(engine_id="e", request_ids=("a",)),
    ],
    ids=lambda message: type(message).__name__,
)
def test_questions_arrive_as_they_were_sent(question):
    assert decode_question(list(encode(question))) == question


@pytest.mark.parametrize(
    "answer",
    [
        Engine(
            engine_id="e",
            protocol="tcp",
            cache=CACHE,
            blocks=BLOCKS,
            parallel=Parallel(tp_size=1, pp_size=1, dp_size=1),
            verifies=False,
            ranks=(RANK,),
        ),
        Renewed(lost=("a",)),
        DoneNoted(held=True),
        Refused(reason="no"),
    ],
    ids=lambda message: type(message).__name__,
)
def test_answers_arrive_as_they_were_sent(answer):
    assert decode_answer(list(encode(answer))) == answer


def test_another_version_is_refused_by_name_before_its_body_is_read():
    with pytest.raises(WireError, match="speaks 'vllm-ascend-kv/7' and this engine 'vllm-ascend-kv/4'"):
        decode_question([b"vllm-ascend-kv/7", b"not msgpack at all"])


@pytest.mark.parametrize(
    "frames",
    [
        pytest.param([], id="no frame"),
        pytest.param([b"vllm-ascend-kv/4"], id="one frame"),
        pytest.param([b"vllm-ascend-kv/4", b"", b""], id="three frames"),
        pytest.param([b"vllm-ascend-kv/4", b""], id="an empty body"),
        pytest.param([b"vllm-ascend-kv/4", b"\xc1garbage"], id="no msgpack"),
        pytest.param(
            [b"vllm-ascend-kv/4", b"\x82\xa4type\xa7Release\xa9engine_id\xa2\xff\xfe"],
            id="text that is no UTF-8",
        ),
        pytest.param(
            [b"vllm-ascend-kv/4", b"\x82\xa4type\xa7Release\xa1x" + 100_000 * b"\x91" + b"\x90"],
            id="lists within lists without end",
        ),
        pytest.param([b"vllm-ascend-kv/4", msgspec.msgpack.encode({"type": "Steal"})], id="unknown question"),
        pytest.param([b"vllm-ascend-kv/4", encode(DoneNoted(held=True))[1]], id="an answer is no question"),
        pytest.param(
            [
                b"vllm-ascend-kv/4",
                msgspec.msgpack.encode({"type": "Renew", "engine_id": "e", "request_ids": ["x" * 2000]}),
            ],
            id="a name that is too long",
        ),
        pytest.param(
            [
                b"vllm-ascend-kv/4",
                msgspec.msgpack.encode(
                    {"type": "Done", "engine_id": "e", "request_id": "a", "reader": "r", "num_readers": 0}
                ),
            ],
            id="no readers at all",
        ),
    ],
)
def test_malformed_questions_are_refused(frames):
    with pytest.raises(WireError):
        decode_question(frames)


@given(st.binary(max_size=200))
def test_whatever_comes_is_understood_or_refused(body):
    for decode in (decode_question, decode_answer):
        with contextlib.suppress(WireError):
            decode([b"vllm-ascend-kv/4", body])


@pytest.mark.parametrize(
    "change",
    [
        pytest.param({"parallel": {"tp_size": 0, "pp_size": 1, "dp_size": 1}}, id="no rank at all"),
        pytest.param({"ranks": [rank_with(addresses=[2**63])]}, id="address too high"),
        pytest.param({"ranks": [rank_with(num_blocks=-1)]}, id="less than no blocks"),
        pytest.param({"ranks": None}, id="no list of ranks"),
    ],
)
def test_a_peer_whose_numbers_cannot_be_is_refused(change):
    engine = Engine(
        engine_id="e",
        protocol="tcp",
        cache=CACHE,
        blocks=BLOCKS,
        parallel=Parallel(tp_size=1, pp_size=1, dp_size=1),
        verifies=False,
        ranks=(RANK,),
    )
    frames = [b"vllm-ascend-kv/4", msgspec.msgpack.encode({**msgspec.to_builtins(engine), **change})]
    with pytest.raises(WireError, match="could not be read"):
        decode_answer(frames)


def test_every_field_that_differs_is_named_with_both_values():
    other = msgspec.structs.replace(KIND, head_size=128, cache_dtype="float16")
    assert differences(other, KIND) == [
        "head_size is 128 there and 16 here",
        "cache_dtype is 'float16' there and 'bfloat16' here",
    ]
    assert differences(msgspec.structs.replace(CACHE, windows=(None, 24)), CACHE) == [
        "windows is (None, 24) there and (None, 512) here"
    ]


def test_a_revision_that_one_side_does_not_know_fits():
    known = msgspec.structs.replace(CACHE, revision="4f2c")
    assert differences(known, CACHE) == differences(CACHE, known) == []
    assert differences(known, msgspec.structs.replace(CACHE, revision="9d1e")) == [
        "revision is '4f2c' there and '9d1e' here"
    ]


def test_equals_have_no_differences():
    assert differences(CACHE, msgspec.structs.replace(CACHE)) == []
