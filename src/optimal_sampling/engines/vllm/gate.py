"""What stands before vLLM's server: the key, the limits, and the request fields that are ours.

Plain ASGI; knows HTTP and the options of the mixture, nothing of vLLM. A request passes as it is, with our fields
turned into `vllm_xargs` and the stop ids of both models added, or it is answered here with an error as OpenAI's are.
Answers pass unchanged but where a request asks for alpha statistics, see report.py.
"""

from __future__ import annotations

import hmac
import json
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from dataclasses import dataclass, field, fields
from typing import Any

from optimal_sampling.config import MixtureConfig
from optimal_sampling.engines.vllm.options import (
    OPTIONS,
    OTHER_IDS,
    RequestOptions,
    TraceLevel,
    mixture_from,
)
from optimal_sampling.engines.vllm.report import FIELD, AlphaReport, Fetch, Named
from optimal_sampling.engines.vllm.traces import Rows
from optimal_sampling.errors import ConfigError
from optimal_sampling.vocabulary import Vocabulary

__all__ = ["Gate", "GateSettings", "Refusal"]

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

_OPEN = "/health"
_GENERATE = {"/v1/completions": False, "/v1/chat/completions": True}
"""Routes that draw tokens, and whether they take messages."""
_PASSED = frozenset(
    {_OPEN, "/metrics", "/version", "/v1/models", "/tokenize", "/detokenize", *_GENERATE}
)
_PREFIXES = ("/metrics/", "/v1/models/")
_MIXTURE_FIELDS = frozenset(item.name for item in fields(MixtureConfig)) - {
    "temperature",
    "top_k",
    "top_p",
}
_STUDENT_FIELDS = ("student_prompt", "student_messages")
_NOT_Q = ("use_beam_search", "prompt_embeds", "kv_transfer_params", "data_parallel_rank")
"""Fields under which tokens would not be drawn from q*, or not by this engine."""


@dataclass(frozen=True)
class GateSettings:
    """What the server allows. The key is kept out of every representation."""

    vocabulary: Vocabulary
    mixture: MixtureConfig
    max_model_len: int
    api_key: str | None = field(default=None, repr=False)
    max_n: int = 64
    max_body_bytes: int = 4 << 20


