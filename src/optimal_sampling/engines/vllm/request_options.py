"""Options of one request, and their encoding in vLLM's `SamplingParams.extra_args`.

Temperature, top-k and top-p are vLLM's own parameters. The other options are one JSON text; a
student's prompt that differs from the request's is a list of token ids. Imports neither vLLM nor
torch.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cache
from types import UnionType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from optimal_sampling.config import MixtureConfig
from optimal_sampling.errors import ConfigError
from optimal_sampling.types import UNBOUNDED_METHODS, Mode

__all__ = [
    "MODES",
    "OPTIONS",
    "RESERVED_KEYS",
    "STUDENT_IDS",
    "TEACHER_IDS",
    "RequestOptions",
    "TraceLevel",
    "is_of_one_model",
    "mixture_from",
]

OPTIONS = "optimal_sampling"
"""Key of the JSON text in `extra_args`, and of the engine's settings in the model's config."""

STUDENT_IDS = "optimal_sampling_student_ids"
"""Key of the student's prompt ids in `extra_args`, where they differ from the request's prompt."""

TEACHER_IDS = "optimal_sampling_teacher_ids"
"""Key of the teacher's prompt ids, where the scheduler made the student's the request's prompt."""

RESERVED_KEYS = frozenset({OPTIONS, STUDENT_IDS, TEACHER_IDS})
"""Keys of `extra_args` that a client of the server cannot set."""

MODES: frozenset[Mode] = frozenset({"mixture", "teacher", "student"})
"""Modes of a request."""

TraceLevel = Literal["off", "alpha", "full"]

_SAMPLED_BY_VLLM = frozenset({"temperature", "top_k", "top_p"})


def mixture_from(values: Mapping[str, Any], base: MixtureConfig) -> MixtureConfig:
    """`base` with some fields replaced. Raises ConfigError for an unknown name or a wrong type.

    Where a method without bounds is asked for, those of `base` are left out.
    """
    types = _types()
    converted: dict[str, Any] = {}
    for name, value in values.items():
        if name not in types:
            raise ConfigError(f"unknown option {name!r}; there are: {', '.join(sorted(types))}")
        expected, *others = types[name]
        if value is None and others:
            converted[name] = None
            continue
        if not _has_type(value, expected):
            raise ConfigError(f"{name} must be of type {expected.__name__}, got {value!r}")
        converted[name] = expected(value)
    if converted.get("alpha_method") in UNBOUNDED_METHODS:
        default = MixtureConfig()
        base = replace(base, alpha_min=default.alpha_min, alpha_max=default.alpha_max)
    return replace(base, **converted)


@cache
def _types() -> dict[str, tuple[type, ...]]:
    """The type of every option's values; with NoneType where it can be unset."""
    hints = get_type_hints(MixtureConfig)
    types: dict[str, tuple[type, ...]] = {}
    for item in fields(MixtureConfig):
        hint = hints[item.name]
        if isinstance(hint, UnionType):
            types[item.name] = get_args(hint)
        else:
            types[item.name] = (str if get_origin(hint) is Literal else hint,)
    return types


def _has_type(value: object, expected: type) -> bool:
    """Whether a JSON value has this type; an integer counts as a float, a boolean does not."""
    if expected is float:
        return type(value) in (int, float)
    return type(value) is expected


@dataclass(frozen=True)
class RequestOptions:
    """Options of one request.

    `mixture` has the request's temperature; its top-k and top-p are off, because vLLM applies them
    to q* itself.
    """

    mixture: MixtureConfig = field(default_factory=MixtureConfig)
    mode: Mode = "mixture"
    """Distribution that is drawn from: q*, the teacher's or the student's."""
    trace: TraceLevel = "off"
    """Values kept per token: none; alpha, both KLs and whether clamped; or all of TRACE_FIELDS."""
    student_ids: tuple[int, ...] | None = None
    """The student's prompt ids. None: the request's prompt."""

    def extra_args(self, base: MixtureConfig) -> dict[str, Any]:
        """`SamplingParams.extra_args`, `vllm_xargs` of the server; without fields as in `base`."""
        own, default = asdict(self.mixture), asdict(base)
        changed = {
            name: value
            for name, value in own.items()
            if name not in _SAMPLED_BY_VLLM and value != default[name]
        }
        options = {"mixture": changed, "mode": self.mode, "trace": self.trace}
        result: dict[str, Any] = {OPTIONS: json.dumps(options)}
        if self.student_ids is not None:
            result[STUDENT_IDS] = list(self.student_ids)
        return result

    @classmethod
    def read(
        cls, extra_args: Mapping[str, Any] | None, temperature: float, base: MixtureConfig
    ) -> RequestOptions:
        """The inverse of `extra_args`. Raises ConfigError.

        `temperature` is vLLM's. Greedy requests (0) have q* solved at temperature 1.
        """
        given = extra_args or {}
        values = _parse_options(given.get(OPTIONS, "{}"))
        mode = values.get("mode", "mixture")
        trace = values.get("trace", "off")
        if mode not in MODES or trace not in get_args(TraceLevel):
            raise ConfigError(f"mode {mode!r} or trace {trace!r} is not known")
        sampled = {"temperature": float(temperature) or 1.0, "top_k": -1, "top_p": 1.0}
        mixture = mixture_from({**values.get("mixture", {}), **sampled}, base)
        return cls(mixture, mode, trace, _token_ids(given.get(STUDENT_IDS)))


def is_of_one_model(extra_args: Mapping[str, Any]) -> bool:
    """Whether a request with these `extra_args` is drawn from one of the models alone."""
    text = str(extra_args.get(OPTIONS, ""))
    return '"mode"' in text and json.loads(text).get("mode", "mixture") != "mixture"


def _parse_options(text: Any) -> dict[str, Any]:
    try:
        return dict(json.loads(text) if isinstance(text, str) else text)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{OPTIONS} must be a JSON object, got {text!r}") from error


def _token_ids(value: object) -> tuple[int, ...] | None:
    if value is None:
        return None
    if not isinstance(value, Sequence) or isinstance(value, str) or not value:
        raise ConfigError(f"{STUDENT_IDS} must be a list of at least one token id")
    if not all(type(each) is int and each >= 0 for each in value):
        raise ConfigError(f"{STUDENT_IDS} must hold token ids")
    return tuple(value)
