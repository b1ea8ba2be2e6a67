"""Alpha statistics in answers and streams, without a server."""

import asyncio
import json
import math

import pytest

from optimal_sampling.serve.alpha_stats import AlphaStatsRequest, AlphaStatsSender
from optimal_sampling.serve.request_body import CHAT, COMPLETIONS
from optimal_sampling.types import TRACE_FIELDS

JSON = [(b"content-type", b"application/json"), (b"content-length", b"1")]
STREAM = [(b"content-type", b"text/event-stream; charset=utf-8")]


def row(alpha, clamped=0.0, kl_student=0.25, kl_teacher=0.5, curvature=1.0):
    values = {
        "alpha": alpha,
        "clamped": clamped,
        "curvature": curvature,
        "kl_student": kl_student,
        "kl_teacher": kl_teacher,
    }
    return [values.get(name, math.nan) for name in TRACE_FIELDS]


TRACES = {
    0: ([row(0.5), row(1.0, clamped=1.0, curvature=3.0), row(0.0)], ""),
    1: ([row(0.25, kl_student=math.inf)], ""),
}


def passed(asked, headers, parts, status=200):
    """Start and body that a client gets of an answer in these parts; prefixes that were fetched."""
    sent, fetched = [], []

    async def send(message):
        sent.append(message)

    class EngineClient:
        async def collective_rpc(self, method, args):
            assert method == "take_traces_by_prefix"
            fetched.extend(args[0])
            return [{prefix: TRACES[int(prefix.split("_")[0])] for prefix in args[0]}]

    async def answer():
        report = AlphaStatsSender(asked, EngineClient(), send)
        await report({"type": "http.response.start", "status": status, "headers": list(headers)})
        for place, part in enumerate(parts):
            more = place < len(parts) - 1
            await report({"type": "http.response.body", "body": part, "more_body": more})

    asyncio.run(answer())
    return sent[0], b"".join(message["body"] for message in sent[1:]), fetched


def choice(index, tokens, reason):
    return {"index": index, "text": "é", "token_ids": tokens, "finish_reason": reason}


def test_a_whole_answer_in_parts():
    """Guards: a length that is the old body's, and rows of drafts beyond the last token."""
    asked = AlphaStatsRequest(COMPLETIONS, n=2, history=True, request_id="x")
    body = json.dumps(
        {"id": "1", "choices": [choice(0, [5, 6], "stop"), choice(1, [7], "length")]}
    ).encode()
    start, given, fetched = passed(asked, JSON, [body[:30], body[30:31], body[31:], b""])
    assert fetched == ["0_cmpl-x-0-", "1_cmpl-x-0-"]
    assert dict(start["headers"])[b"content-length"] == str(len(given)).encode()
    first, second = json.loads(given)["choices"]
    assert first["text"] == "é"
    assert first["alpha_stats"] == {
        "mean": 0.75,
        "weighted_mean": 0.875,
        "std": 0.25,
        "min": 0.5,
        "max": 1.0,
        "count": 2,
        "clamped": 0.5,
        "kl_student": 0.25,
        "kl_teacher": 0.5,
        "history": {
            "alpha": [0.5, 1.0],
            "clamped": [0.0, 1.0],
            "curvature": [1.0, 3.0],
            "kl_student": [0.25, 0.25],
            "kl_teacher": [0.5, 0.5],
        },
    }
    assert second["alpha_stats"]["kl_student"] is None  # infinite; JSON has no word for it


@pytest.mark.parametrize("width", [1, 7, 10**6])
def test_a_stream_cut_anywhere(width):
    """Guards: events that come in pieces, and statistics in any piece but a choice's last."""
    asked = AlphaStatsRequest(CHAT, n=2, history=False, request_id="x")
    pieces = [
        choice(0, [5], None),
        choice(1, [7], "stop"),
        choice(0, [6], None),
        choice(0, [], "stop"),
    ]
    events = [b"data: " + json.dumps({"choices": [each]}).encode() for each in pieces]
    text = b"\n\n".join(
        [*events[:2], b": keep-alive", *events[2:], b'data: {"choices": []}', b"data: [DONE]", b""]
    )
    parts = [text[i : i + width] for i in range(0, len(text), width)]
    _, given, fetched = passed(asked, STREAM, parts)
    assert fetched == ["1_chatcmpl-x-", "0_chatcmpl-x-"]
    lines = given.split(b"\n\n")
    assert lines[2] == b": keep-alive"
    assert lines[-2:] == [b"data: [DONE]", b""]
    choices = [json.loads(line[6:])["choices"][0] for line in (*lines[:2], *lines[3:5])]
    assert ["alpha_stats" in each for each in choices] == [False, True, False, True]
    assert choices[3]["alpha_stats"]["count"] == 2
    assert choices[1]["alpha_stats"]["mean"] == 0.25


def test_errors_pass_unchanged():
    """Guards: an error held back, or taken for an answer."""
    asked = AlphaStatsRequest(COMPLETIONS, n=1, history=False)
    start, given, fetched = passed(asked, JSON, [b'{"error": 1}'], status=400)
    assert (start["status"], given, fetched) == (400, b'{"error": 1}', [])


def test_statistics_of_too_few_tokens_say_so():
    """Guards: means of no token, or of a part, after vLLM has changed its request ids."""
    asked = AlphaStatsRequest(COMPLETIONS, n=2, history=False)
    body = json.dumps({"choices": [choice(1, [7, 8], "length")]}).encode()
    _, given, _ = passed(asked, JSON, [body])
    [only] = json.loads(given)["choices"]
    assert only["alpha_stats"]["count"] == 1
    assert only["alpha_stats"]["error"] == "vLLM's worker has the values of 1 of 2 tokens"
