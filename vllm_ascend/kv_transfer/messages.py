# SPDX-License-Identifier: Apache-2.0
"""Everything on the wire between two engines, its version and its history.

A message is two frames: the wire version, as text, and a msgpack map. The version is compared before
anything else is decoded, so peers of different versions refuse each other by name. Decode asks, prefill
answers; every question is one of `Question`, every answer one of `Answer`. Lengths are bounded, so that a
stranger cannot make an engine allocate at will. Nothing is ever unpickled.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence
from typing import Annotated, ClassVar, Self, TypeVar

import msgspec

from vllm_ascend.errors import WireError

WIRE_VERSION = 4
# 1: first version; one KV cache group, regions per layer
# 2: each engine says how it cuts its cache into blocks, which two engines may do differently; regions per
#    KV cache group and kind of layer, with the heads that the rank stores; windows; checksums
# 3: layers with recurrent state; distances from block to block and from head to head, which a layer's pages
#    need not fill
# 4: requests have names of a router's choice, by which decode asks how far they are and gives them up

T = TypeVar("T")

_PREFIX = b"vllm-ascend-kv/"
MAX_REQUESTS = 512
"""How many requests one question may name; more go in several."""
MAX_QUESTION_BYTES = 4 * 1024 * 1024
"""What a listener accepts: MAX_REQUESTS names of the longest kind take half of it."""
MAX_ANSWER_BYTES = 64 * 1024 * 1024
"""What a caller accepts: the description of a large engine is some hundred KiB."""

Size = Annotated[int, msgspec.Meta(ge=1, le=65536)]
"""How many ranks, heads, layers or tokens there are of something."""
Index = Annotated[int, msgspec.Meta(ge=0, le=2**31 - 1)]
"""The number of a rank or block, or how many blocks there are."""
WireAddress = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]
Name = Annotated[str, msgspec.Meta(max_length=1024)]
TransferName = Annotated[str, msgspec.Meta(min_length=1, max_length=128)]
"""What a router calls a request: long and random, so that no other is called so."""
Names = Annotated[tuple[Name, ...], msgspec.Meta(max_length=65536)]
RequestIds = Annotated[tuple[Name, ...], msgspec.Meta(max_length=MAX_REQUESTS)]


class CacheDescription(msgspec.Struct, frozen=True, kw_only=True):
    """What two engines must agree on before one can use the other's KV. Not among it: vLLM's version."""

    model: str
    """The name under which the model is served."""
    revision: str | None
    """The commit of the model's files, or the revision that was asked for; None: a folder does not tell."""
    architecture: str
    """The model class, such as LlamaForCausalLM."""
    num_layers: int
    """Layers of the whole model, over all pipeline stages, without those of a draft model."""
    hidden_size: int
    vocab_size: int
    dtype: Name
    """Element type of the model's computation, such as bfloat16."""
    quantization: Name
    """How the weights are quantised, or none."""
    windows: tuple[int | None, ...]
    """For each KV cache group, the tokens of its sliding window; None: its layers see all tokens."""


