"""What a record is, and how it becomes a line and back. `docs/records.md` documents every field.

Knows nothing of files, engines or torch.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from optimal_sampling.types import Completion, TokenTrace, prompt_id

__all__ = [
    "SCHEMA_VERSION",
    "TOKEN_LISTS",
    "Key",
    "Prompt",
    "Record",
    "completion_record",
    "decode_line",
    "encode_line",
    "failure_record",
    "key_of",
    "looks_like_line",
    "row_id",
]

SCHEMA_VERSION = 1

Record = dict[str, Any]
Key = tuple[str, int]
"""Identity of a record: `id` (content hash of both rendered prompts) and `sample_index`."""

TOKEN_LISTS = {
    "token_alpha": "alpha",
    "token_kl_student": "kl_student",
    "token_kl_teacher": "kl_teacher",
}
"""Field of a record that holds one number per token, and the column of the trace it comes from."""

_DEEPEST = 50  # levels of nesting that a record keeps as they are
_DIGITS = 6  # significant digits of every float in a record: float32 holds seven
_CHECKSUM_BYTES = 8
_TAIL_LENGTH = len(_tail := b',"checksum":"') + 2 * _CHECKSUM_BYTES + len(b'"}\n')


@dataclass(frozen=True, slots=True)
class Prompt:
    """A row of the dataset and what the two models are shown of it."""

    id: str
    row_index: int
    row: Mapping[str, Any]
    student_text: str = ""
    teacher_text: str = ""
    n_student_tokens: int = 0
    n_teacher_tokens: int = 0


def row_id(row: Mapping[str, Any]) -> str:
    """Identity of a row that could not be rendered: a content hash of the row."""
    return prompt_id("\x00row", json.dumps(_jsonable(row), sort_keys=True))


def key_of(record: Record) -> Key:
    """The identity of a record."""
    return record["id"], record["sample_index"]


def completion_record(
    prompt: Prompt, completion: Completion, text: str, *, attempts: int, token_lists: bool
) -> Record:
    """The record of what an engine gave back; `text` is the completion, decoded."""
    request, trace = completion.request, completion.trace
    record = _head(prompt, request.sample_index, request.seed)
    record |= {
        "completion": text,
        "completion_ids": list(completion.token_ids),
        "finish_reason": completion.finish_reason,
        "n_completion_tokens": len(completion.token_ids),
        **_statistics(trace),
        "error": completion.error,
        "attempts": attempts,
        "seconds": round(completion.seconds, 3),
        "schema_version": SCHEMA_VERSION,
    }
    if token_lists:
        record |= {field: _rounded(trace[column]) for field, column in TOKEN_LISTS.items()}
    return record


def failure_record(
    prompt: Prompt, sample_index: int, seed: int, error: str, *, attempts: int, token_lists: bool
) -> Record:
    """The record of a row that never reached an engine."""
    record = _head(prompt, sample_index, seed)
    record |= {
        "completion": "",
        "completion_ids": [],
        "finish_reason": "error",
        "n_completion_tokens": 0,
        **_statistics(TokenTrace.from_rows([])),
        "error": error,
        "attempts": attempts,
        "seconds": 0.0,
        "schema_version": SCHEMA_VERSION,
    }
    if token_lists:
        record |= {field: [] for field in TOKEN_LISTS}
    return record


def _head(prompt: Prompt, sample_index: int, seed: int) -> Record:
    return {
        "id": prompt.id,
        "sample_index": sample_index,
        "seed": seed,
        "row_index": prompt.row_index,
        "row": _jsonable(prompt.row),
        "student_prompt": prompt.student_text,
        "teacher_prompt": prompt.teacher_text,
        "n_student_prompt_tokens": prompt.n_student_tokens,
        "n_teacher_prompt_tokens": prompt.n_teacher_tokens,
    }


def _statistics(trace: TokenTrace) -> Record:
    alpha = _finite(trace["alpha"])
    return {
        "alpha_mean": _mean(alpha),
        "alpha_min": _round(min(alpha, default=math.nan)),
        "alpha_max": _round(max(alpha, default=math.nan)),
        "clamped_share": _mean(trace["clamped"]),
        "kl_student": _mean(trace["kl_student"]),
        "kl_teacher": _mean(trace["kl_teacher"]),
        "ess_ratio": _mean(trace.ess_ratio),
    }


def _finite(values: Iterable[float]) -> list[float]:
    return [value for value in values if math.isfinite(value)]


def _mean(values: Iterable[float]) -> float | None:
    finite = _finite(values)
    return _round(math.fsum(finite) / len(finite)) if finite else None


def _round(value: float) -> float | None:
    return float(f"{value:.{_DIGITS}g}") if math.isfinite(value) else None


def _rounded(values: Sequence[float]) -> list[float | None]:
    return [_round(value) for value in values]


def _jsonable(value: Any, depth: int = 0) -> Any:
    """What JSON can hold: NaN and infinities become null, what it does not know or is nested absurdly becomes text."""
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if depth > _DEEPEST:
        return json.dumps(value, default=str)
    if isinstance(value, Mapping):
        return {str(key): _jsonable(inner, depth + 1) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_jsonable(inner, depth + 1) for inner in value]
    return str(value)


def encode_line(record: Record) -> bytes:
    """A whole line: the record as JSON in UTF-8, the checksum of those bytes as its last field."""
    body = json.dumps(record, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    try:
        data = body.encode()
    except UnicodeEncodeError:  # a lone surrogate has no UTF-8; escaped it survives
        data = json.dumps(record, allow_nan=False, separators=(",", ":")).encode()
    data = data[:-1]
    return data + _tail + _checksum(data) + b'"}\n'


def decode_line(line: bytes) -> Record | None:
    """The record, or None if the line is not byte for byte what `encode_line` made."""
    data, tail = line[:-_TAIL_LENGTH], line[-_TAIL_LENGTH:]
    if not data or tail != _tail + _checksum(data) + b'"}\n':
        return None
    record: Record = json.loads(data + b"}")
    return record


def looks_like_line(line: bytes) -> bool:
    """Whether a bad line may once have been one of ours."""
    return line.startswith(b'{"id":"')


def _checksum(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=_CHECKSUM_BYTES).hexdigest().encode()
