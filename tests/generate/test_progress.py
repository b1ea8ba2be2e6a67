"""What is shown while a run goes, and at its end."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from optimal_sampling.config import ModelConfig
from optimal_sampling.generate import folder_status, generate
from optimal_sampling.generate.progress import (
    LinesProgress,
    Tally,
    TerminalProgress,
    progress_for,
)
from optimal_sampling.records import merge
from optimal_sampling.records.run_folder import Totals

RECORD = {
    "error": "",
    "n_completion_tokens": 10,
    "finish_reason": "stop",
    "alpha_mean": 0.75,
    "clamped_share": 0.0,
    "kl_student": 0.1,
    "kl_teacher": 0.1,
    "ess_ratio": None,
    "ess_student": 0.5,
    "ess_teacher": 0.25,
    "curvature": 0.1,
    "alpha_weighted": 0.75,
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


def test_the_ess_ratio_is_that_of_the_means():
    """Guards: a mean of per-token ratios, which one token with a tiny ESS to the student makes
    431."""
    totals = Totals()
    totals.add(RECORD | {"ess_student": 1e-3, "ess_teacher": 0.5, "ess_ratio": 4000.0})
    totals.add(RECORD | {"ess_student": 0.5, "ess_teacher": 0.5, "ess_ratio": 1.0})
    assert totals.means()["ess_ratio"] == pytest.approx(1.0 / 0.501)
    assert Totals().means()["ess_ratio"] is None


def test_tokens_where_the_models_agree_do_not_count():
    """Guards: a mean alpha that is noise: a record whose models agree has any alpha."""
    totals = Totals()
    totals.add(RECORD | {"alpha_mean": 0.6, "alpha_weighted": 0.6, "curvature": 2.0})
    totals.add(RECORD | {"alpha_mean": 1.0, "alpha_weighted": 1.0, "curvature": 1e-9})
    totals.add(RECORD | {"alpha_mean": 1.0, "alpha_weighted": None, "curvature": 0.0})
    means = totals.means()
    assert means["alpha_weighted"] == pytest.approx(0.6)
    assert means["alpha_mean"] == pytest.approx(2.6 / 3)


def test_records_of_older_versions_are_counted():
    """Guards: a folder of an older version that cannot be resumed for want of its new fields."""
    totals = Totals()
    new = ("ess_student", "ess_teacher", "curvature", "alpha_weighted", "chernoff", "log_p_student")
    new += ("kl_student_restricted", "kl_teacher_restricted", "log_p_student_restricted", "vetoed")
    new += ("lost_student", "lost_teacher", "covered_student", "covered_teacher", "tv_bound")
    totals.add({name: value for name, value in RECORD.items() if name not in new})
    assert totals.means() == {
        "alpha_mean": 0.75,
        "clamped_share": 0.0,
        "kl_student": 0.1,
        "kl_teacher": 0.1,
        **dict.fromkeys((*new, "ess_ratio")),
    }


def test_notes_come_before_the_run_and_loading_is_said(fake_engine, job):
    """Guards: a chat template that is missing, told after an hour; a silent minute of loading."""
    stream = io.StringIO()
    config = replace(job([{"problem": "1+1=?"}]), models=ModelConfig(student="toy-teacher"))
    config = replace(config, run=replace(config.run, mode="student"))
    generate(config, LinesProgress(stream))
    note, loading, device, counts, _ = stream.getvalue().splitlines()
    assert note == "note 1: drawn from the student alone; the options of alpha do nothing"
    assert loading == "loading student toy-teacher"
    assert device == "device: none"  # of the engine
    assert counts.startswith("0/1 done, 1 owed")


def test_a_bar_says_that_models_are_loaded(job):
    """Guards: `0 owed, 0 tokens/s` for the minutes in which models are loaded."""
    stream = Terminal()
    progress = progress_for(stream)
    with progress:
        progress.start_loading(job())
        assert progress._bar.tasks[0].fields["status"] == "loading the models"
        progress.update(Tally(rows=1, samples_per_prompt=1))
        assert "owed" in progress._bar.tasks[0].fields["status"]
    assert "loading student toy-student, teacher toy-teacher" in stream.getvalue()


def test_the_status_of_a_folder(fake_engine, job):
    """Guards: a status that counts a failed sample as good, or a retried one twice."""
    rows = [{"problem": "1+1=?"}, {"problem": None}, {"problem": "2+2=?"}, {"problem": "3+3=?"}]
    fake_engine.fails = lambda request: "bad [/asy] logits" if len(fake_engine.served) == 1 else ""
    config = job(rows)
    generate(config)
    folder = Path(config.run.output_dir)
    console = Console(file=io.StringIO(), width=100)
    console.print(folder_status(folder))
    text = console.file.getvalue()
    assert "2 good, 2 failed" in text
    assert "2 of 4 asked" in text
    assert "bad [/asy] logits" in text
    assert "column 'problem' is null" in text
    assert "tokens/s" in text
    assert "alpha where the models differ" in text
    (folder / "summary.json").unlink()  # a first call that has not ended
    fake_engine.served.clear()
    fake_engine.fails = lambda request: ""
    console.print(folder_status(folder))
    assert "not known before a call has ended" in console.file.getvalue()


@pytest.mark.parametrize(("data_slice", "expected"), [(None, "20/40"), ("1::2", "10/20")])
def test_a_resumed_run_begins_with_what_is_there(fake_engine, job, data_slice, expected):
    """Guards: `0/40 done, 40 owed` at the start of a call on a folder whose last rows are good."""
    rows = [{"problem": f"{n}+1=?"} for n in range(20)]
    generate(job(rows, samples_per_prompt=3, data_slice="10:20"))
    stream = io.StringIO()
    generate(job(rows, samples_per_prompt=2, data_slice=data_slice), LinesProgress(stream))
    [first, *_] = [line for line in stream.getvalue().splitlines() if "done" in line]
    done, asked = map(int, expected.split("/"))
    assert first.startswith(f"{expected} done, {asked - done} owed")


def test_a_sample_of_another_slice_counts_once(fake_engine, job):
    """Guards: a count of rows that misses a prompt which a row of another slice has made."""
    rows = [{"problem": "1+1=?"}, {"problem": "2+2=?"}, {"problem": "1+1=?"}]
    generate(job(rows, data_slice="0:1"))
    summary = generate(job(rows, data_slice="1:3"))
    assert (summary.already_good, summary.generated, summary.owed) == (1, 1, 0)


def test_no_reason_of_failure_is_lost(fake_engine, job):
    """Guards: the sixth reason dropped from the table and from summary.json without a word."""
    fake_engine.fails = lambda request: f"reason {len(fake_engine.served)}"
    config = job([{"problem": f"{n}+1=?"} for n in range(8)])
    summary = generate(config)
    folder = Path(config.run.output_dir)
    for table in (summary.table(), folder_status(folder)):
        assert "and 3 more reasons" in shown(table)
        assert shown(table).count("x failed") == 5
    assert len(json.loads((folder / "summary.json").read_text())["errors"]) == 8


def test_a_call_without_tokens_has_no_speed(fake_engine, job):
    """Guards: `0.0 tokens/s (0 tokens in 0.0 s)` for a call that had nothing to do."""
    config = job([{"problem": "1+1=?"}])
    assert "tokens/s" in shown(generate(config).table())
    assert "tokens/s" not in shown(generate(config).table())
    assert "tokens/s" not in shown(folder_status(config.run.output_dir))


def test_the_status_of_a_merged_folder(fake_engine, job, tmp_path):
    """Guards: `owed: not known` of a folder that merge has found complete."""
    rows = [{"problem": f"{n}+1=?"} for n in range(3)]
    for part in ("0::2", "1::2"):
        generate(job(rows, part[0], data_slice=part))
    merge([tmp_path / "0", tmp_path / "1"], tmp_path / "all")
    assert "0 of 3 asked" in shown(folder_status(tmp_path / "all"))
    assert merge([tmp_path / "all"], tmp_path / "again") == 3


def shown(table):
    console = Console(file=io.StringIO(), width=100)
    console.print(table)
    return console.file.getvalue()
