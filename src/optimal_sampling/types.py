"""Types shared by all folders: requests, completions, and names of options. No torch."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from optimal_sampling.errors import PromptError

__all__ = [
    "ALPHA_METHODS",
    "LIST_FIELDS",
    "TRACE_FIELDS",
    "TRACE_TABLE",
    "UNBOUNDED_METHODS",
    "AlphaMethod",
    "ByteLevel",
    "Completion",
    "FinishReason",
    "Granularity",
    "Hint",
    "Mode",
    "Request",
    "TokenTrace",
    "TraceField",
    "Unreadable",
    "WorkerStatus",
    "noise_key",
    "prompt_id",
    "weighted_mean",
]

AlphaMethod = Literal[
    "kl_symmetry",
    "reverse_kl_symmetry",
    "ess_balance",
    "entropy",
    "fixed",
    "trust_region",
    "schedule",
    "mirror",
    "veto",
    "interleaved",
    "arithmetic",
]
"""How q is made of student and teacher at each token: a method that chooses alpha, the weight of
the teacher in the geometric mixture (`distribution/methods.py`), or another mixture, which has no
alpha (`distribution/rules.py`)."""

ALPHA_METHODS: tuple[str, ...] = get_args(AlphaMethod)

UNBOUNDED_METHODS = ("veto", "interleaved", "arithmetic")
"""Methods that alpha_min and alpha_max do not apply to."""

FinishReason = Literal["stop", "length", "error"]

Hint = Literal["none", "right", "wrong", "other"]
"""Which solution a prompt shows: its own, that with another final answer, or the next row's."""

Mode = Literal["mixture", "student", "teacher"]
"""What tokens are drawn from: q*, or one of the two models alone."""

Granularity = Literal["token", "byte"]
"""What q* is a law of: the next token, or where the two tokenizers differ the next byte."""


@dataclass(frozen=True, slots=True)
class TraceField:
    """One number that is kept of every token. `compute` makes it from other quantities, by name."""

    name: str
    meaning: str
    compute: Callable[[Mapping[str, Any]], Any] | None = None

    def value(self, quantities: Mapping[str, Any]) -> Any:
        """`quantities`: those of `distribution.mixture.trace_of`, one number per row each."""
        return self.compute(quantities) if self.compute else quantities[self.name]


TRACE_TABLE = (
    TraceField("alpha", "weight of the teacher, 0..1; NaN where q is no geometric mixture"),
    TraceField("clamped", "1.0 where alpha_min or alpha_max moved alpha, else 0.0"),
    TraceField("kl_student", "KL(q || p_student), nats; p_student without the teacher's support"),
    TraceField("kl_teacher", "KL(q || p_teacher), nats; p_teacher without its support's cut"),
    TraceField("ess_student", "1 / sum q^2 / p_student, a share in (0, 1]"),
    TraceField("ess_teacher", "1 / sum q^2 / p_teacher, a share in (0, 1]"),
    TraceField("entropy", "H(q), nats"),
    TraceField("log_p_student", "log p_student of the token, at the run's temperature"),
    TraceField("log_p_teacher", "log p_teacher of the token, at the run's temperature"),
    TraceField("log_q", "log-probability the token was drawn with, after top-k and top-p"),
    TraceField("fallback", "1.0 where the supports do not meet and q is the teacher, else 0.0"),
    TraceField("curvature", "Var_q[log p_teacher - log p_student], nats^2; 0 where both agree"),
    TraceField("vetoed", "1 - p_student(S): the student's mass outside of the teacher's support"),
    TraceField("kl_student_restricted", "KL(q || p_student restricted to the support), nats"),
    TraceField("kl_teacher_restricted", "KL(q || p_teacher restricted to the support), nats"),
    TraceField("log_p_student_restricted", "log p_student of the token, restricted to the support"),
)
"""The diagnostics of one token, in the order in which engines and `distribution` keep them."""

TRACE_FIELDS: tuple[str, ...] = tuple(each.name for each in TRACE_TABLE)

LIST_FIELDS = ("covered_student", "covered_teacher", "tv_bound")
"""What an engine that knows the likeliest tokens alone keeps beside TRACE_FIELDS: the mass of both
lists, and a bound on the total variation between q of the lists, before top-k and top-p, and the
exact q."""


@dataclass(frozen=True, slots=True)
class Unreadable:
    """A value of a row that could not be read: records show its text, and prompts cannot have it.

    `str` of it raises PromptError, so that a row fails where its prompts need the value.
    """

    reason: str
    text: str = ""

    def __str__(self) -> str:
        raise PromptError(self.reason)


