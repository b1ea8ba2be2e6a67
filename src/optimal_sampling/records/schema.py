"""The fields of a record, in one table: name, type, meaning, and how a sample gives the value.

`docs/records.md` has the same table, which the tests compare. No files, engines or torch.
"""

import json
import math
from base64 import b64encode
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from operator import attrgetter
from typing import Annotated, Any, NotRequired, TypedDict, cast, get_type_hints

from optimal_sampling.types import (
    ByteLevel,
    Completion,
    FinishReason,
    Granularity,
    Mode,
    Request,
    TokenTrace,
    Unreadable,
    prompt_id,
    weighted_mean,
)

__all__ = [
    "FIELDS",
    "MAY_BE_ABSENT",
    "SCHEMA_VERSION",
    "Field",
    "Key",
    "Prompt",
    "Record",
    "Sample",
    "jsonable",
    "key_of",
    "record_of",
    "row_id",
    "stage_id",
]

SCHEMA_VERSION = 1

Key = tuple[str, int]
"""Identity of a record: `id` (content hash of both rendered prompts, and of the stage in a run of
stages) and `sample_index`."""

_MAX_DEPTH = 50  # levels of nesting of a row that a record keeps
_DIGITS = 6  # significant digits of every float in a record: float32 holds seven


@dataclass(frozen=True, slots=True)
class Prompt:
    """A row of the dataset and the two prompts made of it; no prompts where rendering failed."""

    id: str
    row_index: int
    row: Mapping[str, Any]
    student_text: str = ""
    teacher_text: str = ""
    n_student_tokens: int = 0
    n_teacher_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Sample:
    """One completion of one prompt: all that a record is made of.

    Where a row could not be rendered, the completion has an error, no tokens and no prompt ids.
    """

    prompt: Prompt
    completion: Completion
    text: str
    """The completion, decoded."""
    attempts: int
    raw_text: str | None = None
    """The completion, decoded with its special tokens; None where there is none."""
    mode: Mode = "mixture"
    granularity: Granularity = "token"
    stage: str = ""
    """Name of the stage; "" in a run without stages."""
    tries: int = 0
    """Tries of the prompt up to and including this one, those of earlier stages counted."""

    @property
    def request(self) -> Request:
        """The request that the completion answers."""
        return self.completion.request

    @property
    def trace(self) -> TokenTrace:
        """Diagnostics of every token."""
        return self.completion.trace


@dataclass(frozen=True, slots=True)
class Field:
    """Meaning of a field of Record (as in docs/records.md), and its value for a sample."""

    meaning: str
    take: Callable[[Sample], Any]
    is_mean: bool = False
    """A mean over the tokens of the completion; summaries average it over all tokens."""
    per_completion: bool = False
    """The mean is over completions, each of which has a sum."""
    weight: str = ""
    """Field that is the weight of a token in this mean, beside 1."""
    is_largest: bool = False
    """The largest over the tokens of the completion; summaries have that over all."""


def _finite(values: Iterable[float]) -> list[float]:
    return [value for value in values if math.isfinite(value)]


def _mean(values: Iterable[float]) -> float | None:
    finite = _finite(values)
    return _rounded(math.fsum(finite) / len(finite)) if finite else None


def _rounded(value: float) -> float | None:
    return float(f"{value:.{_DIGITS}g}") if math.isfinite(value) else None


def _mean_of(column: str, meaning: str) -> Field:
    """The mean over tokens of a column of the trace, without NaN and infinities."""
    return Field(meaning, lambda s: _mean(s.trace[column]), is_mean=True)


def _extreme_alpha(choose: Callable[..., float | None], meaning: str) -> Field:
    def take(sample: Sample) -> float | None:
        value = choose(_finite(sample.trace["alpha"]), default=None)
        return None if value is None else _rounded(value)

    return Field(meaning, take)


def _weighted_alpha(sample: Sample) -> float | None:
    return _rounded(weighted_mean(sample.trace["alpha"], sample.trace["curvature"]))


def _chernoff(sample: Sample) -> float | None:
    """−F(alpha) = (1 − alpha) KL(q‖p_student) + alpha KL(q‖p_teacher), mean over tokens."""
    trace = sample.trace
    columns = zip(trace["alpha"], trace["kl_student"], trace["kl_teacher"], strict=True)
    return _mean((1 - alpha) * student + alpha * teacher for alpha, student, teacher in columns)


def _nll_student(sample: Sample) -> float | None:
    """−log p_student of the whole completion; None where a token has no finite one."""
    log_p = sample.trace["log_p_student"]
    return _rounded(-math.fsum(log_p)) if log_p else None


