# SPDX-License-Identifier: Apache-2.0
"""A router for prefill and decode engines: each request goes to one of the first, then to one of the second.

The prefill engine gets the request with `max_tokens` 1 and a request for remote decode; what it answers
under `kv_transfer_params` says where the KV cache of the prompt is, and goes to the decode engine untouched.
The decode engine pulls the KV cache itself: no KV byte passes through here. Engines are taken in turn.

    python proxy.py --prefill 127.0.0.1:8100 --decode 127.0.0.1:8200 127.0.0.1:8201 --port 8000
"""

import argparse
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
# These say how much to generate, or how to send it; prefill generates one token and answers in one piece.
NOT_FOR_PREFILL = ("min_tokens", "stream_options", "max_completion_tokens")


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

    prefill = f"http://{next(prefill_in_turn)}{request.url.path}"
    try:
        answer = await client.post(prefill, json=_prefill_body(body), headers=headers)
    except httpx.TransportError as error:
        return _unreachable(prefill, error)
    if answer.is_error:
        return Response(answer.content, answer.status_code, media_type="application/json")

    decode = f"http://{next(decode_in_turn)}{request.url.path}"
    decode_body = body | {"kv_transfer_params": answer.json().get("kv_transfer_params")}
    try:
        answer = await client.send(
            client.build_request("POST", decode, json=decode_body, headers=headers), stream=True
        )
    except httpx.TransportError as error:
        return _unreachable(decode, error)
    return StreamingResponse(
        _relay(answer), answer.status_code, media_type=answer.headers.get("Content-Type", "application/json")
    )


def _prefill_body(body: dict[str, Any]) -> dict[str, Any]:
    kept = {name: value for name, value in body.items() if name not in NOT_FOR_PREFILL}
    return kept | {"max_tokens": 1, "stream": False, "kv_transfer_params": ASK_FOR_REMOTE_DECODE}


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
