"""Counts of a run: shown while it goes, and in the summary at its end.

On a terminal a live bar, on a pipe a line every few seconds.
"""

from __future__ import annotations

import json
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from itertools import chain
from pathlib import Path
from typing import Any, Self, TextIO

from rich.console import Console, RenderableType
from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar
from rich.table import Table
from rich.text import Text

from optimal_sampling.config import GenerateConfig, expand_user
from optimal_sampling.generate.stage_counts import StageCounts, stage_lines
from optimal_sampling.generate.workers import NO_WORKERS, status_lines, worker_table, worker_text
from optimal_sampling.records.run_folder import RunFolder, Totals
from optimal_sampling.records.schema import Record
from optimal_sampling.records.store import read_json, write_atomically
from optimal_sampling.records.verdicts import Graded, graded_records
from optimal_sampling.types import WorkerStatus
from optimal_sampling.verify.progress import verdict_text

__all__ = [
    "MEANS_SHOWN",
    "LinesProgress",
    "Progress",
    "Summary",
    "Tally",
    "TerminalProgress",
    "folder_status",
    "progress_for",
]

_SECONDS_BETWEEN_LINES = 5.0
_ERRORS_SHOWN = 5

MEANS_SHOWN = {
    "alpha_mean": "alpha mean",
    "alpha_weighted": "alpha where the models differ",
    "clamped_share": "clamped share",
    "kl_student": "KL(q, student), nats/token",
    "kl_teacher": "KL(q, teacher), nats/token",
    "ess_ratio": "ESS ratio (teacher / student)",
    "lost_student": "student's share given up, per completion",
    "lost_teacher": "teacher's share given up, per completion",
}
"""Means over all tokens that the table shows, and their titles."""


@dataclass
class Tally:
    """Counts of one call of `generate`. A sample is one completion of one prompt."""

    rows: int
    samples_per_prompt: int
    title: str = ""
    """Of the stage and the try, where there are stages."""
    duplicates: int = 0
    """Rows whose two prompts are those of an earlier row."""
    already_good: int = 0
    """Good samples of before this call."""
    given_up: int = 0
    """Samples that had failed `max_attempts` times before this call."""
    failed: int = 0
    errors: Counter[str] = field(default_factory=Counter)
    made: Totals = field(default_factory=Totals)
    """Good records of this call."""
    started: float = field(default_factory=time.monotonic)

    def add(self, record: Record) -> None:
        """Count a record of this call."""
        if record["error"]:
            self.failed += 1
            self.errors[record["error"]] += 1
        else:
            self.made.add(record)

    def restart_clock(self) -> None:
        """Measure speed from now on; called when the engine is ready."""
        self.started = time.monotonic()

    @property
    def asked(self) -> int:
        """Samples asked for, less the duplicates found so far."""
        return (self.rows - self.duplicates) * self.samples_per_prompt

    @property
    def done(self) -> int:
        """Good samples, of this call and before."""
        return self.already_good + self.made.records

    @property
    def owed(self) -> int:
        """Samples that this call still has to try."""
        return self.asked - self.done - self.failed - self.given_up

    @property
    def seconds(self) -> float:
        """Time since the engine was ready."""
        return time.monotonic() - self.started

    @property
    def tokens_per_second(self) -> float:
        """Speed of this call."""
        return self.made.tokens / max(self.seconds, 1e-9)

    @property
    def seconds_left(self) -> float | None:
        """None before the first sample of this call."""
        tried = self.made.records + self.failed
        return self.owed * self.seconds / tried if tried else None


