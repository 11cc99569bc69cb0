# SPDX-License-Identifier: Apache-2.0
"""Messages that no engine would send, made from those that it would: the same ones for the same seed."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import msgspec

from vllm_ascend.kv_transfer.messages import (
    Answer,
    AskForEngine,
    AskProgress,
    AskSums,
    Done,
    Forgo,
    Question,
    Refused,
    Release,
    Renew,
    Watch,
    encode,
)

Frames = list[bytes]

OWN = ("own-1", "own-2", "own-3")
"""Requests that the sender may free."""


def hostile_messages(engine_id: str, seed: int, count: int) -> Iterator[Frames]:
    """`count` messages to an engine: replayed, truncated, altered, spliced, of other types, shapes and sizes.

    No question names another request than those in OWN, but by an accident that does not happen.
    """
    source = random.Random(seed)
    genuine = [list(encode(message)) for message in _genuine(engine_id)]
    kinds: tuple[Callable[[random.Random, list[Frames]], Frames], ...] = (
        *(_replayed, _truncated, _flipped, _inserted, _spliced, _noise),
        *(_misshapen, _retyped, _reversioned, _nested),
    )
    for index in range(count):
        # Long ones are rare: they are for their size, the others for their variety.
        yield _long(source, genuine) if index % 2000 == 0 else source.choice(kinds)(source, genuine)


def _genuine(engine_id: str) -> tuple[Question | Answer, ...]:
    return (
        AskForEngine(),
        Renew(engine_id=engine_id, request_ids=OWN),
        Renew(engine_id="another-engine", request_ids=OWN),
        Done(engine_id=engine_id, request_id=OWN[0], reader="decode/0", num_readers=2),
        Done(engine_id=engine_id, request_id="unheard-of", reader="decode/0", num_readers=1),
        Release(engine_id=engine_id, request_ids=OWN),
        AskSums(engine_id=engine_id, request_id=OWN[0], rank=0, layer="a", first_unit=0, num_units=1),
        AskProgress(engine_id=engine_id, watches=(Watch(name="named", lease=1, tokens=16),)),
        Forgo(engine_id=engine_id, names=("named", "unheard-of")),
        Refused(reason="an answer is no question"),
    )


def _replayed(source: random.Random, genuine: list[Frames]) -> Frames:
    return source.choice(genuine)


def _truncated(source: random.Random, genuine: list[Frames]) -> Frames:
    version, body = source.choice(genuine)
    return [version, body[: source.randrange(len(body))]]


def _flipped(source: random.Random, genuine: list[Frames]) -> Frames:
    version, body = source.choice(genuine)
    changed = bytearray(body)
    for _ in range(source.randint(1, 4)):
        changed[source.randrange(len(changed))] ^= 1 << source.randrange(8)
    return [version, bytes(changed)]


def _inserted(source: random.Random, genuine: list[Frames]) -> Frames:
    version, body = source.choice(genuine)
    at = source.randrange(len(body))
    return [version, body[:at] + source.randbytes(source.randint(1, 8)) + body[at:]]


def _spliced(source: random.Random, genuine: list[Frames]) -> Frames:
    (version, one), (_, other) = source.choice(genuine), source.choice(genuine)
    return [version, one[: source.randrange(len(one))] + other[source.randrange(len(other)) :]]


def _noise(source: random.Random, genuine: list[Frames]) -> Frames:
    return [genuine[0][0], source.randbytes(source.randrange(64))]


def _misshapen(source: random.Random, genuine: list[Frames]) -> Frames:
    frames = [*source.choice(genuine), *source.choice(genuine)]
    source.shuffle(frames)
    return [b"" if source.random() < 0.2 else frame for frame in frames[: source.randint(1, 4)]]


def _retyped(source: random.Random, genuine: list[Frames]) -> Frames:
    """A question in form, with values of any type and size in its fields."""
    version, body = source.choice(genuine)
    fields = msgspec.msgpack.decode(body)
    fields[source.choice(sorted(fields))] = _value(source, depth=3)
    return [version, msgspec.msgpack.encode(fields)]


def _reversioned(source: random.Random, genuine: list[Frames]) -> Frames:
    version, body = source.choice(genuine)
    return [version[: source.randrange(len(version))] + source.randbytes(source.randrange(3)), body]


def _nested(source: random.Random, genuine: list[Frames]) -> Frames:
    version, body = genuine[0]
    field = b"\xa1x" + source.choice((b"\x91", b"\x81\xa1x")) * source.randrange(2000) + b"\x90"
    return [version, bytes([body[0] + 1]) + body[1:] + field]


def _long(source: random.Random, genuine: list[Frames]) -> Frames:
    names = ["x" * source.randint(1, 2000)] * source.randint(500, 2000)
    release = {"type": "Release", "engine_id": "another-engine", "request_ids": names}
    return [genuine[0][0], msgspec.msgpack.encode(release)]


def _value(source: random.Random, depth: int) -> Any:  # Any: whatever msgpack can say
    simple: tuple[Any, ...] = (
        *(None, True, source.randint(-(2**63), 2**64 - 1), source.randint(-1, 70000), float("nan")),
        *("", "x" * source.randrange(1500), source.choice(OWN)),
        *(source.randbytes(8), msgspec.msgpack.Ext(5, b"")),
    )
    if depth == 0 or source.random() < 0.5:
        return source.choice(simple)
    values = [_value(source, depth - 1) for _ in range(source.randrange(4))]
    return values if source.random() < 0.5 else {f"{index}": value for index, value in enumerate(values)}