def weighted_mean(values: Sequence[float], weights: Sequence[float]) -> float:
    """Mean over the pairs of finite numbers; NaN where the weights are 0.

    With `curvature` as weights of `alpha`: alpha where the models differ. Where they agree, every
    alpha gives the same q and the one that is chosen means nothing.
    """
    pairs = [pair for pair in zip(values, weights, strict=True) if all(map(math.isfinite, pair))]
    total = math.fsum(weight for _, weight in pairs)
    return math.fsum(value * weight for value, weight in pairs) / total if total > 0 else math.nan


def prompt_id(student_prompt: str, teacher_prompt: str) -> str:
    """Content hash (32 hex digits) of the two rendered prompts, which identifies a prompt."""
    digest = hashlib.blake2b(digest_size=16)
    for text in (student_prompt, teacher_prompt):
        data = text.encode("utf-8", "surrogatepass")
        digest.update(len(data).to_bytes(8, "little"))
        digest.update(data)
    return digest.hexdigest()


def noise_key(seed: int, request_id: str, sample_index: int) -> int:
    """64-bit key of a request's noise: a function of the seed, the prompt and the sample alone."""
    text = f"{seed}\x00{request_id}\x00{sample_index}"
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


@dataclass(frozen=True, slots=True)
class Request:
    """One completion to generate. The prompts may differ; the completion is common to both."""

    id: str
    sample_index: int
    seed: int
    student_prompt_ids: tuple[int, ...]
    teacher_prompt_ids: tuple[int, ...]
    max_new_tokens: int

    def prompt_ids(self, role: str) -> tuple[int, ...]:
        """Prompt of `student` or `teacher`."""
        return self.student_prompt_ids if role == "student" else self.teacher_prompt_ids

    @property
    def key(self) -> tuple[str, int]:
        """What identifies this request among those of a run: the prompt and the sample."""
        return self.id, self.sample_index

    @property
    def noise_key(self) -> int:
        """64-bit key of this request's noise."""
        return noise_key(self.seed, self.id, self.sample_index)


@dataclass(frozen=True, slots=True)
class WorkerStatus:
    """A worker of a fleet, as it is shown."""

    name: str
    device: str
    state: str
    """`waiting` (for its restart), `starting`, `working`, `idle` or `given up`."""
    in_flight: int
    """Requests that it has."""
    tokens_per_second: float
    failures: int = 0
    """Since the run began."""


@dataclass(frozen=True, slots=True)
class TokenTrace:
    """Diagnostics of every token of a completion: one tuple of floats per name in TRACE_FIELDS,
    and of some engines in LIST_FIELDS too."""

    columns: Mapping[str, tuple[float, ...]]

    def __getitem__(self, name: str) -> tuple[float, ...]:
        return self.columns[name]

    def __len__(self) -> int:
        return len(self.columns["alpha"])

    @classmethod
    def from_rows(
        cls, rows: list[tuple[float, ...]], names: Sequence[str] = TRACE_FIELDS
    ) -> TokenTrace:
        """`rows`: one tuple of len(names) floats per token."""
        columns = zip(*rows, strict=True) if rows else [()] * len(names)
        return cls(dict(zip(names, map(tuple, columns), strict=True)))

    @property
    def ess_ratio(self) -> tuple[float, ...]:
        """ess_teacher / ess_student per token; above 1 where q is closer to the teacher."""
        pairs = zip(self["ess_teacher"], self["ess_student"], strict=True)
        return tuple(teacher / student if student else float("nan") for teacher, student in pairs)


@dataclass(frozen=True, slots=True)
class ByteLevel:
    """What a completion that was drawn byte by byte has beside its tokens."""

    text: str
    """What was drawn."""
    lost: Mapping[str, float]
    """By role, the share of the mass that its byte view gave up, summed over the bytes."""
    canonical: bool
    """`token_ids` are the tokenizer's own for the text; else those the student's view followed."""
    trace: TokenTrace
    """Of every byte, and of the end where the text has one."""


@dataclass(frozen=True, slots=True)
class Completion:
    """Result of one request.

    `token_ids` holds the stop token too where there is one. With `finish_reason="error"`, `error`
    says why and `token_ids` holds what was drawn until then. `captured` holds per-token rows that
    the engine was asked to keep (see `LocalEngine`), by name.
    """

    request: Request
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    trace: TokenTrace
    error: str = ""
    seconds: float = 0.0
    captured: Mapping[str, Any] = field(default_factory=dict)
    byte_level: ByteLevel | None = None
    """Where bytes were drawn. The trace then has sums over the bytes of each token."""

    @classmethod
    def failed(cls, request: Request, error: str) -> Completion:
        """A completion of no tokens, and why."""
        return cls(request, (), "error", TokenTrace.from_rows([]), error)