@dataclass(frozen=True)
class Summary:
    """Counts of one call of `generate`, and means over all good records of the folder."""

    mode: str
    """What tokens were drawn from: `mixture`, `student` or `teacher`."""
    status: str
    """`complete`, `failed` (some samples did) or `interrupted`."""
    run_folder: str
    records_file: str
    asked: int
    good: int
    already_good: int
    generated: int
    failed: int
    given_up: int
    owed: int
    duplicate_rows: int
    torn_lines: int
    bad_lines: int
    seconds: float
    tokens: int
    tokens_per_second: float
    folder_records: int
    folder_tokens: int
    means: Mapping[str, float | None]
    finish_reasons: Mapping[str, int]
    errors: Mapping[str, int]
    notes: Mapping[str, str]
    verdicts: Mapping[str, int] = field(default_factory=dict)
    """How many completions of the shard have each verdict."""
    not_graded: int = 0
    """Completions of the shard on which the grader failed."""
    stages: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """What the folder holds of each stage, by `StageCounts.stages`, and the `seconds` that it took
    in this call."""
    prompts: int = 0
    """Prompts that the stages have tried."""
    solved: int = 0
    """Those with a correct completion."""

    @classmethod
    def of(
        cls,
        tally: Tally,
        folder: RunFolder,
        notes: Mapping[str, str],
        *,
        mode: str = "mixture",
        interrupted: bool,
    ) -> Summary:
        """The state of a call now."""
        totals = folder.ledger.totals
        missing = tally.failed + tally.given_up
        return cls(
            mode=mode,
            status="interrupted" if interrupted else "failed" if missing else "complete",
            run_folder=str(folder.path),
            records_file=str(folder.file.path),
            asked=tally.asked,
            good=tally.done,
            already_good=tally.already_good,
            generated=tally.made.records,
            failed=missing,
            given_up=tally.given_up,
            owed=tally.owed,
            duplicate_rows=tally.duplicates,
            torn_lines=folder.torn_lines,
            bad_lines=folder.bad_lines,
            seconds=round(tally.seconds, 3),
            tokens=tally.made.tokens,
            tokens_per_second=round(tally.tokens_per_second, 1),
            folder_records=totals.records,
            folder_tokens=totals.tokens,
            means=totals.means(),
            finish_reasons=dict(totals.finish_reasons),
            errors=dict(tally.errors.most_common()),
            notes=dict(notes),
        )

    def save(self, shard: str) -> Path:
        """Write `summary.json`, or `summary-<shard>.json` of a data slice, into the run folder."""
        name = "summary.json" if shard == "main" else f"summary-{shard}.json"
        path = Path(self.run_folder) / name
        write_atomically(path, json.dumps(asdict(self), indent=2) + "\n")
        return path

    def table(self) -> Table:
        """A table for the terminal. Counts of zero, such as torn lines, are left out."""
        return _table(f"{self.status}: {self.run_folder}", self._lines())

    def _lines(self) -> Iterator[tuple[str, str]]:
        """Name and value of each line of the table."""
        optional = {
            "failed": self.failed,
            "of these not tried again (--max-attempts)": self.given_up,
            "still owed": self.owed,
            "duplicate rows, generated once": self.duplicate_rows,
            "torn lines cut": self.torn_lines,
            "bad lines found (owed again)": self.bad_lines,
        }
        if self.mode != "mixture":
            yield "drawn from", f"the {self.mode} alone"
        yield from stage_lines(self.stages, self.prompts, self.solved)
        yield "samples", f"{self.good} good of {self.asked} asked ({self.generated} new)"
        yield from ((name, str(count)) for name, count in optional.items() if count)
        if self.tokens:
            made = f"{self.tokens} tokens in {self.seconds:.1f} s"
            yield "speed", f"{self.tokens_per_second:.1f} tokens/s ({made})"
        yield from _mean_lines(self.means, self.finish_reasons)
        if self.verdicts:
            yield "verdicts", verdict_text(self.verdicts)
        if self.not_graded:
            yield "the grader failed on", f"{self.not_graded} (verify --regrade failed)"
        yield from _error_lines(self.errors)
        yield from self.notes.items()
        yield "records", self.records_file


def _table(title: str, lines: Iterable[tuple[str, str]]) -> Table:
    table = Table(title=Text(title), show_header=False, title_justify="left")
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in lines:
        # Text: an error may quote [/brackets] that look like markup
        table.add_row(Text(name), Text(value))
    return table


