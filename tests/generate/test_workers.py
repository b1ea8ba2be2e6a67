"""What is shown of workers, while a run goes and from a second terminal."""

import io
import json
import os
import time
from pathlib import Path

import pytest
from rich.console import Console

from optimal_sampling.errors import EngineError, RunFolderError
from optimal_sampling.generate import folder_status, generate
from optimal_sampling.generate.progress import LinesProgress, Tally, progress_for
from optimal_sampling.generate.workers import WorkersFile, status_lines
from optimal_sampling.types import WorkerStatus

ROWS = [
    WorkerStatus("worker 0", "GPU 0", "working", 40, 5012.4),
    WorkerStatus("worker 1", "GPU 1", "starting", 0, 0.0, failures=2),
]
LINES = [
    "worker 0: GPU 0, working, 40 in flight, 5012 tokens/s",
    "worker 1: GPU 1, starting, 0 in flight, 0 tokens/s, 2 failures",
]


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_line_per_worker_on_a_pipe():
    """Guards: a fleet of which nobody can tell which worker is slow."""
    stream = io.StringIO()
    progress = LinesProgress(stream)
    progress.workers = lambda: ROWS
    progress.update(Tally(rows=2, samples_per_prompt=1))
    first, *rest = stream.getvalue().splitlines()
    assert first.startswith("0/2 done")
    assert [line.strip() for line in rest] == LINES


def test_a_row_per_worker_on_a_terminal():
    """Guards: a bar that hides its workers, and a row that stays after they have ended."""
    stream = Terminal()
    with progress_for(stream) as progress:
        progress.workers = lambda: ROWS
        progress.update(Tally(rows=2, samples_per_prompt=1))
    shown = stream.getvalue()
    assert shown.count("\n") < 20
    for line in LINES:
        assert line.partition(": ")[2] in shown


def test_no_worker_is_shown_of_an_engine_that_was_closed(fake_engine, job):
    """Guards: rows of stopped workers beside an error, or asked of an engine that has ended."""

    def fail(request):
        assert list(progress.workers()) == ROWS
        raise EngineError("the last worker has died")

    progress = LinesProgress(io.StringIO())
    fake_engine.workers, fake_engine.fails = lambda: ROWS, fail
    with pytest.raises(EngineError, match="the last worker"):
        generate(job([{"problem": "1+1=?"}]), progress)
    assert list(progress.workers()) == []


def test_status_shows_the_workers_of_a_run_that_goes(fake_engine, job):
    """Guards: a second terminal that knows less than the first; rows of a run that has ended."""
    config = job([{"problem": "1+1=?"}, {"problem": "1+2=?"}])
    generate(config)
    run = config.run.output_dir

    def shown():
        console = Console(file=io.StringIO(), width=120)
        console.print(folder_status(run))
        return console.file.getvalue()

    with WorkersFile(Path(run), "main", seconds=0) as file:
        assert "worker 0" not in shown()
        file.update([])
        assert not file.path.exists()
        file.update(ROWS)
        for line in LINES:
            assert line.partition(": ")[2] in shown()
        document = json.loads(file.path.read_text())
        file.path.write_text(json.dumps(document | {"time": time.time() - 100}))
        assert "worker 0" not in shown()
    assert not file.path.exists()


@pytest.mark.parametrize(("shard", "name"), [("main", "workers.json"), ("a", "workers-a.json")])
def test_the_file_is_written_now_and_then(tmp_path, shard, name):
    """Guards: an fsync for every completion."""
    with WorkersFile(tmp_path, shard, seconds=1000) as file:
        file.update(ROWS)
        written = os.stat(tmp_path / name).st_mtime_ns
        file.update(ROWS)
        assert os.stat(tmp_path / name).st_mtime_ns == written


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"time": 1e12, "workers": [{"name": "w"}]}'])
def test_a_damaged_file_is_named(tmp_path, text):
    """Guards: a traceback of `status` for one file that is there for display alone."""
    (tmp_path / "workers.json").write_text(text)
    with pytest.raises(RunFolderError, match=r"workers\.json holds no rows"):
        list(status_lines(tmp_path))


def test_a_run_that_ends_this_moment(tmp_path):
    """Guards: an error of `status` because the file went between listing and reading."""
    (tmp_path / "workers.json").symlink_to(tmp_path / "gone")
    assert list(status_lines(tmp_path)) == []
