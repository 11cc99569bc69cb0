# SPDX-License-Identifier: Apache-2.0
"""A router for prefill and decode engines: each request goes to one of the first, then to one of the second.

The prefill engine gets the request with `max_tokens` 1 and a request for remote decode; what it answers
under `kv_transfer_params` says where the KV cache of the prompt is, and goes to the decode engine untouched.
The decode engine pulls the KV cache itself: no KV byte passes through here. Engines are taken in turn. When a
client leaves, both engines let go of its request. Several prompts in one request go to a decode engine alone.

With `--early` both engines get the request at the same time, under a name that the router makes up, and the
decode engine reads the prompt's KV while it is computed. For that the router must know where the prefill
engine listens, which each of its answers says. A server of which several engines answer (data parallel) is
asked first, as without `--early`, since the router does not know which of them will compute a prompt.

    python proxy.py --prefill 127.0.0.1:8100 --decode 127.0.0.1:8200 127.0.0.1:8201 --port 8000
"""

import argparse
import asyncio
import contextlib
import dataclasses
import itertools
import json
import uuid
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

ASK_FOR_REMOTE_DECODE = {
    "do_remote_decode": True,
    "do_remote_prefill": False,
    "remote_engine_id": None,
    "remote_block_ids": None,
    "remote_host": None,
    "remote_port": None,
}
# These say how much to generate, or how to send it; prefill generates one token of one answer, in one piece.
NOT_FOR_PREFILL = ("min_tokens", "stream_options", "max_completion_tokens", "n", "best_of")


@dataclass
class _Prefill:
    """A prefill server, and where its engines were seen to listen."""

    address: str
    engine_ids: dict[tuple[str, int], str] = field(default_factory=dict)
    """The engine at each listener; one that was restarted has another id there."""

    def learn(self, params: dict[str, Any]) -> None:
        """What an answer says of the engine that gave it."""
        self.engine_ids[params["remote_host"], params["remote_port"]] = params["remote_engine_id"]

    def the_engine(self) -> dict[str, Any] | None:
        """What decode must know of the server's engine; None if it is not known, or not the only one."""
        if len(self.engine_ids) != 1:
            return None
        (((host, port), engine_id),) = self.engine_ids.items()
        return {"remote_engine_id": engine_id, "remote_host": host, "remote_port": port}


def build_app(prefill: list[str], decode: list[str], early: bool = False) -> FastAPI:
    """The router over engines given as `host:port`; `early`: both get a request at the same time."""

    @asynccontextmanager
    async def open_client(app: FastAPI) -> AsyncIterator[None]:
        # No time limit on reading: a long prompt, or a full queue, may take minutes before the first byte.
        timeout = httpx.Timeout(None, connect=10)
        async with httpx.AsyncClient(timeout=timeout, limits=httpx.Limits(max_connections=None)) as client:
            app.state.client = client
            yield

    app = FastAPI(title="prefill and decode router", lifespan=open_client)
    prefill_in_turn = itertools.cycle([_Prefill(address) for address in prefill])
    decode_in_turn = itertools.cycle(decode)

    @app.get("/health")
    async def health(request: Request) -> Response:
        """200 when every engine behind the router answers; otherwise the ones that do not."""
        silent = [
            engine for engine in (*prefill, *decode) if not await _alive(request.app.state.client, engine)
        ]
        return JSONResponse({"silent": silent}, status_code=503 if silent else 200)

    @app.get("/v1/models")
    async def models(request: Request) -> Response:
        answer = await request.app.state.client.get(f"http://{decode[0]}/v1/models")
        return Response(answer.content, answer.status_code, media_type="application/json")

    @app.post("/v1/completions")
    @app.post("/v1/chat/completions")
    async def generate(request: Request) -> Response:
        return await _route(request, prefill_in_turn, decode_in_turn, early)

    return app