class LayerKind(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """What layers of attention of one name must have in common on both sides."""

    num_kv_heads: Size
    """KV heads of the layer, before tensor parallel; 1 where it keeps latents."""
    head_size: Size
    """Elements of K of one token and head, or of a token's latent row."""
    cache_dtype: Name
    """Element type of the KV cache, such as bfloat16."""
    quantization: Name
    """How the KV cache is quantised, or none."""
    layout: Name
    """Order of bytes in a page; see attention/cache_layout.py."""


class StateKind(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """What layers with recurrent state of one name must have in common on both sides."""

    parts: Size
    """Into how many parts tensor parallel cuts it, one for each rank; 1: every rank has all of it."""
    shapes: Annotated[tuple[tuple[Index, ...], ...], msgspec.Meta(max_length=64)]
    """Shapes of a layer's states on one rank, such as those of the convolution and of the recurrence."""
    dtypes: tuple[Name, ...]
    """Their element types."""


class BlockSizes(msgspec.Struct, frozen=True, kw_only=True):
    """How an engine cuts its cache: the other side may do it otherwise."""

    block_size: Size
    """Tokens per block of vLLM's scheduler."""
    page_size: Size
    """Tokens per page, which is the block that attention uses; divides `block_size`."""


class Parallel(msgspec.Struct, frozen=True, kw_only=True):
    """Sizes of an engine."""

    tp_size: Size
    pp_size: Size
    dp_size: Size


class StackRegions(msgspec.Struct, frozen=True, kw_only=True):
    """One rank's layers of one KV cache group that are alike, and where to read them."""

    group: Index
    """The KV cache group: which of a request's block lists is theirs."""
    kind: LayerKind | StateKind
    first_head: Index
    num_heads: Size
    """The KV heads, or parts of a state, that the rank stores: so many, from `first_head` of the layer on."""
    num_blocks: Index
    """Blocks of attention, or of states, in every layer."""
    page_bytes: Annotated[int, msgspec.Meta(ge=1, le=2**31 - 1)]
    block_stride_bytes: Annotated[int, msgspec.Meta(ge=1, le=2**63 - 1)]
    """From block to block of a layer: a page, or head-major the pages of all heads and layers."""
    head_stride_bytes: Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]
    """Head-major, from the page of a head to that of the next; 0: a page has all heads."""
    layers: Names
    addresses: Annotated[tuple[WireAddress, ...], msgspec.Meta(max_length=65536)]
    """Where block 0 of each layer begins, in the rank's own address space."""


class RankRegions(msgspec.Struct, frozen=True, kw_only=True):
    """One rank's KV cache."""

    tp_rank: Index
    pp_rank: Index
    session: Name
    """How the transfer engine addresses the rank."""
    stacks: Annotated[tuple[StackRegions, ...], msgspec.Meta(max_length=65536)]


class AskForEngine(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Who are you? The first question to a peer; later ones name the engine that it described."""


class Engine(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """A prefill engine as its listener describes it."""

    engine_id: Name
    protocol: Name
    """The transfer engine's protocol; both sides must use the same."""
    cache: CacheDescription
    blocks: BlockSizes
    parallel: Parallel
    verifies: bool
    """Whether it sums the KV of finished requests, so that decode can check what it read."""
    ranks: Annotated[tuple[RankRegions, ...], msgspec.Meta(max_length=65536)]


class Renew(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Keep these requests' blocks for another lease: decode still waits for them."""

    engine_id: Name
    request_ids: RequestIds


class Renewed(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The leases run anew, but for those in `lost`, which have ended."""

    lost: RequestIds


class Done(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """`reader`, one of `num_readers`, reads this request's blocks no more.

    A reader is one read of one rank: it may say so twice, but a second read is another reader.
    """

    engine_id: Name
    request_id: Name
    reader: Name
    num_readers: Size


class DoneNoted(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """`held`: the lease lasted until now. If not, what was read must be dropped."""

    held: bool


class Release(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Nobody will read these requests' blocks."""

    engine_id: Name
    request_ids: RequestIds


class Released(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The blocks are free, now or before."""


class AskSums(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The checksums of a layer of one request's KV, as one rank has it; see checksum.py."""

    engine_id: Name
    request_id: Name
    rank: Index
    """The rank's place in `Engine.ranks`."""
    layer: Name
    first_unit: Index
    num_units: Index


class Sums(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The checksums asked for: of each of the rank's heads, those of the units."""

    sums: bytes
    """[heads, units], 64 bits each, little-endian."""
    tokens: Index
    """How many of the request's tokens were summed, from its first on."""


class SumsPending(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The rank has not summed the request yet; ask again."""


class Refused(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The question was not understood, or was meant for another engine."""

    reason: str


class AtEngine(msgspec.Struct, frozen=True, kw_only=True):
    """What a request's `kv_transfer_params` say of the prefill engine.

    They pass through the client's hands: what they say is checked before it is used.
    """

    cure: ClassVar[str]
    """What to do about parameters that cannot be used."""

    remote_engine_id: Name
    """The engine, made unique per start, so that a restarted one is not mistaken for its predecessor."""
    remote_host: Annotated[str, msgspec.Meta(max_length=255, pattern=r"^[A-Za-z0-9.:_\[\]-]+$")]
    remote_port: Annotated[int, msgspec.Meta(ge=1, le=65535)]
    """Where the engine's listener is."""

    @property
    def peer(self) -> tuple[str, int, str]:
        """What tells the engine from others."""
        return self.remote_host, self.remote_port, self.remote_engine_id

    @classmethod
    def parse(cls, params: dict[str, object]) -> Self:
        """What a request brings. Raises WireError naming the key that is missing or wrong."""
        try:
            return msgspec.convert(params, cls)
        except msgspec.ValidationError as error:
            raise WireError(f"kv_transfer_params cannot be used: {error}; {cls.cure}") from error


class NamedPrefill(AtEngine, frozen=True, kw_only=True):
    """The `kv_transfer_params` of a request that a router sends while the prompt is still computed."""

    cure = "take remote_engine_id, remote_host and remote_port from an answer of the prefill engine"

    transfer_name: TransferName
    """What the router calls the request, here and at the prefill engine."""

    @property
    def key(self) -> tuple[str, str]:
        """What tells the prompt from others at this engine."""
        return self.remote_engine_id, self.transfer_name


class RemotePrefill(AtEngine, frozen=True, kw_only=True):
    """The `kv_transfer_params` of prefill's answer, which the router hands to decode untouched."""

    cure = "hand prefill's answer to decode untouched"

    remote_request_id: Name
    """The request's id in the prefill engine, under which its blocks are held."""
    remote_block_ids: tuple[tuple[Index, ...], ...]
    """For each KV cache group, the request's blocks in token order; 0 where its window has passed.

    Of a group with recurrent state, the one block with that after `remote_num_tokens`; 0: it has moved on.
    """
    remote_num_tokens: Index
    """Prompt tokens whose KV is in these blocks."""
    remote_block_size: Size
    """Tokens per block."""
    remote_lease: Index
    """A number that the engine gives whenever it gives a request its blocks, and never again."""
    remote_lease_s: Annotated[float, msgspec.Meta(gt=0)]
    """How long the blocks are held without a sign of life."""
    remote_prompt_digest: Name | None
    """`prompt_digest` of these tokens, so that no other prompt gets their KV; None: they have no ids."""

    @property
    def key(self) -> tuple[str, int]:
        """What tells the prompt from others at this engine."""
        return self.remote_engine_id, self.remote_lease


class Watch(msgspec.Struct, frozen=True, kw_only=True):
    """A request that decode asks after by its name, and what it knows of it; at first, lease 0."""

    name: TransferName
    lease: Index
    tokens: Index


class AskProgress(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """How far are these requests?"""

    engine_id: Name
    watches: Annotated[tuple[Watch, ...], msgspec.Meta(max_length=MAX_REQUESTS)]


class Unheard(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """No request of this name has come yet, or it was forgotten."""


class Unchanged(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """It is as far as decode knows."""


class Growing(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Its prompt is being computed.

    What was read of its blocks holds only if it still had the lease `so_far.remote_lease` when it ended: one
    that is preempted gives its blocks away, and gets others under another lease.
    """

    so_far: RemotePrefill
    """The tokens that are in memory; the digest is already that of the whole prompt."""
    prompt_tokens: Index
    """How many there will be."""


class Ended(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Its prompt is computed, and its blocks are held."""

    prefill: RemotePrefill


class Gone(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """It will not be there any more."""

    reason: str


class Progress(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """How far each of the requests is that were asked after, in their order."""

    of: Annotated[
        tuple[Unheard | Unchanged | Growing | Ended | Gone, ...], msgspec.Meta(max_length=MAX_REQUESTS)
    ]


class Forgo(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Nobody will read the requests of these names, whether or not they have come yet."""

    engine_id: Name
    names: Annotated[tuple[TransferName, ...], msgspec.Meta(max_length=MAX_REQUESTS)]


def transfer_name_of(params: dict[str, object]) -> str | None:
    """The name that a router gave a request. Raises WireError for what cannot be one."""
    name = params.get("transfer_name")
    try:
        return None if name is None else msgspec.convert(name, TransferName)
    except msgspec.ValidationError as error:
        raise WireError(f"transfer_name {name!r} cannot be used: {error}") from error


_HASHED_AT_ONCE_BYTES = 2000
"""For more than 2,047 bytes hashlib gives Python's lock away, for which an engine's thread then waits."""


def prompt_digest(token_ids: Sequence[int], marks: Sequence[str] = ()) -> str:
    """What tells one prompt from another: BLAKE2b of 128 bits over the ids as 32-bit integers.

    `marks` name what else the KV depends on; each follows behind a zero byte.
    """
    digest = hashlib.blake2b(digest_size=16)
    ids = memoryview(array("i", token_ids)).cast("B")
    for start in range(0, len(ids), _HASHED_AT_ONCE_BYTES):
        digest.update(ids[start : start + _HASHED_AT_ONCE_BYTES])
    for mark in marks:
        digest.update(b"\0" + mark.encode())
    return digest.hexdigest()


Question = AskForEngine | Renew | Done | Release | AskSums | AskProgress | Forgo
Answer = Engine | Renewed | DoneNoted | Released | Sums | SumsPending | Progress | Refused

_encoder = msgspec.msgpack.Encoder()
_questions: msgspec.msgpack.Decoder[Question] = msgspec.msgpack.Decoder(Question)
_answers: msgspec.msgpack.Decoder[Answer] = msgspec.msgpack.Decoder(Answer)


def encode(message: Question | Answer) -> tuple[bytes, bytes]:
    """The two frames of a message."""
    return _PREFIX + str(WIRE_VERSION).encode(), _encoder.encode(message)


def decode_question(frames: list[bytes]) -> Question:
    """What decode asks. Raises WireError for another version or anything malformed."""
    return _decode(frames, _questions)


def decode_answer(frames: list[bytes]) -> Answer:
    """What prefill answers. Raises WireError for another version or anything malformed."""
    return _decode(frames, _answers)


def differences(there: msgspec.Struct, here: msgspec.Struct) -> list[str]:
    """For each field in which two of a class differ, its name and both values; None fits everything."""
    return [
        f"{name} is {getattr(there, name)!r} there and {getattr(here, name)!r} here"
        for name in here.__struct_fields__
        if None not in (getattr(there, name), getattr(here, name))
        and getattr(there, name) != getattr(here, name)
    ]


def _decode(frames: list[bytes], decoder: msgspec.msgpack.Decoder[T]) -> T:
    if len(frames) != 2:
        raise WireError(f"a message has 2 frames, got {len(frames)}; the peer is no vllm-ascend engine")
    version, body = frames
    if version != _PREFIX + str(WIRE_VERSION).encode():
        raise WireError(
            f"the peer speaks {version[:40].decode(errors='replace')!r} and this engine "
            f"'{_PREFIX.decode()}{WIRE_VERSION}'; run the same release of vllm-ascend on both sides"
        )
    try:
        return decoder.decode(body)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        # The last two are msgspec's words for text that is not UTF-8 and for lists within lists without end.
        raise WireError(f"a message could not be read: {error}") from error