def _error_lines(errors: Mapping[str, int]) -> Iterator[tuple[str, str]]:
    """The most frequent reasons of failed samples, and how many more there are."""
    for error, count in Counter(errors).most_common(_ERRORS_SHOWN):
        yield f"{count} x failed", error
    more = len(errors) - _ERRORS_SHOWN
    if more > 0:
        yield "", f"and {more} more reason{'s' if more > 1 else ''}"


def _mean_lines(
    means: Mapping[str, float | None], finish_reasons: Mapping[str, int]
) -> Iterator[tuple[str, str]]:
    for name, title in MEANS_SHOWN.items():
        mean = means[name]
        if mean is not None:
            yield title, f"{mean:.4f}"
    vetoed = means["vetoed"]
    if vetoed:
        yield "vetoed share of the student's mass", f"{vetoed:.4f}"
    bound, largest = means.get("tv_bound"), means.get("tv_bound_max")
    if bound is not None and largest is not None:
        yield "distance to the exact q at most", f"{bound:.4f} on average, {largest:.4f} at worst"
    covered = means.get("covered_student"), means.get("covered_teacher")
    if covered[0] is not None and covered[1] is not None:
        yield "mass in the lists", f"student {covered[0]:.4f}, teacher {covered[1]:.4f}"
    reasons = (f"{name} {count}" for name, count in sorted(finish_reasons.items()))
    yield "finish reasons", ", ".join(reasons)


def folder_status(run: str | Path) -> Table:
    """A table of a run folder as it is on the disk, also while another process writes it.

    What was asked for is known from the summaries of calls that ended. Raises RunFolderError.
    """
    folder = expand_user(run)
    totals, failed, verdicts = Totals(), Counter[str](), _Verdicts()
    stages = StageCounts()
    for record, graded in graded_records(folder, failed=True):
        if record["error"]:
            failed[record["error"]] += 1
            continue
        totals.add(record)
        verdicts.add(graded)
        stages.add(record, graded)
    compared: Any = read_json(folder / "config.json").get("compared", {})
    calls = [read_json(path) for path in sorted(folder.glob("summary*.json"))]
    names = [stage["name"] for stage in compared.get("stages", [])]
    source = f"stages {', '.join(names)}" if names else f"the {compared.get('mode', 'mixture')}"
    title = f"{folder}: drawn from {source}"
    lines = chain(
        _status_lines(totals, failed, calls),
        stage_lines(stages.numbers(names), len(stages.prompts), len(stages.solved)),
        status_lines(folder),
        verdicts.lines(),
    )
    return _table(title, lines)


@dataclass
class _Verdicts:
    """Verdicts on the good records of a folder."""

    counts: Counter[str] = field(default_factory=Counter)
    graders: Counter[str] = field(default_factory=Counter)
    failures: Counter[str] = field(default_factory=Counter)
    missing: int = 0

    def add(self, graded: Graded | None) -> None:
        """Count the verdict on a good record; None: it has none."""
        if graded is None:
            self.missing += 1
            return
        self.counts[graded["verdict"]] += 1
        self.graders[graded["grader"]] += 1
        if graded["failed"]:
            self.failures[str(graded["detail"])] += 1

    def lines(self) -> Iterator[tuple[str, str]]:
        """Name and value of each line of a table; none where nothing was graded."""
        if not self.counts:
            return
        missing = f", {self.missing} not graded" if self.missing else ""
        yield "verdicts", f"{verdict_text(self.counts)}{missing} ({', '.join(self.graders)})"
        for failure, count in self.failures.most_common(_ERRORS_SHOWN):
            yield f"{count} x not graded", failure


def _status_lines(
    totals: Totals, failed: Counter[str], calls: Sequence[Mapping[str, Any]]
) -> Iterator[tuple[str, str]]:
    asked = sum(call["asked"] for call in calls)
    owed = max(0, asked - totals.records)
    yield "samples", f"{totals.records} good, {failed.total()} failed, {totals.tokens} tokens"
    yield "owed", f"{owed} of {asked} asked" if calls else "not known before a call has ended"
    yield from _error_lines(failed)
    for call in calls:
        if not call.get("tokens"):  # a merge, or a call that had nothing to do
            continue
        made = f"{call['tokens']} tokens in {call['seconds']} s, {call['status']}"
        yield Path(call["records_file"]).stem, f"{call['tokens_per_second']} tokens/s ({made})"
    yield from _mean_lines(totals.means(), totals.finish_reasons)


