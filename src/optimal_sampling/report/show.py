"""One sample in a terminal: its text coloured, and the tokens at which the models differ most."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.style import Style
from rich.table import Table
from rich.text import Text

from optimal_sampling.config import expand_user
from optimal_sampling.errors import ConfigError, did_you_mean
from optimal_sampling.records.schema import Record
from optimal_sampling.records.verdicts import Graded
from optimal_sampling.report.folders import open_folders
from optimal_sampling.report.options import ShowOptions
from optimal_sampling.spans import (
    METRICS,
    SpannedText,
    TokenReader,
    rich_text,
    run_reader,
    scale_text,
    spanned_text,
    visible,
)

__all__ = ["show"]

_LONGEST_PROMPT = 600  # characters of a prompt that are shown
_LEAST_SHARE = 0.5  # percent; less would be shown as 0
_COLUMNS = {"alpha": "α", "kl_student": "KL student", "kl_teacher": "KL teacher"}
_ROLES = {"student": "student, %", "mixture": "q*, %", "teacher": "teacher, %"}


def show(options: ShowOptions) -> RenderableType:
    """The sample. Raises ConfigError, RunFolderError."""
    if not 1 <= len(options.target) <= 2:
        raise ConfigError("name a run folder, and a sample of it: optimal-sampling show RUN [ID]")
    folder, *wanted = options.target
    if (expand_user(folder) / "results.json").is_file():
        raise ConfigError(
            f"{folder} holds scores of `evaluate`; its run folders are in {Path(folder) / 'runs'}"
        )
    [run], _ = open_folders([folder])
    record, graded = _found(run.records(), wanted[0] if wanted else None, folder)
    reader, problem = run_reader(run.options)
    text = spanned_text(record, reader, problem)
    name = options.colour_by if options.colour_by in text.columns else _first(text, options)
    return Group(*_parts(record, graded, text, reader, name, options))


def _found(
    records: Iterator[tuple[Record, Graded | None]], wanted: str | None, folder: str
) -> tuple[Record, Graded | None]:
    """The first sample that is meant. Raises ConfigError."""
    ids: list[str] = []
    for record, graded in records:
        if wanted is None or _is_meant(record, wanted):
            return record, graded
        ids.append(record["id"])
    if not ids:
        raise ConfigError(f"{folder} has no records yet")
    near = did_you_mean(str(wanted), ids)
    raise ConfigError(
        f"{folder} has no sample {wanted!r}{near}; give the start of an id, or a row's number, "
        f"with :1 behind it for the second sample. One of its ids is {ids[0]}"
    )


def _is_meant(record: Record, wanted: str) -> bool:
    name, colon, sample = wanted.partition(":")
    if colon and str(record["sample_index"]) != sample:
        return False
    is_row = name.isdigit() and len(name) < 9 and int(name) == record["row_index"]
    is_id = len(name) >= 4 and record["id"].startswith(name)
    return is_row or (is_id and not (name.isdigit() and len(name) < 9))


def _first(text: SpannedText, options: ShowOptions) -> str:
    """What the colours show where the run does not have what was asked for.

    Raises ConfigError where another than the default was asked for.
    """
    if options.colour_by != ShowOptions().colour_by and text.unit != "none":
        there = ", ".join(text.columns) or "nothing"
        raise ConfigError(f"this sample has no {options.colour_by} per token; it has: {there}")
    return next(iter(text.columns), "alpha")


def _parts(
    record: Record,
    graded: Graded | None,
    text: SpannedText,
    reader: TokenReader | None,
    name: str,
    options: ShowOptions,
) -> Iterator[RenderableType]:
    yield _about(record, graded)
    for role in ("student", "teacher"):
        prompt = str(record[f"{role}_prompt"])  # type: ignore[literal-required]
        if role == "student" or prompt != record["student_prompt"]:
            yield Text(f"\n{role}'s prompt", Style(dim=True))
            yield Text(_cut(prompt))
    yield Text(f"\ncompletion{_colour_text(text, name)}", Style(dim=True))
    if record["error"]:
        yield Text(f"failed: {visible(record['error'])}", Style(color="red"))
    yield rich_text(text, name) + Text(text.end and f" {visible(text.end)}", Style(dim=True))
    if text.note:
        yield Text(f"not coloured: {text.note}", Style(dim=True))
    elif text.columns:
        yield scale_text(name)
        if options.tokens:
            yield Text()
            yield _table(text, reader, options)


def _about(record: Record, graded: Graded | None) -> Text:
    parts = [f"row {record['row_index']}, sample {record['sample_index']}, id {record['id']}"]
    parts += [f"stage {record['stage']}"] if "stage" in record else []
    parts += [f"{record['n_completion_tokens']} tokens, {record['finish_reason']}"]
    if graded is not None:
        answers = f"answer {graded['answer']}, reference {graded['reference']}"
        parts.append(f"{graded['verdict']} ({visible(answers)})")
    return Text("\n".join(parts), Style(bold=True))


def _cut(prompt: str) -> str:
    more = len(prompt) - _LONGEST_PROMPT
    cut = visible(prompt[:_LONGEST_PROMPT])
    return f"{cut} … ({more} more characters)" if more > 0 else cut


def _colour_text(text: SpannedText, name: str) -> str:
    return f", coloured by {METRICS[name].meaning}" if text.columns else ""


def _table(text: SpannedText, reader: TokenReader | None, options: ShowOptions) -> Table:
    """The tokens at which the models differ most, in the order of the text."""
    shown = (*_COLUMNS, options.colour_by)
    names = [name for name in METRICS if name in text.columns and name in shown]
    tops = [name for name in _ROLES if text.top is not None and name in text.top.distributions]
    table = Table(title=_title(text, options), title_justify="left", title_style="dim")
    table.box = SIMPLE_HEAD
    for column in (text.unit, "text", *(_COLUMNS.get(name, name) for name in names)):
        table.add_column(column, justify="left" if column == "text" else "right")
    for name in tops:
        table.add_column(_ROLES[name], overflow="fold")
    for place in _places(text, options.tokens):
        piece = text.pieces[place]
        values = [text.columns[name][place] for name in names]
        cells = [str(piece.start), repr(visible(piece.text))[1:-1], *map(_number, values)]
        told = [_likeliest(text, reader, name, piece.start, options.top) for name in tops]
        table.add_row(*map(Text, [*cells, *told]))
    return table


def _title(text: SpannedText, options: ShowOptions) -> str:
    if len(text.pieces) <= options.tokens:
        return f"its {text.unit}s"
    return (
        f"the {options.tokens} of {len(text.pieces)} {text.unit}s at which the models differ most"
    )


def _places(text: SpannedText, most: int) -> Sequence[int]:
    """Pieces with the largest KL of q to student and teacher together."""
    columns = [text.columns[name] for name in ("kl_student", "kl_teacher") if name in text.columns]
    sums = [sum(column[place] or 0 for column in columns) for place in range(len(text.pieces))]
    order = sorted(range(len(sums)), key=lambda place: -sums[place])
    return sorted(islice(order, most))


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _likeliest(
    text: SpannedText, reader: TokenReader | None, name: str, token: int, most: int
) -> str:
    """The likeliest tokens of a distribution and their probabilities in percent."""
    if text.top is None or reader is None:
        return ""
    ids, log_p = text.top.of(name)
    pairs = zip(ids[token, :most], log_p[token, :most], strict=True)
    told = [(repr(reader.text(int(i)))[1:-1], 100 * math.exp(p)) for i, p in pairs]
    kept = [(each, share) for each, share in told if share >= _LEAST_SHARE]
    return "  ".join(f"{visible(each)}\u00a0{share:.0f}" for each, share in kept)
