"""Scores of checkpoints on benchmarks as data, and that data as JSON, Markdown and rich tables."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from optimal_sampling.errors import ConfigError, did_you_mean
from optimal_sampling.evaluate.statistics import (
    CheckpointScores,
    Metric,
    no_answer_rate,
    paired_difference,
    score,
    truncated_rate,
)

__all__ = ["Evaluation", "json_text", "markdown_text", "rich_table", "summarize"]

Row = dict[str, Any]
"""What is known of one checkpoint on one benchmark."""


@dataclass(frozen=True, eq=False)
class Evaluation:
    """One checkpoint on one benchmark."""

    checkpoint: str
    benchmark: str
    scores: CheckpointScores
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Stored with the scores: temperature, top-p, system prompt, thinking, hashes, ..."""


@dataclass(frozen=True)
class _Grid:
    """One table: a title, names of columns, and a row of cells per checkpoint."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def summarize(
    evaluations: Sequence[Evaluation],
    metrics: Sequence[Metric],
    baseline: str | None = None,
    level: float = 0.95,
) -> dict[str, Any]:
    """All that the tables show, as plain numbers, strings, lists and dicts.

    `baseline`: checkpoint that the paired differences are against; by default the first one. A
    benchmark without scores of the baseline has no differences, and a note says so.

    Raises ConfigError for an unknown baseline, for a checkpoint that is there twice on a benchmark,
    and for a metric with k above the samples.
    """
    if not evaluations:
        raise ConfigError("there are no scores to show")
    table = {(each.benchmark, each.checkpoint): each for each in evaluations}
    if len(table) < len(evaluations):
        raise ConfigError("a checkpoint is there twice on a benchmark; give each another name")
    baseline = evaluations[0].checkpoint if baseline is None else baseline
    names = list(dict.fromkeys(each.checkpoint for each in evaluations))
    if baseline not in names:
        raise ConfigError(
            f"the baseline {baseline!r} has no scores{did_you_mean(baseline, names)}; "
            f"scored: {', '.join(names)}"
        )
    rows, notes = [], []
    for each in evaluations:
        base = table.get((each.benchmark, baseline))
        rows.append(_row(each, base, metrics, level))
        notes += _notes(each, base, baseline)
    return {
        "baseline": baseline,
        "level": level,
        "metrics": [str(metric) for metric in metrics],
        "rows": rows,
        "notes": list(dict.fromkeys(notes)),
    }


def json_text(summary: Mapping[str, Any]) -> str:
    """The summary as indented JSON, with a newline at its end."""
    return json.dumps(summary, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def markdown_text(summary: Mapping[str, Any]) -> str:
    """The summary as Markdown: by benchmark scores, differences, completions."""
    blocks = [_markdown_grid(grid) for grid in _grids(summary)]
    notes = "\n".join(f"- {_escaped(line)}" for line in _footnotes(summary))
    return "\n".join([*blocks, notes]) + "\n"


def rich_table(summary: Mapping[str, Any]) -> RenderableType:
    """The summary for a terminal."""
    notes = [Text(line) for line in _footnotes(summary)]
    return Group(*map(_rich_grid, _grids(summary)), *notes)


def _row(each: Evaluation, base: Evaluation | None, metrics: Sequence[Metric], level: float) -> Row:
    scores = each.scores
    row = {
        "checkpoint": each.checkpoint,
        "benchmark": each.benchmark,
        "questions": len(scores.questions),
        "samples": scores.samples,
        "skipped": len(scores.skipped),
        "scores": {str(metric): asdict(score(scores, metric, level)) for metric in metrics},
        "truncated": asdict(truncated_rate(scores, level)),
        "no_answer": asdict(no_answer_rate(scores, level)),
        "mean_tokens": float(scores.tokens.mean()),
        "hedging": float(scores.hedging.mean()),
        "settings": dict(each.settings),
        "differences": {},
    }
    if base is not None and base is not each:
        row["differences"] = {
            str(metric): asdict(paired_difference(scores, base.scores, metric, level))
            for metric in metrics
        }
    return row


def _notes(each: Evaluation, base: Evaluation | None, baseline: str) -> list[str]:
    """What makes a comparison with the baseline impossible or unequal, and questions left out."""
    notes = []
    if count := len(each.scores.skipped):
        notes.append(f"{each.benchmark}: {count} questions without a usable reference are left out")
    if base is None:
        notes.append(f"{each.benchmark}: no scores of {baseline}, so no differences from it")
        return notes
    names = sorted(each.settings.keys() | base.settings.keys())
    unequal = [name for name in names if each.settings.get(name) != base.settings.get(name)]
    if unequal:
        notes.append(
            f"{each.benchmark}: {each.checkpoint} and {baseline} were run with different settings: "
            f"{', '.join(unequal)}"
        )
    return notes


def _grids(summary: Mapping[str, Any]) -> list[_Grid]:
    """The tables of a summary, benchmark by benchmark."""
    grids = []
    for name in dict.fromkeys(row["benchmark"] for row in summary["rows"]):
        rows = [row for row in summary["rows"] if row["benchmark"] == name]
        grids.append(_score_grid(name, rows, summary["metrics"]))
        compared = [row for row in rows if row["differences"]]
        if compared:
            grids.append(_difference_grid(name, compared, summary))
        grids.append(_completion_grid(name, rows))
    return grids


def _score_grid(benchmark: str, rows: Sequence[Row], metrics: Sequence[str]) -> _Grid:
    counts = sorted({(row["questions"], row["samples"]) for row in rows})
    sizes = " or ".join(
        f"{questions} questions x {samples} samples" for questions, samples in counts
    )
    return _Grid(
        title=f"{benchmark}: {sizes}",
        columns=("checkpoint", *metrics),
        rows=tuple(_score_cells(row, metrics) for row in rows),
    )


def _score_cells(row: Row, metrics: Sequence[str]) -> tuple[str, ...]:
    return row["checkpoint"], *(_percent(row["scores"][metric]) for metric in metrics)


def _completion_grid(benchmark: str, rows: Sequence[Row]) -> _Grid:
    return _Grid(
        title=f"{benchmark}: the completions",
        columns=("checkpoint", "truncated", "no answer", "mean tokens", "hedging words"),
        rows=tuple(_completion_cells(row) for row in rows),
    )


def _completion_cells(row: Row) -> tuple[str, ...]:
    return (
        row["checkpoint"],
        f"{100 * row['truncated']['value']:.1f}%",
        f"{100 * row['no_answer']['value']:.1f}%",
        f"{row['mean_tokens']:.0f}",
        f"{100 * row['hedging']:.2f}%",
    )


def _difference_grid(benchmark: str, rows: Sequence[Row], summary: Mapping[str, Any]) -> _Grid:
    metrics = summary["metrics"]
    cells = [[_points(row["differences"][metric]) for metric in metrics] for row in rows]
    return _Grid(
        title=f"{benchmark}: minus {summary['baseline']}, in points, paired by question",
        columns=("checkpoint", *metrics),
        rows=tuple((row["checkpoint"], *line) for row, line in zip(rows, cells, strict=True)),
    )


def _percent(estimate: Mapping[str, float]) -> str:
    value, low, high = (100 * estimate[name] for name in ("value", "low", "high"))
    return f"{value:.1f}% [{low:.1f}, {high:.1f}]"


def _points(estimate: Mapping[str, float]) -> str:
    value, low, high = (100 * estimate[name] for name in ("value", "low", "high"))
    return f"{value:+.1f} [{low:+.1f}, {high:+.1f}]"


def _footnotes(summary: Mapping[str, Any]) -> list[str]:
    level = f"{100 * summary['level']:g}%"
    lines = [
        f"Brackets: {level} intervals, clustered by question, over a population of such questions.",
        "Truncated samples and samples without an answer count as wrong.",
    ]
    checkpoints = {row["checkpoint"] for row in summary["rows"]} - {summary["baseline"]}
    if len(checkpoints) > 1:
        lines.append(
            f"Each interval is for one comparison: the best of {len(checkpoints)} checkpoints "
            "looks better than it is."
        )
    return [*lines, *summary["notes"]]


def _markdown_grid(grid: _Grid) -> str:
    rule = ["---", *["---:"] * (len(grid.columns) - 1)]
    lines = [_markdown_line(cells) for cells in (grid.columns, rule, *grid.rows)]
    return "\n".join([f"### {_escaped(grid.title)}", "", *lines, ""])


def _markdown_line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(map(_escaped, cells))} |"


def _escaped(text: str) -> str:
    """One line of text that Markdown neither splits into cells nor formats."""
    for character in "\\|*_`<":
        text = text.replace(character, f"\\{character}")
    return " ".join(text.split())


def _rich_grid(grid: _Grid) -> Table:
    table = Table(title=Text(grid.title), title_justify="left")
    for place, name in enumerate(grid.columns):
        table.add_column(Text(name), justify="right" if place else "left", overflow="fold")
    for cells in grid.rows:
        table.add_row(*map(Text, cells))
    return table