def _top_tokens(sample: Sample) -> dict[str, Any] | None:
    """Ids and log-probabilities as the bytes of two arrays, [tokens, distributions, k]."""
    captured = sample.completion.captured
    if "top_ids" not in captured:
        return None
    ids, log_p = captured["top_ids"].numpy(), captured["top_log_p"].numpy()
    names = ["student", "teacher", "mixture"] if sample.mode == "mixture" else [sample.mode]
    return {
        "k": ids.shape[2],
        "distributions": names,
        "ids": b64encode(ids.astype("<i4").tobytes()).decode(),
        "log_p": b64encode(log_p.astype("<f2").tobytes()).decode(),
    }


def _lost(role: str) -> Field:
    """What the byte view of a model gave up."""
    meaning = (
        f"two tokenizers: share of the {role}'s probability that its byte view gave up, summed "
        "over the bytes; absent with one tokenizer"
    )

    def take(sample: Sample) -> float | None:
        found: float | None = _of_bytes(sample, lambda b: _rounded(b.lost.get(role, 0.0)))
        return found

    return Field(meaning, take, is_mean=True, per_completion=True)


def _of_lists(column: str, meaning: str, choose: Callable[..., float] | None = None) -> Field:
    """The mean over tokens, or what `choose` takes, of what is known of lists of tokens."""
    meaning = f"engine `servers`: {meaning}; absent with other engines"

    def take(sample: Sample) -> float | None:
        values = _finite(sample.trace.columns.get(column, ()))
        if choose is None or not values:
            return _mean(values)
        return _rounded(choose(values))

    return Field(meaning, take, is_mean=choose is None, is_largest=choose is max)


def _byte_list(column: str, meaning: str) -> Field:
    """A column of the trace of bytes."""
    meaning = f"two tokenizers: {meaning} of every byte and of the end, with `--byte-lists`"
    return Field(meaning, lambda s: _of_bytes(s, lambda b: [_rounded(x) for x in b.trace[column]]))


def _of_bytes(sample: Sample, take: Callable[[ByteLevel], Any]) -> Any:
    """What a completion drawn byte by byte has; None of another."""
    drawn = sample.completion.byte_level
    return None if drawn is None else take(drawn)


def _token_list(column: str, meaning: str) -> Field:
    """A column of the trace, one number per token."""
    meaning = f"{meaning} of every token; absent with `--no-token-lists`"
    return Field(meaning, lambda s: [_rounded(value) for value in s.trace[column]])


def _if_any(values: Sequence[float]) -> list[float | None] | None:
    """The numbers, or None where none is above 0."""
    return [_rounded(value) for value in values] if any(value > 0 for value in values) else None


