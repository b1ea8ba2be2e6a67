"""The middleware before an application that answers with what it was given."""

import json
from types import SimpleNamespace

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


@pytest.fixture(scope="module")
def http(settings):
    app = Starlette(middleware=[Middleware(RequestMiddleware)])
    app.mount("/", echo)
    app.state.args = SimpleNamespace(optimal_sampling=settings)
    return TestClient(app, headers={"authorization": f"Bearer {KEY}"})


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
    ],
)
def test_malformed_bodies(http, body, status):
    """Guards: a traceback, or a body of any size read into memory."""
    answer = http.post("/v1/completions", content=body)
    assert answer.status_code == status
    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
    assert (answer.headers.get("connection") == "close") == (status == 413)


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