class Progress:
    """Base class, which shows nothing. A context manager: `update` is called within."""

    workers: Callable[[], Sequence[WorkerStatus]] = NO_WORKERS
    """Rows of the workers, where there are any."""

    def update(self, tally: Tally) -> None:
        """Show the counts, which have changed."""

    def start_loading(self, config: GenerateConfig) -> None:
        """Say that models are being loaded, until the first `update`."""
        roles = ("student", "teacher") if config.run.mode == "mixture" else (config.run.mode,)
        names = [f"{role} {getattr(config.models, role)}" for role in roles]
        self.show(f"loading {', '.join(names)}" if config.engine.loads_models else "starting")

    def show_notes(self, notes: Mapping[str, str]) -> None:
        """Show notes, one a line."""
        for name, text in notes.items():
            self.show(f"{name}: {text}")

    def show(self, line: str) -> None:
        """Show a line that stays."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        pass


class LinesProgress(Progress):
    """A line at the first count, then every few seconds, and at the end."""

    def __init__(self, stream: TextIO, seconds: float = _SECONDS_BETWEEN_LINES) -> None:
        self._stream = stream
        self._seconds = seconds
        self._due = 0.0

    def show(self, line: str) -> None:
        """Print a line."""
        print(line, file=self._stream, flush=True)

    def update(self, tally: Tally) -> None:
        """Print a line if one is due."""
        if time.monotonic() >= self._due or not tally.owed:
            self._due = time.monotonic() + self._seconds
            prefix = f"{tally.title}: " if tally.title else ""
            self.show(f"{prefix}{tally.done}/{tally.asked} done, {status(tally)}")
            for row in self.workers():
                self.show(f"  {row.name}: {worker_text(row)}")


class _BarAndWorkers(Bar):
    """A bar, and below it the rows of the workers."""

    workers: Sequence[WorkerStatus] = ()

    def get_renderables(self) -> Iterator[RenderableType]:
        """What is redrawn."""
        yield self.make_tasks_table(self.tasks)
        if self.workers:
            yield worker_table(self.workers)


class TerminalProgress(Progress):
    """A bar that is redrawn in place, with a row per worker."""

    def __init__(self, console: Console) -> None:
        self._bar = _BarAndWorkers(
            BarColumn(bar_width=24),
            TextColumn("{task.completed}/{task.total} done"),
            TextColumn("{task.fields[status]}"),
            TimeElapsedColumn(),
            console=console,
        )
        self._task = self._bar.add_task("generate", total=None, status="reading the dataset")

    def start_loading(self, config: GenerateConfig) -> None:
        """As in Progress, beside the bar too."""
        super().start_loading(config)
        self._bar.update(self._task, status="loading the models")

    def show(self, line: str) -> None:
        """Print a line above the bar."""
        self._bar.console.print(Text(line), soft_wrap=True)

    def update(self, tally: Tally) -> None:
        """Move the bar."""
        self._bar.workers = self.workers()
        text = f"{tally.title}, {status(tally)}" if tally.title else status(tally)
        self._bar.update(self._task, completed=tally.done, total=tally.asked, status=text)

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.stop()


def progress_for(stream: TextIO | None = None) -> Progress:
    """The display that fits a stream; None: standard error."""
    stream = stream or sys.stderr
    return TerminalProgress(Console(file=stream)) if stream.isatty() else LinesProgress(stream)


def status(tally: Tally) -> str:
    """The counts of a run in a line."""
    alpha, left = tally.made.mean("alpha_mean"), tally.seconds_left
    parts = [
        f"{tally.owed} owed",
        f"{tally.failed + tally.given_up} failed",
        f"{tally.tokens_per_second:.0f} tokens/s",
    ]
    if alpha is not None:
        parts.append(f"mean alpha {alpha:.3f}")
    if left:
        parts.append(f"{timedelta(seconds=round(left))} left")
    return ", ".join(parts)