async def _route(
    request: Request, prefill_in_turn: Iterator[_Prefill], decode_in_turn: Iterator[str], early: bool
) -> Response:
    body: dict[str, Any] = await request.json()
    client: httpx.AsyncClient = request.app.state.client
    headers = {"X-Request-Id": request.headers.get("X-Request-Id", str(uuid.uuid4()))}
    if authorization := request.headers.get("Authorization"):
        headers["Authorization"] = authorization
    path = request.url.path
    left = asyncio.create_task(_client_leaves(request))
    try:
        if _has_several_prompts(body):
            handover = _Handover(client, f"http://{next(decode_in_turn)}{path}", body, headers)
            return await _answer_of(handover, left)
        prefill = next(prefill_in_turn)
        engine = prefill.the_engine() if early else None
        if engine is None:
            params = await _ask_prefill(client, prefill, path, body, headers)
            if isinstance(params, Response):
                return params
            body = body | {"kv_transfer_params": params}
            handover = _Handover(client, f"http://{next(decode_in_turn)}{path}", body, headers)
            return await _answer_of(handover, left)
        name = uuid.uuid4().hex
        told = {"do_remote_prefill": True, "do_remote_decode": False, "transfer_name": name, **engine}
        url = f"http://{next(decode_in_turn)}{path}"
        handover = _Handover(client, url, body | {"kv_transfer_params": told}, headers)
        computing = asyncio.create_task(_ask_prefill(client, prefill, path, body, headers, name))
        return await _answer_of_both(handover, computing, left)
    finally:
        left.cancel()


async def _ask_prefill(
    client: httpx.AsyncClient,
    prefill: _Prefill,
    path: str,
    body: dict[str, Any],
    headers: dict[str, str],
    name: str | None = None,
) -> dict[str, Any] | Response | None:
    """The `kv_transfer_params` of the prefill engine's answer; its error, or ours, as a response.

    `name`: what decode calls the request, which it was told of already.
    """
    url = f"http://{prefill.address}{path}"
    kept = {key: value for key, value in body.items() if key not in NOT_FOR_PREFILL}
    asked = ASK_FOR_REMOTE_DECODE | ({} if name is None else {"transfer_name": name})
    try:
        answer = await client.post(
            url, json=kept | {"max_tokens": 1, "stream": False, "kv_transfer_params": asked}, headers=headers
        )
    except httpx.TransportError as error:
        # Whoever answers there next may be another.
        prefill.engine_ids.clear()
        return _unreachable(url, error)
    if answer.is_error:
        return Response(answer.content, answer.status_code, media_type="application/json")
    params: dict[str, Any] | None = answer.json().get("kv_transfer_params")
    if params and "remote_engine_id" in params:
        prefill.learn(params)
    return params


@dataclass(frozen=True)
class _Handover:
    """A prefilled request, as a decode engine gets it."""

    client: httpx.AsyncClient
    url: str
    body: dict[str, Any]
    headers: dict[str, str]

    async def send(self) -> httpx.Response:
        """The decode engine's answer, as far as its headers."""
        request = self.client.build_request("POST", self.url, json=self.body, headers=self.headers)
        return await self.client.send(request, stream=True)

    async def give_up(self) -> None:
        """Have the prefill engine free what it holds for the request.

        A decode engine that is hung up on may not have read the request, and then tells nobody. One that
        refuses a request does tell the prefill engine; so it is sent one to refuse.
        """
        if self.body.get("kv_transfer_params"):
            refused = self.body | {"model": "none: the client has left", "stream": False}
            with contextlib.suppress(httpx.TransportError):  # the end of the lease frees the blocks then
                await self.client.post(self.url, json=refused, headers=self.headers)


async def _answer_of(
    handover: _Handover, left: asyncio.Task[None], sending: asyncio.Task[httpx.Response] | None = None
) -> Response:
    """The decode engine's answer; if `left` ends first, the engine is hung up on, and drops the request.

    `sending`: the request, if it is under way already.
    """
    if sending is None and not left.done():
        sending = asyncio.create_task(handover.send())
    if sending is not None:
        await asyncio.wait({sending, left}, return_when=asyncio.FIRST_COMPLETED)
        if sending.done():
            try:
                answer = sending.result()
            except httpx.TransportError as error:
                return _unreachable(handover.url, error)
            media_type = answer.headers.get("Content-Type", "application/json")
            return StreamingResponse(_relay(answer, handover), answer.status_code, media_type=media_type)
        sending.cancel()
    await handover.give_up()
    return Response(status_code=499)  # nobody reads it


