"""Alpha statistics in responses, for requests with the field `alpha_stats`.

Such a request gets an id of its own in vLLM. When a choice is finished, the traces of that id are
fetched from the worker and their summary is written into the choice.
"""

from __future__ import annotations

import json
import math
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import Message, Send

from optimal_sampling.engines.vllm.trace_store import TraceRows, Traces, alpha_summary
from optimal_sampling.serve.request_body import ALPHA_STATS, COMPLETIONS, RequestError, Route
from optimal_sampling.types import TRACE_FIELDS

__all__ = ["AlphaStatsRequest", "AlphaStatsSender", "summarize"]

_HISTORY = ("alpha", "clamped", "curvature", "kl_student", "kl_teacher")
_MEANS = ("kl_student", "kl_teacher")


@dataclass(frozen=True)
class AlphaStatsRequest:
    """A request for statistics."""

    route: Route
    n: int
    """Choices per prompt."""
    history: bool
    """Whether the values of every token are asked for."""
    request_id: str = field(default_factory=lambda: uuid.uuid4().hex)

    @classmethod
    def from_body(cls, body: Mapping[str, Any], route: Route) -> AlphaStatsRequest | None:
        """From a request's body; None where it asks for no statistics. Raises RequestError."""
        asked = body.get(ALPHA_STATS)
        asked = False if asked is None else asked
        if not isinstance(asked, bool) and asked != "history":
            raise RequestError(f'{ALPHA_STATS} must be true, false or "history"', ALPHA_STATS)
        if not asked:
            return None
        if body.get("echo") or body.get("use_optimal_sampling") is False:
            raise RequestError(
                f"{ALPHA_STATS} is of tokens drawn from q*: not with echo or the teacher alone",
                ALPHA_STATS,
            )
        return cls(route, body.get("n") or 1, asked == "history")

    def vllm_fields(self) -> dict[str, Any]:
        """Fields for vLLM. Token ids are returned because they tell a choice's length."""
        return {"request_id": self.request_id, "return_token_ids": True}

    def id_prefix(self, index: int) -> str:
        """First characters of vLLM's request id of the choice at `index`."""
        prompt, sample = divmod(index, self.n)
        prefix = f"chatcmpl-{self.request_id}-"
        if self.route is COMPLETIONS:
            prefix = f"cmpl-{self.request_id}-{prompt}-"
        return f"{sample}_{prefix}" if self.n > 1 else prefix


class AlphaStatsSender:
    """An ASGI `send` that adds `alpha_stats` to every finished choice.

    A stream is changed event by event, another successful response when its body is complete.
    Error responses are sent unchanged. `engine_client`: vLLM's, by which traces are fetched.
    """

    def __init__(self, request: AlphaStatsRequest, engine_client: Any, send: Send) -> None:
        self.request = request
        self.engine_client = engine_client
        self.send = send
        self._send_part: Send = send
        self._start: Message = {}
        self._unsent = b""
        self._token_counts: dict[int, int] = {}

    async def __call__(self, message: Message) -> None:
        """Send a message of the response, or keep it until the body is complete."""
        if message["type"] != "http.response.start":
            await self._send_part(message)
            return
        content_type = Headers(raw=message["headers"]).get("content-type", "")
        if message["status"] == 200 and not content_type.startswith("text/event-stream"):
            self._start = message
            self._send_part = self._send_when_complete
            return
        if message["status"] == 200:
            self._send_part = self._send_events
        await self.send(message)

    async def _send_when_complete(self, message: Message) -> None:
        self._unsent += message.get("body", b"")
        if message.get("more_body", False):
            return
        body = await self._add_statistics(self._unsent)
        MutableHeaders(scope=self._start)["content-length"] = str(len(body))
        await self.send(self._start)
        await self.send({"type": "http.response.body", "body": body})

    async def _send_events(self, message: Message) -> None:
        more = message.get("more_body", False)
        *events, self._unsent = (self._unsent + message.get("body", b"")).split(b"\n\n")
        if not more and self._unsent:
            events.append(self._unsent)
        changed = [await self._change_event(event) + b"\n\n" for event in events]
        await self.send(
            {"type": "http.response.body", "body": b"".join(changed), "more_body": more}
        )

    async def _change_event(self, event: bytes) -> bytes:
        if not event.startswith(b"data: {"):
            return event
        return b"data: " + await self._add_statistics(event.removeprefix(b"data: "))

    async def _add_statistics(self, text: bytes) -> bytes:
        """A response or an event with statistics; unchanged where it finishes no choice."""
        response = json.loads(text)
        finished = []
        for choice in response.get("choices") or []:
            index = choice["index"]
            new_tokens = len(choice.get("token_ids") or ())
            self._token_counts[index] = self._token_counts.get(index, 0) + new_tokens
            if choice.get("finish_reason") is not None:
                finished.append(choice)
        if not finished:
            return text
        prefixes = [self.request.id_prefix(choice["index"]) for choice in finished]
        replies: list[Traces] = await self.engine_client.collective_rpc(
            "take_traces_by_prefix", args=(prefixes,)
        )
        traces = replies[0]  # of the first device; all have the same
        for choice, prefix in zip(finished, prefixes, strict=True):
            rows, error = traces[prefix]
            count = self._token_counts[choice["index"]]
            rows = rows[:count]  # without drafts past the end
            if len(rows) < count and not error:
                error = f"vLLM's worker has the values of {len(rows)} of {count} tokens"
            choice[ALPHA_STATS] = summarize(rows, self.request.history, error)
        return json.dumps(response, ensure_ascii=False, separators=(",", ":")).encode()


def summarize(rows: TraceRows, history: bool, error: str = "") -> dict[str, Any]:
    """`alpha_stats` of one choice. Numbers that are not finite are None: JSON has none."""
    columns = {name: [row[TRACE_FIELDS.index(name)] for row in rows] for name in _HISTORY}
    result: dict[str, Any] = alpha_summary(
        columns["alpha"], columns["clamped"], columns["curvature"]
    )
    for name in _MEANS:
        result[name] = math.fsum(columns[name]) / len(rows) if rows else math.nan
    result = {name: _finite(value) for name, value in result.items()}
    if history:
        result["history"] = {
            name: [_finite(value) for value in column] for name, column in columns.items()
        }
    if error:
        result["error"] = error
    return result


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
