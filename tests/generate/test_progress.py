"""What is shown while a run goes, and at its end."""

from __future__ import annotations

import io

from rich.console import Console

from optimal_sampling.generate import generate
from optimal_sampling.generate.progress import (
    LinesProgress,
    Tally,
    TerminalProgress,
    progress_for,
)

RECORD = {
    "error": "",
    "n_completion_tokens": 10,
    "finish_reason": "stop",
    "alpha_mean": 0.75,
    "clamped_share": 0.0,
    "kl_student": 0.1,
    "kl_teacher": 0.1,
    "ess_ratio": None,
}


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_plain_lines_on_a_pipe():
    """Guards: control characters in a log file, and a line per record."""
    stream = io.StringIO()
    progress = progress_for(stream)
    assert isinstance(progress, LinesProgress)
    tally = Tally(rows=50, samples_per_prompt=1)
    with progress:
        for _ in range(50):
            tally.add(RECORD)
            progress.update(tally)
    first, last = stream.getvalue().splitlines()
    assert first.startswith("1/50 done, 49 owed, 0 failed, ")
    assert "mean alpha 0.750" in first
    assert first.endswith(" left")
    assert last.startswith("50/50 done, 0 owed")
    assert "\x1b" not in stream.getvalue()


def test_a_bar_on_a_terminal():
    """Guards: a display that needs options of the user."""
    stream = Terminal()
    progress = progress_for(stream)
    assert isinstance(progress, TerminalProgress)
    tally = Tally(rows=2, samples_per_prompt=3, duplicates=1)
    with progress:
        tally.add(RECORD)
        tally.add({"error": "NaN"})
        progress.update(tally)
    assert "1/3 done" in stream.getvalue()
    assert "1 owed, 1 failed" in stream.getvalue()


def test_counts_add_up():
    """Guards: an `owed` that never reaches zero."""
    tally = Tally(rows=10, samples_per_prompt=2, duplicates=1, already_good=3, given_up=2)
    assert (tally.asked, tally.done, tally.owed) == (18, 3, 13)
    assert tally.seconds_left is None


def test_the_summary_names_what_went_wrong(fake_engine, job):
    """Guards: a table that shows a failed run as a good one."""
    summary = generate(job([{"problem": "1+1=?"}, {"problem": None}, {"problem": "1+1=?"}]))
    console = Console(file=io.StringIO(), width=100)
    console.print(summary.table())
    text = console.file.getvalue()
    for expected in (
        "failed: ",
        "1 good of 2 asked",
        "1 x failed",
        "column 'problem' is null",
        "duplicate rows",
    ):
        assert expected in text
    assert "torn" not in text


def test_errors_are_shown_as_they_are(fake_engine, job):
    """Guards: `[/asy]` in an error read as markup, which ends a finished run with a traceback."""
    fake_engine.fails = lambda request: "bad [/asy] [red]text :smile:"
    console = Console(file=io.StringIO(), width=100)
    console.print(generate(job([{"problem": "1+1=?"}])).table())
    assert "bad [/asy] [red]text :smile:" in console.file.getvalue()
