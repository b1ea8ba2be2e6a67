"""Counts of a grading, shown while it goes: a bar on a terminal, lines on a pipe."""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Self, TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from optimal_sampling.records.store import Line
from optimal_sampling.records.verdicts import VERDICTS, Graded

__all__ = ["GradeProgress", "GradeTally", "progress_for", "verdict_text"]

_SECONDS_BETWEEN_LINES = 5.0
_FAILURES_SHOWN = 5


def verdict_text(counts: Mapping[str, int]) -> str:
    """`812 correct (81.2%), 150 wrong, ...`: the share is that of all but the skipped."""
    graded = sum(counts.values()) - counts.get("skipped", 0)
    parts = [f"{counts[verdict]} {verdict}" for verdict in VERDICTS if counts.get(verdict)]
    if counts.get("correct"):
        parts[0] += f" ({counts['correct'] / graded:.1%})"
    return ", ".join(parts) or "none"


@dataclass
class GradeTally:
    """Counts of one call."""

    total: int
    """Records, those of failed attempts included."""
    read: int = 0
    """Good records read so far."""
    counts: Counter[str] = field(default_factory=Counter)
    """New verdicts."""
    failures: Counter[str] = field(default_factory=Counter)
    """Why graders failed."""
    started: float = field(default_factory=time.monotonic)

    def counted(self, lines: Iterable[Line]) -> Iterator[Line]:
        """The same lines, counted as they are read."""
        for line in lines:
            self.read += 1
            yield line

    def add(self, graded: Graded) -> None:
        """Count a new verdict."""
        self.counts[graded["verdict"]] += 1
        if graded["failed"]:
            self.failures[str(graded["detail"])] += 1

    @property
    def new(self) -> int:
        """Verdicts of this call."""
        return self.counts.total()

    def lines(self) -> Iterator[str]:
        """What the call has done, one thing a line."""
        kept = self.read - self.new
        yield f"{self.new} new verdicts: {verdict_text(self.counts)}"
        if kept:
            yield f"{kept} records had their verdict already"
        for failure, count in self.failures.most_common(_FAILURES_SHOWN):
            yield f"{count} x not graded: {failure}"
        if self.failures:
            yield "to grade these again: --regrade failed, perhaps with a longer --timeout"

    def status(self, pending: int) -> str:
        """The counts in a line."""
        seconds = max(time.monotonic() - self.started, 1e-9)
        left = max(0, self.total - self.read + pending) * seconds / max(1, self.read - pending)
        parts = [verdict_text(self.counts), f"{self.new / seconds:.0f}/s"]
        if self.failures:
            parts.insert(1, f"the grader failed on {self.failures.total()}")
        if left >= 1:
            parts.append(f"{timedelta(seconds=round(left))} left")
        return ", ".join(parts)


class GradeProgress:
    """Base class, which shows nothing. A context manager: `update` is called within."""

    def update(self, tally: GradeTally, pending: int, *, is_last: bool = False) -> None:
        """Show the counts. `pending` completions were read and are not graded yet."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        pass


class _Lines(GradeProgress):
    """A line every few seconds, and at the end."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._due = 0.0

    def update(self, tally: GradeTally, pending: int, *, is_last: bool = False) -> None:
        if is_last or time.monotonic() >= self._due:
            self._due = time.monotonic() + _SECONDS_BETWEEN_LINES
            done = f"{tally.read - pending}/{tally.total} records"
            print(f"{done}, {tally.status(pending)}", file=self._stream, flush=True)


class _Terminal(GradeProgress):
    """A bar that is redrawn in place."""

    def __init__(self, console: Console) -> None:
        self._bar = Progress(
            BarColumn(bar_width=24),
            TextColumn("{task.completed}/{task.total} records"),
            TextColumn("{task.fields[status]}"),
            TimeElapsedColumn(),
            console=console,
        )
        self._task = self._bar.add_task("verify", total=None, status="reading the records")

    def update(self, tally: GradeTally, pending: int, *, is_last: bool = False) -> None:
        self._bar.update(
            self._task,
            completed=tally.read - pending,
            total=tally.read if is_last else tally.total,
            status=tally.status(pending),
        )

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.stop()


def progress_for(stream: TextIO | None = None) -> GradeProgress:
    """The display that fits a stream; None: standard error."""
    stream = stream or sys.stderr
    return _Terminal(Console(file=stream)) if stream.isatty() else _Lines(stream)