class Refusal(Exception):
    """A request that is answered with an error. The message is shown to the client."""

    def __init__(self, status: int, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.param = status, message, param

    @property
    def body(self) -> bytes:
        """As OpenAI's servers say it."""
        kind = {401: "authentication_error", 404: "not_found_error"}.get(
            self.status, "invalid_request_error"
        )
        code = "invalid_api_key" if self.status == 401 else None
        return json.dumps(
            {"error": {"message": self.message, "type": kind, "param": self.param, "code": code}}
        ).encode()


class Gate:
    """ASGI middleware. `settings` is set on the class before vLLM makes it, because vLLM passes the app alone."""

    settings: GateSettings

    def __init__(self, app: Callable[[Message, Receive, Send], Awaitable[None]]) -> None:
        self.app = app

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Pass a request on, changed where it draws tokens, or answer it."""
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        try:
            if scope["type"] != "http":
                raise Refusal(404, "this server speaks HTTP only")
            receive, send = await self._admit(scope, receive, send)
        except Refusal as refusal:
            await _answer(scope, send, refusal)
            return
        await self.app(scope, receive, send)

    async def _admit(self, scope: Message, receive: Receive, send: Send) -> tuple[Receive, Send]:
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        if path == _OPEN:
            return receive, send
        _check_key(scope, self.settings.api_key)
        if path not in _PASSED and not path.startswith(_PREFIXES):
            raise Refusal(404, f"there is no route {path}")
        if scope["method"] != "POST":
            return receive, send
        body = await _read(receive, self.settings.max_body_bytes)
        replaced = {b"content-length"}
        if path in _GENERATE:
            parsed = _parse(body)
            named = named_for_report(parsed, _GENERATE[path])
            admitted = admit_body(parsed, _GENERATE[path], self.settings)
            if named is not None:
                admitted |= named.fields()
                send = AlphaReport(named, _fetch_from(scope), send)
                replaced.add(b"x-request-id")  # it would win over the name
            body = json.dumps(admitted).encode()
        headers = [
            (name, value) for name, value in scope["headers"] if name.lower() not in replaced
        ]
        scope["headers"] = [*headers, (b"content-length", str(len(body)).encode())]
        return _replay(body, receive), send


def admit_body(body: Mapping[str, Any], chat: bool, settings: GateSettings) -> dict[str, Any]:
    """A request body as vLLM takes it. Raises Refusal."""
    result = dict(body)
    _check_limits(result, settings)
    given = {name: result.pop(name) for name in _MIXTURE_FIELDS & result.keys()}
    alone = result.pop("use_optimal_sampling", True)
    if not isinstance(alone, bool):
        raise Refusal(400, "use_optimal_sampling must be true or false", "use_optimal_sampling")
    student = {name: result.pop(name) for name in _STUDENT_FIELDS if name in result}
    try:
        mixture = mixture_from(given, settings.mixture)
    except ConfigError as error:
        raise Refusal(400, str(error), next(iter(given), None)) from error
    ids = _student_ids(result, student, chat, settings)
    if (given or student or not alone) and (
        result.get("echo") or result.get("prompt_logprobs") is not None
    ):
        raise Refusal(
            400,
            "log-probabilities of a prompt are those of the server's own mixture and of one prompt",
        )
    xargs = result.get("vllm_xargs") or {}
    if (
        not isinstance(xargs, Mapping)
        or {OPTIONS, OTHER_IDS, "optimal_sampling_teacher_ids"} & xargs.keys()
    ):
        raise Refusal(
            400, "vllm_xargs must be an object without our own keys; use the fields", "vllm_xargs"
        )
    trace: TraceLevel = "alpha" if result.pop(FIELD, False) else "off"
    options = RequestOptions(mixture, "mixture" if alone else "teacher", trace, ids)
    result["vllm_xargs"] = {**xargs, **options.extra_args(settings.mixture)}
    if not result.get("ignore_eos"):
        stops = result.get("stop_token_ids") or []
        if not isinstance(stops, list):
            raise Refusal(400, "stop_token_ids must be a list", "stop_token_ids")
        result["stop_token_ids"] = [*stops, *sorted(settings.vocabulary.stop_ids)]
    return result


def named_for_report(body: Mapping[str, Any], chat: bool) -> Named | None:
    """A name for a request that asks for alpha statistics. Raises Refusal."""
    asked = body.get(FIELD, False)
    if not isinstance(asked, bool) and asked != "history":
        raise Refusal(400, f'{FIELD} must be true, false or "history"', FIELD)
    if not asked:
        return None
    if body.get("echo") or body.get("use_optimal_sampling") is False:
        raise Refusal(
            400,
            f"{FIELD} is of tokens drawn from q*: not with echo, and not of the teacher alone",
            FIELD,
        )
    return Named(chat, body.get("n") or 1, asked == "history")


def _fetch_from(scope: Message) -> Fetch:
    """Traces of vLLM's worker."""

    async def fetch(beginnings: list[str]) -> dict[str, tuple[Rows, str]]:
        client = scope["app"].state.engine_client
        [taken] = await client.collective_rpc("take_named_traces", args=(beginnings,))
        result: dict[str, tuple[Rows, str]] = taken
        return result

    return fetch


def _check_limits(body: Mapping[str, Any], settings: GateSettings) -> None:
    for name in _NOT_Q:
        if body.get(name):
            raise Refusal(400, f"{name} is not supported here", name)
    for name in ("n", "best_of"):
        count = body.get(name)
        if count is not None and not (type(count) is int and 1 <= count <= settings.max_n):
            raise Refusal(400, f"{name} must be a whole number from 1 to {settings.max_n}", name)
    for name in ("max_tokens", "max_completion_tokens"):
        count = body.get(name)
        if count is not None and not (type(count) is int and 0 <= count <= settings.max_model_len):
            raise Refusal(
                400, f"{name} must be a whole number up to {settings.max_model_len}", name
            )
    prompt = body.get("prompt")
    if isinstance(prompt, list) and len(prompt) > settings.max_n and not isinstance(prompt[0], int):
        raise Refusal(400, f"at most {settings.max_n} prompts in one request", "prompt")


def _student_ids(
    body: Mapping[str, Any], student: Mapping[str, Any], chat: bool, settings: GateSettings
) -> tuple[int, ...] | None:
    """Ids of the student's prompt, where it is not read as the teacher's is."""
    own = "student_messages" if chat else "student_prompt"
    if student.keys() - {own}:
        raise Refusal(400, f"this route takes {own}", next(iter(student.keys() - {own})))
    prompts = body.get("messages") if chat else body.get("prompt")
    if not chat and isinstance(prompts, list) and prompts and not isinstance(prompts[0], int):
        several = prompts
    else:
        several = [prompts]
    if own not in student:
        _check_common(several, chat, body, settings.vocabulary)
        return None
    if len(several) > 1:
        raise Refusal(400, f"{own} needs a single prompt in `prompt`", own)
    return _checked(
        _render(student[own], chat, own, body, settings.vocabulary.student_tokenizer), own, settings
    )


def _checked(ids: tuple[int, ...], own: str, settings: GateSettings) -> tuple[int, ...]:
    rows = settings.vocabulary.student_rows or settings.vocabulary.size
    if not 0 < len(ids) < settings.max_model_len:
        raise Refusal(
            400, f"{own} has {len(ids)} tokens; it must have 1 to {settings.max_model_len - 1}", own
        )
    if not 0 <= min(ids) <= max(ids) < rows:
        raise Refusal(400, f"{own} has token ids outside the student's vocabulary of {rows}", own)
    return ids


def _check_common(
    prompts: list[Any], chat: bool, body: Mapping[str, Any], vocabulary: Vocabulary
) -> None:
    """Raise Refusal where the student lacks an embedding of what the teacher reads."""
    rows = vocabulary.student_rows or vocabulary.size
    if rows >= (vocabulary.teacher_rows or vocabulary.size):
        return
    for prompt in prompts:
        ids = _render(
            prompt, chat, "messages" if chat else "prompt", body, vocabulary.teacher_tokenizer
        )
        if max(ids, default=0) >= rows:
            own = "student_messages" if chat else "student_prompt"
            raise Refusal(
                400, f"the prompt has tokens that only the teacher knows: give {own}", "prompt"
            )


def _render(
    source: Any, chat: bool, own: str, body: Mapping[str, Any], tokenizer: Any
) -> tuple[int, ...]:
    if (
        not chat
        and isinstance(source, list)
        and source
        and all(type(each) is int for each in source)
    ):
        return tuple(source)
    if not chat and isinstance(source, str):
        special = bool(body.get("add_special_tokens", True))
        return tuple(tokenizer(source, add_special_tokens=special)["input_ids"])
    if chat and isinstance(source, list) and source:
        keywords = body.get("chat_template_kwargs") or {}
        try:
            text = tokenizer.apply_chat_template(
                source, tokenize=False, add_generation_prompt=True, **keywords
            )
        except Exception as error:  # templates raise what they like
            raise Refusal(400, f"a chat template refuses {own}: {error}", own) from error
        return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])
    raise Refusal(
        400,
        f"{own} must be {'a list of messages' if chat else 'a text or a list of token ids'}",
        own,
    )


