"""The middleware before an application that answers with what it was given."""

import asyncio
import json
import threading
from dataclasses import replace
from types import SimpleNamespace

import httpx
import pytest
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.testclient import TestClient
from starlette.websockets import WebSocketDisconnect

from optimal_sampling.config import MixtureConfig
from optimal_sampling.serve.middleware import RequestMiddleware
from optimal_sampling.serve.request_body import ServerSettings
from optimal_sampling.vocabulary import Vocabulary

KEY = "a key"


async def echo(scope, receive, send):
    """Status 200 and the request's body, whose length is that of the headers."""
    request = Request(scope, receive)
    body = await request.body() or b"{}"
    assert int(request.headers.get("content-length", len(body))) == len(body)
    await Response(body)(scope, receive, send)


@pytest.fixture(scope="module")
def settings():
    vocabulary = Vocabulary.load("toy-student", "toy-teacher", False)
    mixture = MixtureConfig(alpha_min=0.25)
    return ServerSettings(vocabulary, mixture, 512, KEY, max_n=8, max_body_bytes=2000)


class Models:
    """vLLM's list of models."""

    async def show_available_models(self):
        listed = {"object": "list", "data": [{"id": "maker/model", "object": "model"}]}
        return SimpleNamespace(model_dump=lambda: listed)


def application(settings):
    app = Starlette(middleware=[Middleware(RequestMiddleware)])
    app.mount("/", echo)
    app.state.args = SimpleNamespace(optimal_sampling=settings)
    app.state.openai_serving_models = Models()
    return app


@pytest.fixture(scope="module")
def http(settings):
    return TestClient(application(settings), headers={"authorization": f"Bearer {KEY}"})


@pytest.mark.parametrize("key", [None, "wrong", KEY + "x", "a", "\u00e4"])
def test_the_key_is_asked_for_everywhere_but_at_health(http, settings, key):
    """Guards: routes beside /v1 that vLLM leaves open."""
    headers = {"authorization": f"Bearer {key}".encode() if key else b""}
    for path in ("/v1/models", "/metrics", "/version", "/tokenize", "/docs", "/anything"):
        answer = http.get(path, headers=headers)
        assert answer.status_code == 401
        assert answer.json()["error"]["code"] == "invalid_api_key"
        assert http.get(path).status_code == (404 if path in ("/docs", "/anything") else 200)
    assert http.get("/health", headers=headers).status_code == 200
    assert KEY not in repr(settings)


@pytest.mark.parametrize(
    "path",
    [
        "/inference/v1/generate",
        "/v1/responses",
        "/v1/messages",
        "/pause",
        "/v1/load_lora_adapter",
    ],
)
def test_routes_that_would_not_draw_from_q_are_closed(http, path):
    """Guards: other ways into vLLM, past our options."""
    assert http.post(path, content=b"{}").status_code == 404


def test_websockets_are_closed(http):
    """Guards: vLLM's real-time route, which nothing here reads."""
    with pytest.raises(WebSocketDisconnect), http.websocket_connect("/v1/realtime"):
        pass


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"{", 400),
        (b"[1]", 400),
        (b"\xff", 400),
        (b"[" * 1500, 400),
        (b'{"prompt": "' + b"x" * 3000, 413),
        (b'{"prompt": "1", "student_prompt": "\\ud800", "n": "\\ud800"}', 400),
        (b'{"prompt": "\\ud800"}', 400),
        (b'{"prompt": "\xed\xa0\x80"}', 400),
        (b'{"prompt": "1", "\\udfff": 1}', 400),
    ],
)
def test_malformed_bodies(http, body, status):
    """Guards: a traceback, or a body of any size read into memory."""
    answer = http.post("/v1/completions", content=body)
    assert answer.status_code == status
    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
    assert (answer.headers.get("connection") == "close") == (status == 413)


def test_half_a_surrogate_pair_is_no_text_on_any_route(http):
    """Guards: a traceback of vLLM's tokenizer."""
    for path in ("/tokenize", "/v1/chat/completions"):
        body = b'{"prompt": "\\ud800", "messages": [{"role": "user", "content": "\\ud800"}]}'
        answer = http.post(path, content=body)
        assert answer.status_code == 400
        assert "surrogate" in answer.json()["error"]["message"]


def test_a_body_that_comes_in_parts_is_bounded(http):
    """Guards: a limit that is only asked of the header `content-length`."""
    answer = http.post("/v1/completions", content=iter([b"x" * 900] * 3))
    assert answer.status_code == 413


def test_a_translated_body_is_what_vllm_reads(http):
    """Guards: the old body or its length; fields that vLLM does not know."""
    answer = http.post("/v1/completions", json={"prompt": "1+1=?", "fixed_alpha": 0.3})
    assert answer.status_code == 200
    assert json.loads(answer.json()["vllm_xargs"]["optimal_sampling"])["mixture"] == {
        "fixed_alpha": 0.3
    }
    assert http.post("/tokenize", json={"prompt": "1"}).json() == {"prompt": "1"}


@pytest.mark.parametrize(
    "fields", [{"alpha_stats": "all"}, {"echo": True}, {"use_optimal_sampling": False}]
)
def test_statistics_that_there_are_not_are_refused(http, fields):
    """Guards: statistics of tokens that were not drawn from q*."""
    body = {"prompt": "1+1=?", "alpha_stats": True, **fields}
    answer = http.post("/v1/completions", json=body)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "alpha_stats"


def test_one_model_is_retrieved_by_its_name(http):
    """Guards: `client.models.retrieve`, which vLLM answers with 404 for every name."""
    for path in ("/v1/models/maker/model", "/v1/models/maker%2Fmodel"):
        assert http.get(path).json() == {"id": "maker/model", "object": "model"}
    missing = http.get("/v1/models/other")
    assert missing.status_code == 404
    assert missing.json()["error"]["type"] == "not_found_error"
    assert http.get("/v1/models/maker/model", headers={"authorization": ""}).status_code == 401


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("127.0.0.1:8000", 200),
        ("localhost", 200),
        ("[::1]:8000", 200),
        ("evil.example:8000", 403),
        ("", 403),
    ],
)
def test_a_foreign_host_needs_a_key(settings, http, host, status):
    """Guards: a web page that gives this machine's address to its own name (DNS rebinding)."""
    keyless = TestClient(application(replace(settings, api_key=None)))
    assert keyless.get("/v1/models", headers={"host": host}).status_code == status
    assert http.get("/v1/models", headers={"host": host}).status_code == 200


def test_other_requests_are_answered_while_a_long_text_is_tokenized(settings):
    """Guards: an event loop that stands still, `/health` included."""
    at_work, go_on = threading.Event(), threading.Event()

    class Slow:
        get_vocab = settings.vocabulary.student_tokenizer.get_vocab

        def __call__(self, text, **options):
            at_work.set()
            assert go_on.wait(60)
            return {"input_ids": [1]}

    vocabulary = replace(settings.vocabulary, student_tokenizer=Slow())
    app = application(replace(settings, vocabulary=vocabulary, api_key=None))

    async def both():
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            body = {"prompt": "1", "student_prompt": "1"}
            slow = asyncio.create_task(client.post("/v1/completions", json=body))
            await asyncio.to_thread(at_work.wait, 60)
            healthy = await client.get("/health")
            assert not slow.done()
            go_on.set()
            return healthy.status_code, (await slow).status_code

    assert asyncio.run(both()) == (200, 200)