class Record(TypedDict):
    """One line of a file of records: type, meaning and source of each field, in order."""

    id: Annotated[
        str,
        Field(
            "content hash of the two rendered prompts (32 hex digits), and of the stage in a run "
            "of stages; of the row, where it could not be rendered",
            attrgetter("prompt.id"),
        ),
    ]
    sample_index: Annotated[
        int,
        Field(
            "which of `--samples-per-prompt`, in a run of stages which try of its stage; "
            "with `id` the identity of a record",
            attrgetter("completion.request.sample_index"),
        ),
    ]
    seed: Annotated[int, Field("the run's seed", attrgetter("request.seed"))]
    mode: Annotated[
        Mode,
        Field("what tokens were drawn from: `mixture`, `student` or `teacher`", attrgetter("mode")),
    ]
    stage: Annotated[
        NotRequired[str],
        Field("name of the stage; absent in a run without stages", lambda s: s.stage or None),
    ]
    tries: Annotated[
        NotRequired[int],
        Field(
            "tries that the stages have for a prompt up to and including this one; absent in a run "
            "without stages",
            lambda s: s.tries or None,
        ),
    ]
    granularity: Annotated[
        Granularity,
        Field(
            "what was drawn one by one: `token`, or `byte` where the two tokenizers differ",
            attrgetter("granularity"),
        ),
    ]
    row_index: Annotated[
        int,
        Field(
            "place of the row in the dataset, from 0, before `--data-slice`",
            attrgetter("prompt.row_index"),
        ),
    ]
    row: Annotated[
        dict[str, Any],
        Field(
            "columns of the row, unchanged but for NaN (null), bytes (their number and a hash) and "
            "values that cannot be read; a column may have any name",
            lambda s: jsonable(s.prompt.row),
        ),
    ]
    student_prompt: Annotated[
        str,
        Field(
            "the student's prompt; empty where the row could not be rendered",
            attrgetter("prompt.student_text"),
        ),
    ]
    teacher_prompt: Annotated[str, Field("the teacher's prompt", attrgetter("prompt.teacher_text"))]
    n_student_prompt_tokens: Annotated[
        int, Field("tokens of the student's prompt", attrgetter("prompt.n_student_tokens"))
    ]
    n_teacher_prompt_tokens: Annotated[
        int, Field("tokens of the teacher's prompt", attrgetter("prompt.n_teacher_tokens"))
    ]
    completion: Annotated[
        str, Field("text without its stop token and special tokens", attrgetter("text"))
    ]
    completion_raw: Annotated[
        NotRequired[str],
        Field(
            "text with its special tokens, without its stop token; absent if equal to `completion`",
            lambda s: None if s.raw_text == s.text else s.raw_text,
        ),
    ]
    completion_ids: Annotated[
        list[int],
        Field("every token drawn, the stop token included", lambda s: list(s.completion.token_ids)),
    ]
    finish_reason: Annotated[
        FinishReason,
        Field(
            "`stop` (an end token), `length` (`--max-new-tokens` or a full context) or `error`",
            attrgetter("completion.finish_reason"),
        ),
    ]
    n_completion_tokens: Annotated[
        int, Field("length of `completion_ids`", lambda s: len(s.completion.token_ids))
    ]
    alpha_mean: Annotated[
        float | None, _mean_of("alpha", "weight of the teacher, mean over tokens")
    ]
    alpha_min: Annotated[float | None, _extreme_alpha(min, "smallest over tokens")]
    alpha_max: Annotated[float | None, _extreme_alpha(max, "largest over tokens")]
    clamped_share: Annotated[
        float | None,
        _mean_of("clamped", "share of tokens whose alpha `--alpha-min` or `--alpha-max` moved"),
    ]
    kl_student: Annotated[
        float | None, _mean_of("kl_student", "mean over tokens of KL(q ‖ p_student), in nats")
    ]
    kl_teacher: Annotated[
        float | None, _mean_of("kl_teacher", "mean over tokens of KL(q ‖ p_teacher), in nats")
    ]
    ess_ratio: Annotated[
        float | None,
        Field(
            "mean over tokens of the effective sample size to the teacher over that to the student",
            lambda s: _mean(s.trace.ess_ratio),
        ),
    ]
    ess_student: Annotated[
        float | None,
        _mean_of("ess_student", "effective sample size to the student, a share, mean over tokens"),
    ]
    ess_teacher: Annotated[
        float | None,
        _mean_of("ess_teacher", "effective sample size to the teacher, a share, mean over tokens"),
    ]
    curvature: Annotated[
        float | None,
        _mean_of("curvature", "mean over tokens of Var_q[log p_teacher − log p_student], in nats²"),
    ]
    alpha_weighted: Annotated[
        float | None,
        Field(
            "alpha where the models differ: mean over tokens, each with its `curvature` as weight",
            _weighted_alpha,
            is_mean=True,
            weight="curvature",
        ),
    ]
    chernoff: Annotated[
        float | None,
        Field(
            "mean over tokens of −log Σ p_student^(1−alpha) p_teacher^alpha, in nats: the Chernoff "
            "information where alpha is the free root of `kl_symmetry`, a lower bound elsewhere",
            _chernoff,
            is_mean=True,
        ),
    ]
    log_p_student: Annotated[
        float | None,
        _mean_of(
            "log_p_student",
            "log p_student of the tokens drawn, at the run's temperature, mean over tokens",
        ),
    ]
    nll_student: Annotated[
        float | None,
        Field(
            "−log p_student of the whole completion, at the run's temperature, in nats",
            _nll_student,
        ),
    ]
    vetoed: Annotated[
        float | None,
        _mean_of(
            "vetoed",
            "1 − p_student(S), mean over tokens, with S the tokens that the teacher finds plausible"
            " (its support; of `interleaved` its own set); 0 without such a set",
        ),
    ]
    kl_student_restricted: Annotated[
        float | None,
        _mean_of("kl_student_restricted", "`kl_student` to p_student restricted to the support"),
    ]
    kl_teacher_restricted: Annotated[
        float | None,
        _mean_of("kl_teacher_restricted", "`kl_teacher` to p_teacher restricted to the support"),
    ]
    log_p_student_restricted: Annotated[
        float | None,
        _mean_of("log_p_student_restricted", "`log_p_student` of p_student restricted likewise"),
    ]
    error: Annotated[
        str,
        Field(
            "why there is no good completion; empty where there is one",
            attrgetter("completion.error"),
        ),
    ]
    attempts: Annotated[
        int,
        Field(
            "1, or more where earlier calls recorded failures of this sample",
            attrgetter("attempts"),
        ),
    ]
    seconds: Annotated[
        float,
        Field(
            "time in the engine; the only field that differs between equal runs",
            lambda s: round(s.completion.seconds, 3),
        ),
    ]
    schema_version: Annotated[
        int, Field(f"version of these fields: {SCHEMA_VERSION}", lambda s: SCHEMA_VERSION)
    ]
    top_tokens: Annotated[
        NotRequired[dict[str, Any]],
        Field(
            "the k likeliest tokens of student, teacher and q* at every token, with "
            "`--top-tokens k`; see below",
            _top_tokens,
        ),
    ]
    covered_student: Annotated[
        NotRequired[float],
        _of_lists("covered_student", "the student's mass in the lists, mean over tokens"),
    ]
    covered_teacher: Annotated[
        NotRequired[float],
        _of_lists("covered_teacher", "the teacher's mass in the lists, mean over tokens"),
    ]
    tv_bound: Annotated[
        NotRequired[float],
        _of_lists(
            "tv_bound",
            "bound on the total variation between q of the lists and the exact q, both before "
            "`--top-k` and `--top-p`, mean over tokens",
        ),
    ]
    tv_bound_max: Annotated[
        NotRequired[float], _of_lists("tv_bound", "the largest such bound of a token", max)
    ]
    lost_student: Annotated[NotRequired[float], _lost("student")]
    lost_teacher: Annotated[NotRequired[float], _lost("teacher")]
    canonical_ids: Annotated[
        NotRequired[bool],
        Field(
            "two tokenizers: `completion_ids` are what the student's tokenizer makes of the text; "
            "false where it changes the text, and they are those that the student's view followed",
            lambda s: _of_bytes(s, attrgetter("canonical")),
        ),
    ]
    byte_alpha: Annotated[NotRequired[list[float | None]], _byte_list("alpha", "alpha")]
    byte_kl_student: Annotated[
        NotRequired[list[float | None]], _byte_list("kl_student", "KL(q ‖ p_student)")
    ]
    byte_kl_teacher: Annotated[
        NotRequired[list[float | None]], _byte_list("kl_teacher", "KL(q ‖ p_teacher)")
    ]
    token_alpha: Annotated[NotRequired[list[float | None]], _token_list("alpha", "alpha")]
    token_kl_student: Annotated[
        NotRequired[list[float | None]], _token_list("kl_student", "KL(q ‖ p_student)")
    ]
    token_kl_teacher: Annotated[
        NotRequired[list[float | None]], _token_list("kl_teacher", "KL(q ‖ p_teacher)")
    ]
    token_vetoed: Annotated[
        NotRequired[list[float | None]],
        Field(
            "`vetoed` of every token; absent where it is 0 at all of them, and with "
            "`--no-token-lists`",
            lambda s: _if_any(s.trace["vetoed"]),
        ),
    ]