def _check_key(scope: Message, key: str | None) -> None:
    if key is None:
        return
    given = next(
        (value for name, value in scope["headers"] if name.lower() == b"authorization"), b""
    )
    scheme, _, token = given.partition(b" ")
    if scheme.lower() != b"bearer" or not hmac.compare_digest(token.strip(), key.encode()):
        raise Refusal(401, "wrong or missing API key; send it as `Authorization: Bearer KEY`")


async def _read(receive: Receive, limit: int) -> bytes:
    parts: list[bytes] = []
    size, more = 0, True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise Refusal(400, "the client went away")
        parts.append(message.get("body", b""))
        size += len(parts[-1])
        if size > limit:
            raise Refusal(413, f"the request body is larger than {limit} bytes")
        more = message.get("more_body", False)
    return b"".join(parts)


def _parse(body: bytes) -> dict[str, Any]:
    try:
        parsed = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise Refusal(400, "the request body is not JSON") from error
    if not isinstance(parsed, dict):
        raise Refusal(400, "the request body must be a JSON object")
    return parsed


def _replay(body: bytes, receive: Receive) -> Receive:
    """The body once, then whatever comes: a disconnect must reach vLLM, which aborts the request then."""
    pending = [body]

    async def replayed() -> Message:
        if pending:
            return {"type": "http.request", "body": pending.pop(), "more_body": False}
        return await receive()

    return replayed


async def _answer(scope: Message, send: Send, refusal: Refusal) -> None:
    if scope["type"] == "websocket":
        await send({"type": "websocket.close", "code": 1008})
        return
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(refusal.body)).encode()),
    ]
    if refusal.status == 413:
        headers.append((b"connection", b"close"))
    await send({"type": "http.response.start", "status": refusal.status, "headers": headers})
    await send({"type": "http.response.body", "body": refusal.body})
