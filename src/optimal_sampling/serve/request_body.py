"""A request's JSON body with this package's fields -> the JSON body that vLLM takes.

Imports neither Starlette nor vLLM.
"""

from __future__ import annotations

import difflib
import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from optimal_sampling.config import MixtureConfig
from optimal_sampling.engines.vllm.request_options import (
    RESERVED_KEYS,
    RequestOptions,
    TraceLevel,
    mixture_from,
)
from optimal_sampling.errors import ConfigError
from optimal_sampling.types import Mode
from optimal_sampling.vocabulary import Vocabulary

__all__ = [
    "ALPHA_STATS",
    "CHAT",
    "COMPLETIONS",
    "LOOPBACK_NAMES",
    "RequestError",
    "Role",
    "Route",
    "ServerSettings",
    "translate_body",
]

ALPHA_STATS = "alpha_stats"
"""Request field (true or "history"), and the field of a choice that answers it."""

_SAMPLED_BY_VLLM = {"temperature", "top_k", "top_p"}
_MIXTURE_FIELDS = frozenset(item.name for item in fields(MixtureConfig)) - _SAMPLED_BY_VLLM
_STUDENT_FIELDS = frozenset({"student_prompt", "student_messages"})
_REFUSED_FIELDS = ("use_beam_search", "prompt_embeds", "kv_transfer_params", "data_parallel_rank")
"""Fields with which tokens would not be drawn from q*, or not by this engine."""

OWN_FIELDS = _MIXTURE_FIELDS | _STUDENT_FIELDS | {ALPHA_STATS, "use_optimal_sampling"}
"""Fields of this package in a request's body."""

_PROMPT_FIELDS = frozenset({"prompt", "messages", *_STUDENT_FIELDS})
_OWN_PREFIXES = (
    *("alpha", "arithmetic_", "fixed_", "interleaved_", "schedule_"),
    *("student", "teacher_", "theta", "veto_"),
)
_MAX_FIELDS = 256
_MAX_STOPS = 256
_TEMPLATE_FIELDS = frozenset({"chat_template", "conversation", "tokenize"})
"""Arguments of a chat template's function that `chat_template_kwargs` cannot have."""


LOOPBACK_NAMES = frozenset({"localhost", "127.0.0.1", "::1"})
"""Names by which a server is reached that listens on this machine alone."""

Role = Literal["student", "teacher"]
Render = Callable[[Role, Mapping[str, Any], str], tuple[int, ...]]


@dataclass(frozen=True)
class ServerSettings:
    """Defaults and limits of the server. The representation leaves the API key out."""

    vocabulary: Vocabulary
    mixture: MixtureConfig
    max_model_len: int
    api_key: str | None = field(default=None, repr=False)
    max_n: int = 64
    max_body_bytes: int = 4 << 20
    max_field_chars: int = 1 << 16
    """Most characters in a field that is no prompt."""
    hosts: frozenset[str] = LOOPBACK_NAMES
    """Names of this server, which a request without a key must have in its `Host` header."""

    render: Render | None = None
    """vLLM's renderer of chats: token ids of a role's prompt, from a body and, for errors, the name
    of the field that its messages came in. None: the server does not run yet."""

    def tokenizer(self, role: Role) -> Any:
        """Of one of the models."""
        return getattr(self.vocabulary, f"{role}_tokenizer")

    def longest_token(self, role: Role) -> int:
        """Characters of the longest token of one of the models."""
        return _longest_token(self.tokenizer(role))


@functools.cache
def _longest_token(tokenizer: Any) -> int:
    return max(map(len, tokenizer.get_vocab()))


@dataclass(frozen=True)
class Route:
    """A route that generates, and the names of its prompt fields."""

    path: str
    prompt_field: str
    student_field: str
    prompt_types: str
    """What both fields hold, for error messages."""


COMPLETIONS = Route("/v1/completions", "prompt", "student_prompt", "a text or a list of token ids")
CHAT = Route("/v1/chat/completions", "messages", "student_messages", "a list of messages")


class RequestError(Exception):
    """A request that is answered with an error; the client sees the message."""

    def __init__(self, message: str, param: str | None = None, status: int = 400) -> None:
        super().__init__(message, param, status)
        self.message = message
        self.param = param
        self.status = status


