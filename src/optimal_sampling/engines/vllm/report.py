"""Alpha statistics in the server's answers, for requests with the field `alpha_stats`.

Such a request gets a name of its own in vLLM. By that name the traces are fetched from the worker when a choice is
finished, and their summary is written into the choice. Knows ASGI and the shape of OpenAI's answers; other requests do
not come here.
"""

from __future__ import annotations

import json
import math
import uuid
from collections.abc import Awaitable, Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from optimal_sampling.engines.vllm.traces import Rows, alpha_summary
from optimal_sampling.types import TRACE_FIELDS

__all__ = ["FIELD", "AlphaReport", "Fetch", "Named"]

FIELD = "alpha_stats"
"""The request field (true, or "history"), and what a choice has then."""

_HISTORY = ("alpha", "clamped", "kl_student", "kl_teacher")
_COLUMNS = {name: TRACE_FIELDS.index(name) for name in _HISTORY}

Message = MutableMapping[str, Any]
Send = Callable[[Message], Awaitable[None]]
Fetch = Callable[[list[str]], Awaitable[dict[str, tuple[Rows, str]]]]
"""Beginnings of vLLM's names of requests -> their rows of TRACE_FIELDS, and what went wrong."""


@dataclass(frozen=True)
class Named:
    """A request that asks for statistics, under a name that no other request has."""

    chat: bool
    n: int
    """Choices of each prompt."""
    history: bool
    name: str = field(default_factory=lambda: uuid.uuid4().hex)

    def fields(self) -> dict[str, Any]:
        """What vLLM has to know. Ids of tokens are asked for because they tell how many tokens a choice has."""
        return {"request_id": self.name, "return_token_ids": True}

    def beginning(self, index: int) -> str:
        """How vLLM's name of a choice begins."""
        prompt, sample = divmod(index, self.n)
        name = f"chatcmpl-{self.name}-" if self.chat else f"cmpl-{self.name}-{prompt}-"
        return f"{sample}_{name}" if self.n > 1 else name


class AlphaReport:
    """Stands in for ASGI's `send`: each choice that is finished gets its statistics, in streams too."""

    def __init__(self, named: Named, fetch: Fetch, send: Send) -> None:
        self.named, self.fetch, self.send = named, fetch, send
        self._start: Message | None = None
        self._parts: list[bytes] = []
        self._rest = b""
        self._tokens: dict[int, int] = {}
        self._handle: Send = send

    async def __call__(self, message: Message) -> None:
        """Pass a message on. A stream is changed event by event, any other answer when it is complete."""
        if message["type"] == "http.response.start":
            kind = dict(message["headers"]).get(b"content-type", b"")
            if kind.startswith(b"text/event-stream"):
                self._handle = self._stream
            elif message["status"] == 200:
                self._start, self._handle = message, self._whole
                return
            await self.send(message)
            return
        await self._handle(message)

    async def _whole(self, message: Message) -> None:
        self._parts.append(message.get("body", b""))
        if message.get("more_body", False) or self._start is None:
            return
        body = await self._with_statistics(b"".join(self._parts))
        headers = [item for item in self._start["headers"] if item[0].lower() != b"content-length"]
        self._start["headers"] = [*headers, (b"content-length", str(len(body)).encode())]
        await self.send(self._start)
        await self.send({"type": "http.response.body", "body": body})

    async def _stream(self, message: Message) -> None:
        *events, self._rest = (self._rest + message.get("body", b"")).split(b"\n\n")
        more = message.get("more_body", False)
        if not more and self._rest:
            events, self._rest = [*events, self._rest], b""
        changed = [await self._event(event) + b"\n\n" for event in events]
        await self.send(
            {"type": "http.response.body", "body": b"".join(changed), "more_body": more}
        )

    async def _event(self, event: bytes) -> bytes:
        prefix, _, text = event.partition(b" ")
        return (
            b"data: " + await self._with_statistics(text)
            if prefix == b"data:" and text[:1] == b"{"
            else event
        )

    async def _with_statistics(self, text: bytes) -> bytes:
        """An answer or a piece of one, unchanged where it finishes no choice."""
        answer = json.loads(text)
        finished = []
        for choice in answer.get("choices") or []:
            index = choice["index"]
            self._tokens[index] = self._tokens.get(index, 0) + len(choice.get("token_ids") or ())
            if choice.get("finish_reason") is not None:
                finished.append(choice)
        if not finished:
            return text
        beginnings = [self.named.beginning(choice["index"]) for choice in finished]
        traces = await self.fetch(beginnings)
        for choice, beginning in zip(finished, beginnings, strict=True):
            rows, error = traces[beginning]
            choice[FIELD] = statistics_of(
                rows[: self._tokens[choice["index"]]], self.named.history, error
            )
        return json.dumps(answer, ensure_ascii=False, separators=(",", ":")).encode()


def statistics_of(rows: Rows, history: bool, error: str = "") -> dict[str, Any]:
    """What a choice says of its tokens. None for what is no finite number: JSON has none."""
    columns = {name: [row[place] for row in rows] for name, place in _COLUMNS.items()}
    result: dict[str, Any] = alpha_summary(columns["alpha"], columns["clamped"])
    for name in ("kl_student", "kl_teacher"):
        result[name] = math.fsum(columns[name]) / len(rows) if rows else math.nan
    if history:
        result["history"] = columns
    if error:
        result["error"] = error
    finite: dict[str, Any] = _finite(result)
    return finite


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