async def _answer_of_both(
    handover: _Handover, computing: asyncio.Task[dict[str, Any] | Response | None], left: asyncio.Task[None]
) -> Response:
    """The decode engine's answer to a request that the prefill engine is computing.

    Nothing of it is passed on before the prefill engine has answered: it may be another than the one that
    decode was told of, and then decode gets the request again, with that answer.
    """
    sending = asyncio.create_task(handover.send())
    try:
        waiting: set[asyncio.Task[Any]] = {computing, sending, left}
        while not (computing.done() or left.done() or _went_wrong(sending)):
            done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            waiting -= done
        if left.done() or not computing.done():
            return await _answer_of(handover, left, sending)
        params = computing.result()
        told = handover.body["kv_transfer_params"]
        if isinstance(params, dict) and params.get("remote_engine_id") == told["remote_engine_id"]:
            return await _answer_of(handover, left, sending)
        await _hang_up(sending)
        if isinstance(params, Response):
            return params
        body = handover.body | {"kv_transfer_params": params}
        return await _answer_of(dataclasses.replace(handover, body=body), left)
    finally:
        computing.cancel()


def _went_wrong(sending: asyncio.Task[httpx.Response]) -> bool:
    """Whether the decode engine has refused the request, or cannot be reached."""
    return sending.done() and (sending.exception() is not None or sending.result().is_error)


async def _hang_up(sending: asyncio.Task[httpx.Response]) -> None:
    if not sending.cancel() and sending.exception() is None:
        await sending.result().aclose()


async def _client_leaves(request: Request) -> None:
    """Return when the client hangs up."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _has_several_prompts(body: dict[str, Any]) -> bool:
    """Whether it is one for decode alone: prefill's answer says of one prompt only where its KV is."""
    prompt = body.get("prompt")
    return isinstance(prompt, list) and len(prompt) > 1 and not isinstance(prompt[0], int)


_giving_up: set[asyncio.Task[None]] = set()
"""Kept, since the event loop does not keep its tasks alive."""


async def _relay(answer: httpx.Response, handover: _Handover) -> AsyncIterator[bytes]:
    ended = False
    try:
        async for chunk in answer.aiter_bytes():
            yield chunk
        ended = True
    except httpx.TransportError as error:
        ended = True
        message = json.dumps({"error": {"message": f"the decode engine left before the end: {error!r}"}})
        streams = "event-stream" in answer.headers.get("Content-Type", "")
        yield f"data: {message}\n\n".encode() if streams else message.encode()
    finally:
        if not ended:  # the client has left, and this task may wait for nothing any more
            task = asyncio.create_task(handover.give_up())
            _giving_up.add(task)
            task.add_done_callback(_giving_up.discard)
        await answer.aclose()


async def _alive(client: httpx.AsyncClient, engine: str) -> bool:
    try:
        return (await client.get(f"http://{engine}/health")).is_success
    except httpx.TransportError:
        return False


def _unreachable(url: str, error: httpx.TransportError) -> Response:
    message = (
        f"the router asked {url} and found {error!r}; start that engine, or take it off the router's list"
    )
    return JSONResponse({"error": {"message": message}}, status_code=502)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--prefill", nargs="+", required=True, metavar="HOST:PORT")
    parser.add_argument("--decode", nargs="+", required=True, metavar="HOST:PORT")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument(
        "--early",
        action="store_true",
        help="send each request to both engines at once, so that decode reads the prompt's KV while prefill "
        "computes it",
    )
    options = parser.parse_args()
    app = build_app(options.prefill, options.decode, options.early)
    uvicorn.run(app, host=options.host, port=options.port, log_level="warning")


if __name__ == "__main__":
    main()
