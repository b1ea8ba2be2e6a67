"""What is shown during a run: a live bar on a terminal, a line every few seconds on a pipe."""

from __future__ import annotations

import sys
import time
from datetime import timedelta
from types import TracebackType
from typing import Self, TextIO

from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar

from optimal_sampling.generate.summary import Tally

__all__ = ["LinesProgress", "Progress", "TerminalProgress", "progress_for"]

_SECONDS_BETWEEN_LINES = 5.0


class Progress:
    """Base class, which shows nothing. A context manager: `update` is called within."""

    def update(self, tally: Tally) -> None:
        """Show the counts, which have changed."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        pass


class LinesProgress(Progress):
    """A line at the first count, then every few seconds, and at the end."""

    def __init__(self, stream: TextIO, seconds: float = _SECONDS_BETWEEN_LINES) -> None:
        self._stream = stream
        self._seconds = seconds
        self._due = 0.0

    def update(self, tally: Tally) -> None:
        """Print a line if one is due."""
        if time.monotonic() >= self._due or not tally.owed:
            self._due = time.monotonic() + self._seconds
            line = f"{tally.done}/{tally.asked} done, {status(tally)}"
            print(line, file=self._stream, flush=True)


class TerminalProgress(Progress):
    """A bar that is redrawn in place."""

    def __init__(self, console: Console) -> None:
        self._bar = Bar(
            BarColumn(bar_width=24),
            TextColumn("{task.completed}/{task.total} done"),
            TextColumn("{task.fields[status]}"),
            TimeElapsedColumn(),
            console=console,
        )
        self._task = self._bar.add_task("generate", total=None, status="loading the models")

    def update(self, tally: Tally) -> None:
        """Move the bar."""
        self._bar.update(self._task, completed=tally.done, total=tally.asked, status=status(tally))

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
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
