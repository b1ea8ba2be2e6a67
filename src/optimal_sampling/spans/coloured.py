"""The pieces of a record's completion, each with its diagnostics, and the scales of their colours.

Blue stands for the student, orange for the teacher, violet for an amount: three hues that the
common forms of colour blindness keep apart.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from optimal_sampling.spans.pieces import Piece, TokenReader, characters
from optimal_sampling.spans.top_tokens import TopTokens, top_tokens_of

__all__ = [
    "METRICS",
    "Colour",
    "Metric",
    "SpannedText",
    "Unit",
    "colour_of",
    "spanned_text",
    "spanned_tokens",
]

Unit = Literal["token", "byte", "none"]
"""What a piece is made of: tokens, bytes of a character, or a whole text that cannot be cut."""

Colour = tuple[int, int, int, float]
"""Red, green, blue, and opacity."""

_STUDENT, _TEACHER, _AMOUNT = (44, 110, 187), (214, 112, 22), (122, 72, 178)
_AGREE = 1e-3  # nats, KL of q to both: below, every alpha gives nearly the same q
_PALEST = 0.02  # share of a scale below which a colour would not be seen
_DEEPEST = 0.55  # opacity at the end of a scale, over which text is still legible


@dataclass(frozen=True, slots=True)
class Metric:
    """A diagnostic of tokens that text can be coloured by."""

    title: str
    meaning: str
    low: float
    high: float
    is_diverging: bool = False
    """Blue below the middle of the scale and orange above it, else violet from `low` on."""


METRICS: dict[str, Metric] = {
    "alpha": Metric("α", "weight of the teacher", 0.0, 1.0, is_diverging=True),
    "kl_student": Metric("KL to student", "KL(q, student), nats", 0.0, 2.0),
    "kl_teacher": Metric("KL to teacher", "KL(q, teacher), nats", 0.0, 2.0),
    "vetoed": Metric("vetoed mass", "student's mass outside of the teacher's support", 0.0, 1.0),
    "log_ratio": Metric(
        "who led", "log p(teacher) − log p(student) of the token drawn", -4.0, 4.0, True
    ),
    "acceptance": Metric(
        "acceptance", "share of the student's drafts that q accepts, at least", 1.0, 0.0
    ),
}
"""By the names of `SpannedText.columns`. `low` is the end without colour."""


@dataclass(frozen=True)
class SpannedText:
    """The text of a completion in pieces, with one number per piece and metric."""

    pieces: Sequence[Piece]
    unit: Unit
    columns: Mapping[str, Sequence[float | None]] = field(default_factory=dict)
    """By the names of METRICS. Of a piece of several tokens, the mean over them."""
    end: str = ""
    """The end token, which is no part of the text."""
    end_values: Mapping[str, float | None] = field(default_factory=dict)
    """Of the end token."""
    top: TopTokens | None = None
    note: str = ""
    """Why the text is not in pieces."""

    def values(self, place: int) -> dict[str, float | None]:
        """The diagnostics of a piece by name."""
        return {name: column[place] for name, column in self.columns.items()}


def spanned_text(
    record: Mapping[str, Any], reader: TokenReader | None, problem: str = ""
) -> SpannedText:
    """The completion of a record. `problem`: why there is no reader.

    A text that the tokens do not make is left whole, and `note` says so.
    """
    text = str(record.get("completion_raw", record["completion"]))
    if record.get("byte_alpha"):
        return _of_bytes(record, text)
    if reader is None:
        return _whole(text, problem)
    ids: list[int] = record["completion_ids"]
    ends = bool(ids) and record["finish_reason"] == "stop"
    columns = _columns(record, "token", len(ids))
    found = spanned_tokens(reader, ids, columns, ends=ends, top=top_tokens_of(record))
    if "".join(piece.text for piece in found.pieces) in (text, record["completion"]):
        return found
    return _whole(text, "its tokens, as the student's tokenizer has them, make another text")


def spanned_tokens(
    reader: TokenReader,
    ids: Sequence[int],
    columns: Mapping[str, Sequence[float | None]],
    *,
    ends: bool,
    top: TopTokens | None = None,
) -> SpannedText:
    """The text of tokens. `columns`: one number per token, by metric; `ends`: the last token is the
    end token.
    """
    pieces = reader.split(ids[:-1] if ends else ids)
    found = _used(columns)
    if top is not None:
        found |= _used({"log_ratio": top.log_ratio(ids), "acceptance": top.acceptance()})
    return SpannedText(
        pieces,
        "token",
        {name: _per_piece(column, pieces) for name, column in found.items()},
        end=reader.text(ids[-1]) if ends else "",
        end_values={name: column[-1] for name, column in found.items()} if ends else {},
        top=top,
    )


def _of_bytes(record: Mapping[str, Any], text: str) -> SpannedText:
    pieces = characters(text)
    size = sum(piece.count for piece in pieces)
    columns = _used(_columns(record, "byte", None))
    if any(len(column) < size for column in columns.values()):
        return _whole(text, "its bytes are not those that were drawn")
    return SpannedText(
        pieces, "byte", {name: _per_piece(column, pieces) for name, column in columns.items()}
    )


def _whole(text: str, note: str) -> SpannedText:
    return SpannedText([Piece(text, 0, 0)] if text else [], "none", note=note)


def _columns(
    record: Mapping[str, Any], unit: str, length: int | None
) -> dict[str, Sequence[float | None]]:
    """The lists of a record by metric; those of another length are left out."""
    lists = {name: record.get(f"{unit}_{name}") for name in METRICS}
    return {
        name: column
        for name, column in lists.items()
        if column and (length is None or len(column) == length)
    }


def _used(columns: Mapping[str, Sequence[float | None]]) -> dict[str, Sequence[float | None]]:
    """Those that have a number, without an alpha that is 0 or 1 everywhere, which says nothing."""
    kinds = {name: {*column} - {None} for name, column in columns.items()}
    constant = {name for name, values in kinds.items() if values <= {0.0} or values <= {1.0}}
    return {
        name: column
        for name, column in columns.items()
        if kinds[name] and not (name == "alpha" and name in constant)
    }


def _per_piece(column: Sequence[float | None], pieces: Sequence[Piece]) -> list[float | None]:
    return [_mean(column[piece.start : piece.start + piece.count]) for piece in pieces]


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return math.fsum(known) / len(known) if known else None


def colour_of(name: str, values: Mapping[str, float | None]) -> Colour | None:
    """The background of a piece by a metric; None: none.

    Where the models agree, alpha means nothing and has no colour.
    """
    value, metric = values.get(name), METRICS[name]
    if value is None or (name == "alpha" and _models_agree(values)):
        return None
    share = min(1.0, max(0.0, (value - metric.low) / (metric.high - metric.low)))
    depth = abs(2 * share - 1) if metric.is_diverging else share
    if depth < _PALEST:
        return None
    hue = (_TEACHER if share > 0.5 else _STUDENT) if metric.is_diverging else _AMOUNT
    return (*hue, _DEEPEST * depth)


def _models_agree(values: Mapping[str, float | None]) -> bool:
    kls = [values.get(name) for name in ("kl_student", "kl_teacher")]
    return all(kl is not None and kl < _AGREE for kl in kls)