def translate_body(
    body: Mapping[str, Any], route: Route, settings: ServerSettings
) -> dict[str, Any]:
    """The body that vLLM takes: own fields in `vllm_xargs`, stop ids of both models added.

    Raises RequestError for a field with a wrong value, over a limit, or that q* cannot have.
    """
    result = {name: value for name, value in body.items() if not _is_unset(name, value)}
    _check_names(result)
    _check_limits(result, settings)
    mixture_fields = _take(result, _MIXTURE_FIELDS)
    use_mixture = result.pop("use_optimal_sampling", True)
    if not isinstance(use_mixture, bool):
        raise RequestError("use_optimal_sampling must be true or false", "use_optimal_sampling")
    student_fields = _take(result, _STUDENT_FIELDS)
    mixture = _mixture(mixture_fields, settings.mixture)
    prompts = _RequestPrompts(result, route, settings)
    student_ids = _student_ids(prompts, student_fields)
    if mixture_fields or student_fields or not use_mixture:
        _check_prompt_log_probabilities(result)
    mode: Mode = "mixture" if use_mixture else "teacher"
    trace: TraceLevel = "alpha" if result.pop(ALPHA_STATS, False) else "off"
    options = RequestOptions(mixture, mode, trace, student_ids)
    result["vllm_xargs"] = _client_xargs(result) | options.extra_args(settings.mixture)
    if not result.get("ignore_eos"):
        result["stop_token_ids"] = _stop_ids(result, settings.vocabulary)
    return result


def _is_unset(name: str, value: Any) -> bool:
    return value is None and name in OWN_FIELDS


def _check_names(body: Mapping[str, Any]) -> None:
    """Raise RequestError for a misspelt field of this package: vLLM would ignore it."""
    if len(body) > _MAX_FIELDS:
        raise RequestError(f"a request has at most {_MAX_FIELDS} fields")
    for name in body.keys() - OWN_FIELDS:
        cutoff = 0.5 if name.startswith(_OWN_PREFIXES) else 0.8
        near = difflib.get_close_matches(name, OWN_FIELDS, n=1, cutoff=cutoff)
        if near:
            raise RequestError(f"unknown field {name!r}; did you mean {near[0]!r}?", name)


def _take(body: dict[str, Any], names: frozenset[str]) -> dict[str, Any]:
    """Remove the fields of these names from the body, and return them."""
    return {name: body.pop(name) for name in names & body.keys()}


def _check_limits(body: Mapping[str, Any], settings: ServerSettings) -> None:
    for name in _REFUSED_FIELDS:
        if body.get(name):
            raise RequestError(f"{name} is not supported here", name)
    _check_templates(body)
    for name in body.keys() - _PROMPT_FIELDS:
        if _characters(body[name]) > settings.max_field_chars:
            raise RequestError(f"{name} has more than {settings.max_field_chars} characters", name)
    for name in ("stop", "bad_words"):
        given = body.get(name)
        if isinstance(given, list) and len(given) > _MAX_STOPS:
            raise RequestError(f"{name} has more than {_MAX_STOPS} texts", name)
    for name in ("n", "best_of"):
        _check_range(body, name, 1, settings.max_n)
    for name in ("max_tokens", "max_completion_tokens"):
        _check_range(body, name, 0, settings.max_model_len)
    if len(_prompts(body, COMPLETIONS)) > settings.max_n:
        raise RequestError(f"at most {settings.max_n} prompts in one request", "prompt")


def _check_templates(body: Mapping[str, Any]) -> None:
    """Raise RequestError for a client's own chat template, which is a program to run here."""
    options = body.get("chat_template_kwargs") or {}
    if not isinstance(options, Mapping):
        raise RequestError("chat_template_kwargs must be an object", "chat_template_kwargs")
    if body.get("chat_template") is not None or _TEMPLATE_FIELDS & options.keys():
        raise RequestError(
            "chat templates are the models' own: a request cannot give one", "chat_template"
        )


def _characters(value: Any) -> int:
    """Characters of all texts in a JSON value, the names in its objects included."""
    count = 0
    values = [value]
    while values:  # without recursion: a body may be nested more deeply than Python's stack
        each = values.pop()
        if isinstance(each, str):
            count += len(each)
        elif isinstance(each, list):
            values += each
        elif isinstance(each, dict):
            values += each.keys()
            values += each.values()
    return count


def _check_range(body: Mapping[str, Any], name: str, low: int, high: int) -> None:
    count = body.get(name)
    if count is not None and not (type(count) is int and low <= count <= high):
        raise RequestError(f"{name} must be a whole number from {low} to {high}", name)


def _prompts(body: Mapping[str, Any], route: Route) -> list[Any]:
    """The prompts of a request. Several only in a list of texts, or of lists of token ids."""
    prompt = body.get(route.prompt_field)
    if route is COMPLETIONS and isinstance(prompt, list) and prompt:
        return [prompt] if isinstance(prompt[0], int) else prompt
    return [prompt]


def _mixture(given: Mapping[str, Any], default: MixtureConfig) -> MixtureConfig:
    try:
        return mixture_from(given, default)
    except ConfigError as error:
        raise RequestError(str(error), next(iter(given), None)) from error


def _check_prompt_log_probabilities(body: Mapping[str, Any]) -> None:
    if body.get("echo") or body.get("prompt_logprobs") is not None:
        raise RequestError(
            "log-probabilities of a prompt are those of the server's own mixture and of one prompt"
        )


