"""What the server lets in, without a server: keys, limits, and our fields on their way to vLLM."""

import asyncio
import json

import pytest

from optimal_sampling.config import MixtureConfig
from optimal_sampling.engines.vllm.gate import Gate, GateSettings, Refusal, admit_body
from optimal_sampling.engines.vllm.options import OPTIONS, OTHER_IDS, RequestOptions
from optimal_sampling.errors import ConfigError
from optimal_sampling.vocabulary import Vocabulary

KEY = "a key"


@pytest.fixture(scope="module")
def settings():
    vocabulary = Vocabulary.load("toy-student", "toy-teacher", False)
    return GateSettings(
        vocabulary, MixtureConfig(alpha_min=0.25), 512, KEY, max_n=8, max_body_bytes=2000
    )


def ask(settings, path, body=b"", method="POST", key=KEY):
    """(status, answer) of the gate before an app that answers 200 with what it was given."""
    sent = []

    async def app(scope, receive, send):
        message = await receive() if scope["method"] == "POST" else {"body": b"{}"}
        length = dict(scope["headers"]).get(b"content-length")
        assert length is None or int(length) == len(message["body"])
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": message["body"]})

    async def receive():
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(message):
        sent.append(message)

    headers = [(b"authorization", f"Bearer {key}".encode())] if key else []
    gate = type("ThisGate", (Gate,), {"settings": settings})(app)
    asyncio.run(
        gate({"type": "http", "method": method, "path": path, "headers": headers}, receive, send)
    )
    return sent[0]["status"], json.loads(sent[1]["body"])


def test_the_key_is_asked_for_everywhere_but_at_health(settings):
    """Guards: needs.md 22: routes beside /v1 that vLLM leaves open."""
    for path in ("/v1/models", "/metrics", "/version", "/tokenize", "/docs", "/anything"):
        for key in (None, "wrong", KEY + "x"):
            status, answer = ask(settings, path, method="GET", key=key)
            assert status == 401
            assert answer["error"]["code"] == "invalid_api_key"
    assert ask(settings, "/health", method="GET", key=None)[0] == 200
    assert KEY not in repr(settings)


def test_routes_that_would_not_draw_from_q_are_closed(settings):
    """Guards: other ways into vLLM, past our options."""
    for path in (
        "/inference/v1/generate",
        "/v1/responses",
        "/v1/messages",
        "/pause",
        "/v1/load_lora_adapter",
    ):
        assert ask(settings, path, b"{}")[0] == 404


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"{", 400),
        (b"[1]", 400),
        (b"\xff", 400),
        (b"[" * 1500, 400),
        (b'{"prompt": "' + b"x" * 3000, 413),
    ],
)
def test_malformed_bodies(settings, body, status):
    """Guards: a traceback, or a body of any size read into memory."""
    given, answer = ask(settings, "/v1/completions", body)
    assert given == status
    assert set(answer["error"]) == {"message", "type", "param", "code"}


def test_our_fields_become_extra_arguments(settings):
    """Guards: a field that vLLM drops with a warning, as it does with all it does not know."""
    body = {
        "prompt": "1+1=?",
        "student_prompt": "?",
        "alpha_method": "fixed",
        "fixed_alpha": 0.3,
        "temperature": 0.5,
    }
    passed = admit_body(body, False, settings)
    assert not {"student_prompt", "alpha_method", "fixed_alpha"} & passed.keys()
    assert set(settings.vocabulary.stop_ids) <= set(passed["stop_token_ids"])
    assert passed["vllm_xargs"][OTHER_IDS] == list(
        settings.vocabulary.student_tokenizer("?")["input_ids"]
    )
    read = RequestOptions.read(passed["vllm_xargs"], 0.5, settings.mixture)
    expected = MixtureConfig(alpha_method="fixed", fixed_alpha=0.3, alpha_min=0.25, temperature=0.5)
    assert read.mixture == expected
    alone = admit_body({"prompt": "x", "use_optimal_sampling": False}, False, settings)
    assert RequestOptions.read(alone["vllm_xargs"], 1.0, settings.mixture).mode == "teacher"


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"alpha_min": 2}, "alpha_min"),
        ({"alpha_min": "x"}, "alpha_min"),
        ({"alpha_method": "best"}, "alpha_method"),
        ({"n": 9}, "n"),
        ({"n": 1.5}, "n"),
        ({"max_tokens": 10**6}, "max_tokens"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"use_beam_search": True}, "use_beam_search"),
        ({"use_optimal_sampling": "no"}, "use_optimal_sampling"),
        ({"student_prompt": ""}, "student_prompt"),
        ({"student_prompt": [1, 10**6]}, "student_prompt"),
        ({"student_prompt": [-1]}, "student_prompt"),
        ({"student_prompt": {"a": 1}}, "student_prompt"),
        ({"student_prompt": "9" * 600}, "student_prompt"),
        ({"student_messages": []}, "student_messages"),
        ({"prompt": ["a", "b"], "student_prompt": "c"}, "student_prompt"),
        ({"prompt": ["a"] * 9}, "prompt"),
        ({"student_prompt": "c", "echo": True}, None),
        ({"vllm_xargs": {OPTIONS: "{}"}}, "vllm_xargs"),
        ({"vllm_xargs": 3}, "vllm_xargs"),
        ({"stop_token_ids": 3}, "stop_token_ids"),
    ],
)
def test_wrong_fields_are_refused(settings, body, param):
    """Guards: a wrong option that reaches the worker, where it would end the engine for everybody."""
    with pytest.raises(Refusal) as caught:
        admit_body({"prompt": "1+1=?", **body}, False, settings)
    assert caught.value.status == 400
    assert caught.value.param == param


@pytest.mark.parametrize(
    "fields", [{"alpha_stats": "all"}, {"echo": True}, {"use_optimal_sampling": False}]
)
def test_statistics_that_there_are_not_are_refused(settings, fields):
    """Guards: statistics of tokens that were not drawn from q*."""
    body = json.dumps({"prompt": "1+1=?", "alpha_stats": True, **fields}).encode()
    status, answer = ask(settings, "/v1/completions", body)
    assert status == 400
    assert answer["error"]["param"] == "alpha_stats"


def test_serving_to_others_needs_a_key():
    """Guards: an open server on every interface; temperatures that the server would silently not apply."""
    from optimal_sampling.serve import ServeConfig, serve

    with pytest.raises(ConfigError, match="API key"):
        serve(ServeConfig(host="0.0.0.0"), {})
    with pytest.raises(ConfigError, match="temperature"):
        ServeConfig(mixture=MixtureConfig(temperature=0.5))
