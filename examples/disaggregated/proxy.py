# SPDX-License-Identifier: Apache-2.0
"""A router for prefill and decode engines: each request goes to one of the first, then to one of the second.

The prefill engine gets the request with `max_tokens` 1 and a request for remote decode; what it answers
under `kv_transfer_params` says where the KV cache of the prompt is, and goes to the decode engine untouched.
The decode engine pulls the KV cache itself: no KV byte passes through here. Engines are taken in turn. When a
client leaves, both engines let go of its request. Several prompts in one request go to a decode engine alone.

    python proxy.py --prefill 127.0.0.1:8100 --decode 127.0.0.1:8200 127.0.0.1:8201 --port 8000
"""

import argparse
import asyncio
import itertools
import json
import uuid
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
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
NOT_FOR_ONE_TOKEN = ("min_tokens", "stream_options", "max_completion_tokens", "n", "best_of")


def build_app(prefill: list[str], decode: list[str]) -> FastAPI:
    """The router over engines given as `host:port`."""

    @asynccontextmanager
    async def open_client(app: FastAPI) -> AsyncIterator[None]:
        # No time limit on reading: a long prompt, or a full queue, may take minutes before the first byte.
        timeout = httpx.Timeout(None, connect=10)
        async with httpx.AsyncClient(timeout=timeout, limits=httpx.Limits(max_connections=None)) as client:
            app.state.client = client
            yield

    app = FastAPI(title="prefill and decode router", lifespan=open_client)
    prefill_in_turn, decode_in_turn = itertools.cycle(prefill), itertools.cycle(decode)

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
        return await _route(request, prefill_in_turn, decode_in_turn)

    return app


async def _route(request: Request, prefill_in_turn: Iterator[str], decode_in_turn: Iterator[str]) -> Response:
    body: dict[str, Any] = await request.json()
    client: httpx.AsyncClient = request.app.state.client
    headers = {"X-Request-Id": request.headers.get("X-Request-Id", str(uuid.uuid4()))}
    if authorization := request.headers.get("Authorization"):
        headers["Authorization"] = authorization
    left = asyncio.create_task(_client_leaves(request))
    try:
        if not _has_several_prompts(body):
            prefill = f"http://{next(prefill_in_turn)}{request.url.path}"
            params = await _prefill(client, prefill, body, headers)
            if isinstance(params, Response):
                return params
            # The prefill engine holds blocks until a decode engine has asked for them.
            body = (_one_token_of(body) if left.done() else body) | {"kv_transfer_params": params}
        decode = f"http://{next(decode_in_turn)}{request.url.path}"
        asked = client.build_request("POST", decode, json=body, headers=headers)
        return await _answer_of(client, asked, None if left.done() else left)
    finally:
        left.cancel()


async def _prefill(
    client: httpx.AsyncClient, url: str, body: dict[str, Any], headers: dict[str, str]
) -> dict[str, Any] | Response | None:
    """The `kv_transfer_params` of the prefill engine's answer; its error, or ours, as a response."""
    asked = _one_token_of(body) | {"kv_transfer_params": ASK_FOR_REMOTE_DECODE}
    try:
        answer = await client.post(url, json=asked, headers=headers)
    except httpx.TransportError as error:
        return _unreachable(url, error)
    if answer.is_error:
        return Response(answer.content, answer.status_code, media_type="application/json")
    params: dict[str, Any] | None = answer.json().get("kv_transfer_params")
    return params


async def _answer_of(
    client: httpx.AsyncClient, asked: httpx.Request, left: asyncio.Task[None] | None
) -> Response:
    """The decode engine's answer; if `left` ends first, it is hung up on, and drops the request."""
    sending = asyncio.create_task(client.send(asked, stream=True))
    await asyncio.wait({sending} if left is None else {sending, left}, return_when=asyncio.FIRST_COMPLETED)
    if not sending.done():
        sending.cancel()
        return Response(status_code=499)  # nobody reads it
    try:
        answer = sending.result()
    except httpx.TransportError as error:
        return _unreachable(str(asked.url), error)
    return StreamingResponse(
        _relay(answer), answer.status_code, media_type=answer.headers.get("Content-Type", "application/json")
    )


async def _client_leaves(request: Request) -> None:
    """Return when the client hangs up."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _has_several_prompts(body: dict[str, Any]) -> bool:
    """Whether it is one for decode alone: prefill's answer says of one prompt only where its KV is."""
    prompt = body.get("prompt")
    return isinstance(prompt, list) and len(prompt) > 1 and not isinstance(prompt[0], int)


def _one_token_of(body: dict[str, Any]) -> dict[str, Any]:
    kept = {name: value for name, value in body.items() if name not in NOT_FOR_ONE_TOKEN}
    return kept | {"max_tokens": 1, "stream": False}


async def _relay(answer: httpx.Response) -> AsyncIterator[bytes]:
    # Closing also runs when the client leaves, so that the decode engine drops the request.
    try:
        async for chunk in answer.aiter_bytes():
            yield chunk
    except httpx.TransportError as error:
        message = json.dumps({"error": {"message": f"the decode engine left before the end: {error!r}"}})
        streams = "event-stream" in answer.headers.get("Content-Type", "")
        yield f"data: {message}\n\n".encode() if streams else message.encode()
    finally:
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
    options = parser.parse_args()
    uvicorn.run(
        build_app(options.prefill, options.decode), host=options.host, port=options.port, log_level="warning"
    )


if __name__ == "__main__":
    main()