def _client_xargs(body: Mapping[str, Any]) -> dict[str, Any]:
    xargs = body.get("vllm_xargs") or {}
    if not isinstance(xargs, Mapping) or RESERVED_KEYS & xargs.keys():
        raise RequestError(
            f"vllm_xargs must be an object without {', '.join(sorted(RESERVED_KEYS))}; "
            "use the request fields for these",
            "vllm_xargs",
        )
    return dict(xargs)


def _stop_ids(body: Mapping[str, Any], vocabulary: Vocabulary) -> list[Any]:
    given = body.get("stop_token_ids") or []
    if not isinstance(given, list):
        raise RequestError("stop_token_ids must be a list", "stop_token_ids")
    return [*given, *sorted(vocabulary.stop_ids)]


def _student_ids(prompts: _RequestPrompts, given: Mapping[str, Any]) -> tuple[int, ...] | None:
    """The student's prompt ids. None: those of the request's prompt."""
    name = prompts.route.student_field
    if given.keys() - {name}:
        raise RequestError(f"this route takes {name}", next(iter(given.keys() - {name})))
    common = _prompts(prompts.body, prompts.route)
    if name not in given:
        for each in common:
            _check_student_knows(prompts, each)
        return None
    if len(common) > 1:
        raise RequestError(f"{name} needs a single prompt in `prompt`", name)
    ids = prompts.token_ids(given[name], name, "student")
    _check_student_ids(ids, name, prompts.settings)
    return ids


def _check_student_ids(ids: tuple[int, ...], name: str, settings: ServerSettings) -> None:
    longest = settings.max_model_len - 1
    if not 0 < len(ids) <= longest:
        raise RequestError(f"{name} has {len(ids)} tokens; it must have 1 to {longest}", name)
    rows = settings.vocabulary.student_rows or settings.vocabulary.size
    if not 0 <= min(ids) <= max(ids) < rows:
        raise RequestError(f"{name} has token ids outside the student's vocabulary of {rows}", name)


def _check_student_knows(prompts: _RequestPrompts, prompt: Any) -> None:
    """Raise RequestError where the student has no embedding of a token of a common prompt."""
    vocabulary = prompts.settings.vocabulary
    rows = vocabulary.student_rows or vocabulary.size
    if rows >= (vocabulary.teacher_rows or vocabulary.size):
        return
    ids = prompts.token_ids(prompt, prompts.route.prompt_field, "teacher")
    if max(ids, default=0) >= rows:
        name = prompts.route.student_field
        raise RequestError(
            f"the prompt has tokens that only the teacher knows: give {name}", "prompt"
        )


@dataclass(frozen=True)
class _RequestPrompts:
    """Prompts of one request as token ids, as vLLM makes them."""

    body: Mapping[str, Any]
    route: Route
    settings: ServerSettings

    def token_ids(self, source: Any, name: str, role: Role) -> tuple[int, ...]:
        """Of a prompt or of messages. `name`: the field they came in; `role`: whose tokenizer."""
        if self.route is CHAT and isinstance(source, list) and source:
            self._check_length(source, name, role)
            return self._chat_ids(source, name, role)
        if self.route is COMPLETIONS and isinstance(source, str):
            self._check_length(source, name, role)
            special = bool(self.body.get("add_special_tokens", True))
            tokenizer = self.settings.tokenizer(role)
            return tuple(tokenizer(source, add_special_tokens=special)["input_ids"])
        if self.route is COMPLETIONS and _is_token_ids(source):
            return tuple(source)
        raise RequestError(f"{name} must be {self.route.prompt_types}", name)

    def _check_length(self, source: Any, name: str, role: Role) -> None:
        """Raise RequestError for a text whose tokens must be too many, before it is tokenized."""
        longest = self.settings.max_model_len * self.settings.longest_token(role)
        if _characters(source) > longest:
            raise RequestError(
                f"{name} has more than {longest} characters, which no text of "
                f"{self.settings.max_model_len} tokens has",
                name,
            )

    def _chat_ids(self, messages: list[Any], name: str, role: Role) -> tuple[int, ...]:
        """Rendered by vLLM, with all options of the request."""
        if self.settings.render is None:
            raise RuntimeError("there is no renderer of chats before the server runs")
        for message in messages:
            _check_parts(message, name)
        return self.settings.render(role, {**self.body, "messages": messages}, name)


def _check_parts(message: Any, name: str) -> None:
    """Raise RequestError for a part of a content that is no text: vLLM would fetch its address."""
    content = message.get("content") if isinstance(message, dict) else None
    for part in content if isinstance(content, list) else ():
        is_text = isinstance(part, str) or (
            isinstance(part, dict)
            and part.get("type") == "text"
            and isinstance(part.get("text"), str)
        )
        if not is_text:
            raise RequestError(
                f'{name}: the parts of a content must be texts, {{"type": "text", "text": ...}}',
                name,
            )


def _is_token_ids(source: Any) -> bool:
    if not isinstance(source, list) or not source:
        return False
    return all(type(each) is int for each in source)
