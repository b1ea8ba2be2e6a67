"""Middleware of vLLM's server: API key, open routes, request bodies, alpha statistics.

Pure ASGI, because Starlette's BaseHTTPMiddleware sits between a stream and the disconnect of its
client, by which vLLM aborts a request.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import urllib.parse
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from starlette.websockets import WebSocketClose

from optimal_sampling.serve.alpha_stats import AlphaStatsRequest, AlphaStatsSender
from optimal_sampling.serve.request_body import (
    CHAT,
    COMPLETIONS,
    RequestError,
    Role,
    Route,
    ServerSettings,
    translate_body,
)

__all__ = ["RequestMiddleware"]

_HEALTH = "/health"
_GENERATE = {route.path: route for route in (COMPLETIONS, CHAT)}
_OPEN_ROUTES = {"/metrics", "/version", "/v1/models", "/tokenize", "/detokenize", *_GENERATE}
_OPEN_PREFIXES = ("/metrics/",)
_MODEL_PREFIX = "/v1/models/"
_THREADS = ThreadPoolExecutor(max_workers=4, thread_name_prefix="request-body")
_ERROR_TYPES = {401: "authentication_error", 403: "permission_denied_error", 404: "not_found_error"}
_POLICY_VIOLATION = 1008  # RFC 6455, section 7.4.1


class RequestMiddleware:
    """Answers a request with an error, or passes it on with the body that vLLM takes.

    Its settings are `app.state.args.optimal_sampling`: vLLM gives a middleware no arguments, and
    keeps the server's own in `app.state.args`.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection."""
        if scope["type"] == "websocket":
            await WebSocketClose(_POLICY_VIOLATION)(scope, receive, send)
            return
        if scope["type"] == "http" and scope["path"] != _HEALTH:
            try:
                request = Request(scope, receive)
                _check_access(request)
                if request.method == "GET" and scope["path"].startswith(_MODEL_PREFIX):
                    await (await _model_card(request))(scope, receive, send)
                    return
                receive, send = await _prepare(request, send)
            except RequestError as error:
                await _error_response(error)(scope, receive, send)
                return
            except ClientDisconnect:
                return
        await self.app(scope, receive, send)


def _settings(request: Request) -> ServerSettings:
    settings: ServerSettings = request.app.state.args.optimal_sampling
    return settings


def _chat_settings(request: Request, loop: asyncio.AbstractEventLoop) -> ServerSettings:
    """The settings with vLLM's renderer of chats, which the first request that needs it makes."""
    state = request.app.state
    settings = _settings(request)

    def render(role: Role, body: Mapping[str, Any], name: str) -> tuple[int, ...]:
        from optimal_sampling.serve.chat_renderer import ChatRenderer  # imports vLLM

        if not hasattr(state, "chat_renderer"):
            state.chat_renderer = ChatRenderer(state, settings.tokenizer("student"))
        rendered = state.chat_renderer.token_ids(role, body, name)
        ids: tuple[int, ...] = asyncio.run_coroutine_threadsafe(rendered, loop).result()
        return ids

    return replace(settings, render=render)


def _check_access(request: Request) -> None:
    settings = _settings(request)
    _check_host(request.headers, settings)
    _check_key(request.headers, settings.api_key)


async def _prepare(request: Request, send: Send) -> tuple[Receive, Send]:
    """`receive` and `send` for vLLM, after all checks. Raises RequestError."""
    settings = _settings(request)
    path = request.scope["path"]
    if path not in _OPEN_ROUTES and not path.startswith(_OPEN_PREFIXES):
        raise RequestError(f"there is no route {path}", status=404)
    if request.method != "POST":
        return request.receive, send
    body = await _read_body(request, settings.max_body_bytes)
    headers = MutableHeaders(scope=request.scope)
    route = _GENERATE.get(path)
    loop = asyncio.get_running_loop()
    if route is CHAT:
        settings = _chat_settings(request, loop)
    body, stats = await loop.run_in_executor(_THREADS, _translate, body, route, settings)
    if stats is not None:
        del headers["x-request-id"]  # vLLM would prefer it to the field `request_id`
        send = AlphaStatsSender(stats, request.app.state.engine_client, send)
    headers["content-length"] = str(len(body))
    return _replay(body, request.receive), send


def _translate(
    body: bytes, route: Route | None, settings: ServerSettings
) -> tuple[bytes, AlphaStatsRequest | None]:
    """The body for vLLM, and the request for statistics. Raises RequestError.

    Chat templates and tokenizers take seconds for a text of megabytes, so this runs in a thread.
    """
    parsed = _parse_object(body)
    if route is None:
        return body, None
    stats = AlphaStatsRequest.from_body(parsed, route)
    translated = translate_body(parsed, route, settings)
    if stats is not None:
        translated |= stats.vllm_fields()
    return json.dumps(translated).encode(), stats


async def _model_card(request: Request) -> Response:
    """The model whose name is the rest of the path, in the form of vLLM's list of models."""
    name = request.scope["path"].removeprefix(_MODEL_PREFIX)
    models = await request.app.state.openai_serving_models.show_available_models()
    for model in models.model_dump()["data"]:
        if model["id"] == name:
            return Response(json.dumps(model), media_type="application/json")
    raise RequestError(f"the model {name!r} does not exist", "model", 404)


def _check_host(headers: Headers, settings: ServerSettings) -> None:
    """Raise RequestError for a request from a web page that has this address under its own name.

    That needs no check where requests have a key, which such a page does not know.
    """
    host = urllib.parse.urlsplit(f"//{headers.get('host', '')}").hostname
    if settings.api_key is None and host not in settings.hosts:
        raise RequestError(
            f"the header `Host` must be one of {', '.join(sorted(settings.hosts))}", status=403
        )


def _check_key(headers: Headers, key: str | None) -> None:
    if key is None:
        return
    scheme, _, token = headers.get("authorization", "").partition(" ")
    given = token.strip(" ").encode("latin-1")
    if scheme.lower() != "bearer" or not hmac.compare_digest(given, key.encode()):
        raise RequestError(
            "wrong or missing API key; send it as `Authorization: Bearer KEY`", status=401
        )


async def _read_body(request: Request, limit: int) -> bytes:
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > limit:
            raise RequestError(f"the request body is larger than {limit} bytes", status=413)
    return bytes(body)


def _parse_object(body: bytes) -> dict[str, Any]:
    try:
        parsed = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise RequestError("the request body is not JSON") from error
    if not isinstance(parsed, dict):
        raise RequestError("the request body must be a JSON object")
    try:
        json.dumps(parsed, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise RequestError(
            "the request body has half a surrogate pair, which is no text"
        ) from error
    return parsed


def _replay(body: bytes, receive: Receive) -> Receive:
    """A `receive` that gives this body once, and then what the client sends: its disconnect."""
    messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Message:
        return messages.pop() if messages else await receive()

    return replay


def _error_response(error: RequestError) -> Response:
    """A response in the form of OpenAI's errors. Not JSONResponse: it fails on lone surrogates."""
    content = {
        "message": error.message,
        "type": _ERROR_TYPES.get(error.status, "invalid_request_error"),
        "param": error.param,
        "code": "invalid_api_key" if error.status == 401 else None,
    }
    headers = {"connection": "close"} if error.status == 413 else None
    body = json.dumps({"error": content})
    return Response(body, error.status, headers, "application/json")
