"""Run folders in every state: what the page says of them, and what is refused."""

from __future__ import annotations

import json

import pytest

from optimal_sampling.errors import ConfigError, RunFolderError
from optimal_sampling.records.store import Lock
from optimal_sampling.report.folders import open_folders


def notes_of(path):
    [run], _ = open_folders([str(path)])
    return " ".join(run.notes)


@pytest.fixture
def run(make_run, draw):
    path = make_run("run", [draw("1+1=2", row=row) for row in range(3)])
    summary = {"asked": 4, "tokens": 9, "seconds": 1.0, "tokens_per_second": 9.0}
    (path / "summary.json").write_text(json.dumps(summary))
    return path


def test_a_finished_run_has_no_notes(run):
    """Guards: warnings that one learns to overlook."""
    [found], _ = open_folders([str(run)])
    assert found.notes == []
    assert (found.name, found.asked) == ("run", 4)
    assert len(list(found.records())) == 3


def test_a_run_that_is_still_written_says_so(run):
    """Guards: a page of half a run that looks like a page of all of it, and a lock left behind."""
    lock = Lock(run / "records" / "main.jsonl")
    assert "still writing" in notes_of(run)
    lock.release()
    assert notes_of(run) == ""
    Lock(run / "records" / "main.jsonl").release()


def test_a_run_that_was_killed(run):
    """Guards: torn and damaged lines that nobody hears of, or that end the command."""
    (run / "summary.json").unlink()
    path = run / "records" / "main.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0] + b"x" + lines[1] + lines[2][:50])
    assert "No call on this run has come to its end" in notes_of(run)
    assert "2 damaged or torn lines" in notes_of(run)
    [found], _ = open_folders([str(run)])
    assert len(list(found.records())) == 1
    assert found.asked is None


def test_a_run_without_records(run):
    """Guards: an error for a run that has just begun, which may be waiting for its models."""
    (run / "records" / "main.jsonl").write_bytes(b"")
    assert "no records yet" in notes_of(run)
    (run / "records" / "main.jsonl").unlink()
    [found], _ = open_folders([str(run)])
    assert list(found.records()) == []


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"compared": 3}'])
def test_a_config_that_cannot_be_read(run, content):
    """Guards: a traceback for a run folder whose config was cut short."""
    (run / "config.json").write_text(content)
    assert "options are not known" in notes_of(run)
    (run / "summary.json").write_text(content)
    notes_of(run)


def test_an_older_schema_is_named(run):
    """Guards: fields of another version read as if they were of this one."""
    from optimal_sampling.records.store import decode_line, encode_line

    path = run / "records" / "main.jsonl"
    record = decode_line(path.read_bytes().splitlines(keepends=True)[0])
    path.write_bytes(encode_line({**record, "schema_version": 0}))
    [found], _ = open_folders([str(run)])
    with pytest.raises(RunFolderError, match="schema 0"):
        list(found.records())


def test_folders_that_are_none(tmp_path):
    """Guards: a page of nothing for a path that was mistyped."""
    with pytest.raises(ConfigError, match="name the run folders"):
        open_folders([])
    with pytest.raises(RunFolderError, match="there is no folder"):
        open_folders([str(tmp_path / "gone")])
    with pytest.raises(RunFolderError, match="is no run folder"):
        open_folders([str(tmp_path)])
    (tmp_path / "results.json").write_text('{"rows": 3}')
    with pytest.raises(RunFolderError, match="does not hold the scores"):
        open_folders([str(tmp_path)])


def test_runs_of_one_name_are_told_apart(make_run, draw):
    """Guards: two columns with the same title."""
    paths = [make_run(name, [draw()]) for name in ("a/run", "b/run", "c")]
    runs, _ = open_folders([str(path) for path in paths])
    names = [run.name for run in runs]
    assert names[:2] == ["a/run", "b/run"]
    assert names[2].endswith("/c")