MAY_BE_ABSENT = (
    "completion_raw",
    "top_tokens",
    "stage",
    "tries",
    "covered_student",
    "covered_teacher",
    "tv_bound",
    "tv_bound_max",
    "lost_student",
    "lost_teacher",
    "canonical_ids",
    "byte_alpha",
    "byte_kl_student",
    "byte_kl_teacher",
    "token_vetoed",
)
"""Fields that are left out where a sample has no value."""

_HINTS = get_type_hints(Record, include_extras=True)

FIELDS: dict[str, Field] = {name: hint.__metadata__[0] for name, hint in _HINTS.items()}
"""The fields of Record by name, in the order of a line."""


def record_of(sample: Sample, *, token_lists: bool = True, byte_lists: bool = False) -> Record:
    """The record of a sample.

    Without `token_lists` and `byte_lists`, it has no fields with one number per token or byte.
    """
    kept = {"token": token_lists, "byte": byte_lists}
    names = [name for name in FIELDS if kept.get(name.partition("_")[0], True)]
    record = {name: FIELDS[name].take(sample) for name in names}
    absent = [name for name in MAY_BE_ABSENT if record.get(name, "") is None]
    for name in absent:
        del record[name]
    return cast(Record, record)


def key_of(record: Record) -> Key:
    """The identity of a record."""
    return record["id"], record["sample_index"]


def row_id(row: Mapping[str, Any]) -> str:
    """Content hash of a row, as it is and as a record has it."""
    return prompt_id("\x00row", json.dumps(jsonable(row), sort_keys=True))


def stage_id(stage: str, prompt: str) -> str:
    """`id` of the records of a stage on a prompt. Their noise is that of no other stage."""
    return prompt_id(f"\x00stage {stage}", prompt)


def jsonable(value: Any, depth: int = 0) -> Any:
    """A value that JSON can hold.

    NaN and infinities become null. Bytes become their number and a hash of them, values that could
    not be read, unknown types and values nested too deeply become text.
    """
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, bytes):
        return f"<{len(value)} bytes, blake2b {blake2b(value, digest_size=8).hexdigest()}>"
    if isinstance(value, Unreadable):
        return value.text or f"<{value.reason}>"
    if depth > _MAX_DEPTH:
        return json.dumps(value, default=jsonable)
    if isinstance(value, Mapping):
        return {str(key): jsonable(inner, depth + 1) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [jsonable(inner, depth + 1) for inner in value]
    return str(value)
