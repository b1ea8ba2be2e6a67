"""What `records/export` gets from folders above it: vocabularies, datasets, scores, a display."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from optimal_sampling.config import DataConfig, ModelConfig, expand_user
from optimal_sampling.evaluate.benchmarks import BENCHMARKS, read_rows
from optimal_sampling.evaluate.options import EvaluateConfig
from optimal_sampling.generate.dataset import open_dataset
from optimal_sampling.records.export import Report, Tools
from optimal_sampling.vocabulary import Vocabulary

__all__ = ["print_report", "tools"]


def tools() -> Tools:
    """Those of the command line: progress goes to standard error."""
    return Tools(
        vocabulary=lambda model, trust: Vocabulary.load(model, model, trust),
        rows_of=_rows_of,
        score=_score,
        say=lambda line: print(line, file=sys.stderr, flush=True),
    )


def _rows_of(benchmark: str) -> Iterator[Mapping[str, Any]]:
    """Rows of a benchmark by name, or else of what `--dataset` takes."""
    if benchmark in BENCHMARKS and not expand_user(benchmark).exists():
        _, rows = read_rows(BENCHMARKS[benchmark], EvaluateConfig())
        return iter(rows)
    dataset = open_dataset(DataConfig(dataset=benchmark), seed=0)
    return (row for _, row in dataset)


def _score(
    model: str, trust_remote_code: bool, pairs: Iterable[tuple[list[int], list[int]]]
) -> Iterator[float]:
    from optimal_sampling.engines.scoring import score  # torch is loaded here

    return score(ModelConfig(student=model, trust_remote_code=trust_remote_code), pairs)


def print_report(report: Report, console: Console) -> None:
    """Tables of what there is to know of the data, and the command that trains on it."""
    for title, lines in report.sections:
        table = Table(title=Text(title), show_header=False, title_justify="left")
        table.add_column(style="bold")
        table.add_column(overflow="fold")
        for name, value in lines:
            table.add_row(Text(name), Text(value))
        console.print(table)
    rows = ", ".join(f"{count} {split}" for split, count in sorted(report.rows.items()))
    console.print(Text(f"{report.folder}: {rows} rows; README.md holds all of this"))
    if report.command:
        console.print(Text(f"Train on it:\n  {report.command}"), soft_wrap=True)
