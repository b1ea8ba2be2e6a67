"""What one request asks of the mixture, and how it travels through vLLM's `SamplingParams.extra_args`.

Temperature, top-k and top-p are vLLM's own parameters. Everything else is one JSON text and, where the student has
another prompt, its token ids. Knows nothing of vLLM or torch.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Literal, get_args

from optimal_sampling.config import MixtureConfig
from optimal_sampling.errors import ConfigError
from optimal_sampling.types import Mode

__all__ = [
    "MODES",
    "OPTIONS",
    "OTHER_IDS",
    "RequestOptions",
    "TraceLevel",
    "is_teacher_alone",
    "mixture_from",
]

OPTIONS = "optimal_sampling"
"""Key of the JSON text in `extra_args`, and of the engine's own settings in the model's config."""

OTHER_IDS = "optimal_sampling_student_ids"
"""Key of the student's prompt ids in `extra_args`, where they are not the request's own."""

MODES: frozenset[Mode] = frozenset({"mixture", "teacher"})
"""Modes of a request."""

TraceLevel = Literal["off", "alpha", "full"]

_SAMPLED_BY_VLLM = frozenset({"temperature", "top_k", "top_p"})


def mixture_from(values: Mapping[str, Any], base: MixtureConfig) -> MixtureConfig:
    """`base` with some fields replaced. ConfigError for a name or a value that it cannot have."""
    kinds = {item.name: type(getattr(base, item.name)) for item in fields(MixtureConfig)}
    clean: dict[str, Any] = {}
    for name, value in values.items():
        if name not in kinds:
            raise ConfigError(f"unknown option {name!r}; there are: {', '.join(sorted(kinds))}")
        kind = kinds[name]
        fits = (
            isinstance(value, (int, float)) and not isinstance(value, bool)
            if kind is float
            else type(value) is kind
        )
        if not fits:
            raise ConfigError(f"{name} must be of type {kind.__name__}, got {value!r}")
        clean[name] = kind(value)
    return replace(base, **clean)


@dataclass(frozen=True)
class RequestOptions:
    """`mixture` has vLLM's temperature, and top-k and top-p switched off: vLLM applies these to q* itself."""

    mixture: MixtureConfig = field(default_factory=MixtureConfig)
    mode: Mode = "mixture"
    """The mixture, or the teacher alone."""
    trace: TraceLevel = "off"
    """What is kept of each token: nothing, alpha with both KLs and whether clamped, or all of `TRACE_FIELDS`."""
    student_ids: tuple[int, ...] | None = None
    """The student's prompt where it is not the request's own."""

    def extra_args(self, base: MixtureConfig) -> dict[str, Any]:
        """For `SamplingParams.extra_args` and the server's `vllm_xargs`; only what differs from `base` is written."""
        ours, theirs = asdict(self.mixture), asdict(base)
        changed = {k: v for k, v in ours.items() if k not in _SAMPLED_BY_VLLM and v != theirs[k]}
        result: dict[str, Any] = {
            OPTIONS: json.dumps({"mixture": changed, "mode": self.mode, "trace": self.trace}),
        }
        if self.student_ids is not None:
            result[OTHER_IDS] = list(self.student_ids)
        return result

    @classmethod
    def read(
        cls, extra_args: Mapping[str, Any] | None, temperature: float, base: MixtureConfig
    ) -> RequestOptions:
        """The inverse. `temperature` is vLLM's; where that is 0, q* is solved at 1 and its likeliest token taken."""
        given = extra_args or {}
        text = given.get(OPTIONS, "{}")
        try:
            values = json.loads(text) if isinstance(text, str) else dict(text)
        except (ValueError, TypeError) as error:
            raise ConfigError(f"{OPTIONS} must be a JSON object, got {text!r}") from error
        mode, trace = values.get("mode", "mixture"), values.get("trace", "off")
        if mode not in MODES or trace not in get_args(TraceLevel):
            raise ConfigError(f"mode {mode!r} or trace {trace!r} is not known")
        sampled = {"temperature": float(temperature) or 1.0, "top_k": -1, "top_p": 1.0}
        mixture = mixture_from({**values.get("mixture", {}), **sampled}, base)
        return cls(mixture, mode, trace, _ids(given.get(OTHER_IDS)))


def is_teacher_alone(extra_args: Mapping[str, Any]) -> bool:
    """Whether a request with these `extra_args` leaves the student out."""
    return (
        '"mode"' in (text := str(extra_args.get(OPTIONS, "")))
        and json.loads(text).get("mode") == "teacher"
    )


def _ids(value: object) -> tuple[int, ...] | None:
    if value is None:
        return None
    if not isinstance(value, Sequence) or isinstance(value, str) or not value:
        raise ConfigError(f"{OTHER_IDS} must be a list of at least one token id")
    if not all(type(each) is int and each >= 0 for each in value):
        raise ConfigError(f"{OTHER_IDS} must hold token ids")
    return tuple(value)
