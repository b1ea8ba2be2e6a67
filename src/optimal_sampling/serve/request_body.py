"""A request's JSON body with this package's fields -> the JSON body that vLLM takes.

Imports neither Starlette nor vLLM.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

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
    "RequestError",
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


@dataclass(frozen=True)
class ServerSettings:
    """Defaults and limits of the server. The representation leaves the API key out."""

    vocabulary: Vocabulary
    mixture: MixtureConfig
    max_model_len: int
    api_key: str | None = field(default=None, repr=False)
    max_n: int = 64
    max_body_bytes: int = 4 << 20


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
    result = dict(body)
    _check_limits(result, settings)
    mixture_fields = _take(result, _MIXTURE_FIELDS)
    use_mixture = result.pop("use_optimal_sampling", True)
    if not isinstance(use_mixture, bool):
        raise RequestError("use_optimal_sampling must be true or false", "use_optimal_sampling")
    student_fields = _take(result, _STUDENT_FIELDS)
    mixture = _mixture(mixture_fields, settings.mixture)
    student_ids = _student_ids(result, student_fields, route, settings)
    if mixture_fields or student_fields or not use_mixture:
        _check_prompt_log_probabilities(result)
    mode: Mode = "mixture" if use_mixture else "teacher"
    trace: TraceLevel = "alpha" if result.pop(ALPHA_STATS, False) else "off"
    options = RequestOptions(mixture, mode, trace, student_ids)
    result["vllm_xargs"] = _client_xargs(result) | options.extra_args(settings.mixture)
    if not result.get("ignore_eos"):
        result["stop_token_ids"] = _stop_ids(result, settings.vocabulary)
    return result


def _take(body: dict[str, Any], names: frozenset[str]) -> dict[str, Any]:
    """Remove the fields of these names from the body, and return them."""
    return {name: body.pop(name) for name in names & body.keys()}


def _check_limits(body: Mapping[str, Any], settings: ServerSettings) -> None:
    for name in _REFUSED_FIELDS:
        if body.get(name):
            raise RequestError(f"{name} is not supported here", name)
    for name in ("n", "best_of"):
        _check_range(body, name, 1, settings.max_n)
    for name in ("max_tokens", "max_completion_tokens"):
        _check_range(body, name, 0, settings.max_model_len)
    if len(_prompts(body, COMPLETIONS)) > settings.max_n:
        raise RequestError(f"at most {settings.max_n} prompts in one request", "prompt")


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


def _student_ids(
    body: Mapping[str, Any], given: Mapping[str, Any], route: Route, settings: ServerSettings
) -> tuple[int, ...] | None:
    """The student's prompt ids. None: those of the request's prompt."""
    name = route.student_field
    if given.keys() - {name}:
        raise RequestError(f"this route takes {name}", next(iter(given.keys() - {name})))
    prompts = _prompts(body, route)
    if name not in given:
        for each in prompts:
            _check_student_knows(each, body, route, settings.vocabulary)
        return None
    if len(prompts) > 1:
        raise RequestError(f"{name} needs a single prompt in `prompt`", name)
    ids = _tokenize(given[name], name, body, route, settings.vocabulary.student_tokenizer)
    _check_student_ids(ids, name, settings)
    return ids


def _check_student_ids(ids: tuple[int, ...], name: str, settings: ServerSettings) -> None:
    longest = settings.max_model_len - 1
    if not 0 < len(ids) <= longest:
        raise RequestError(f"{name} has {len(ids)} tokens; it must have 1 to {longest}", name)
    rows = settings.vocabulary.student_rows or settings.vocabulary.size
    if not 0 <= min(ids) <= max(ids) < rows:
        raise RequestError(f"{name} has token ids outside the student's vocabulary of {rows}", name)


def _check_student_knows(
    prompt: Any, body: Mapping[str, Any], route: Route, vocabulary: Vocabulary
) -> None:
    """Raise RequestError where the student has no embedding of a token of a common prompt."""
    rows = vocabulary.student_rows or vocabulary.size
    if rows >= (vocabulary.teacher_rows or vocabulary.size):
        return
    ids = _tokenize(prompt, route.prompt_field, body, route, vocabulary.teacher_tokenizer)
    if max(ids, default=0) >= rows:
        raise RequestError(
            f"the prompt has tokens that only the teacher knows: give {route.student_field}",
            "prompt",
        )


def _tokenize(
    source: Any, name: str, body: Mapping[str, Any], route: Route, tokenizer: Any
) -> tuple[int, ...]:
    """Token ids of a prompt or of messages, as vLLM makes them. `name`: the field they came in."""
    if route is CHAT and isinstance(source, list) and source:
        text = _chat_text(source, name, body, tokenizer)
        return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])
    if route is COMPLETIONS and isinstance(source, str):
        special = bool(body.get("add_special_tokens", True))
        return tuple(tokenizer(source, add_special_tokens=special)["input_ids"])
    if route is COMPLETIONS and _is_token_ids(source):
        return tuple(source)
    raise RequestError(f"{name} must be {route.prompt_types}", name)


def _is_token_ids(source: Any) -> bool:
    if not isinstance(source, list) or not source:
        return False
    return all(type(each) is int for each in source)


def _chat_text(messages: list[Any], name: str, body: Mapping[str, Any], tokenizer: Any) -> str:
    options = body.get("chat_template_kwargs") or {}
    try:
        text: str = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True, **options
        )
    except Exception as error:  # a template's own code can raise anything
        raise RequestError(f"a chat template refuses {name}: {error}", name) from error
    return text
