"""Tasks whose process dies."""

import os
from pathlib import Path

import pytest

from optimal_sampling.bench.own_process import Broken, in_own_process
from optimal_sampling.errors import ConfigError


def work(folder, tasks):
    """Squares. Says in `folder` which process did which task."""
    for task in tasks:
        (Path(folder) / f"{task}-{os.getpid()}").touch()
        if task == "dies":
            os._exit(3)
        if task == "refuses":
            raise ConfigError("not here")
        yield task * 2
        if task == "breaks":
            raise Broken


def lost(task, how):
    return f"{task} lost: {how}"


class Work:
    def __init__(self, folder):
        self.folder = folder

    def __call__(self, tasks):
        return work(self.folder, tasks)


@pytest.fixture(autouse=True)
def findable(monkeypatch):
    """The processes find this file by its name."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2]))


def processes(folder):
    """The tasks that each process did."""
    found = {}
    for path in folder.iterdir():
        task, process = path.name.split("-")
        found.setdefault(process, set()).add(task)
    return sorted(map(sorted, found.values()))


def test_one_death_costs_one_task(tmp_path):
    """Guards: finished cells lost with those after an illegal access."""
    tasks = ["a", "dies", "b", "breaks", "c"]
    found = list(in_own_process(Work(tmp_path), tasks, lost))
    ended = "dies lost: its process ended with code 3"
    assert found == ["aa", ended, "bb", "breaksbreaks", "cc"]
    assert processes(tmp_path) == [["a", "dies"], ["b", "breaks"], ["c"]]


def test_an_error_of_the_work_is_raised_here(tmp_path):
    """Guards: a user's mistake that looks like a crash of every cell."""
    found = in_own_process(Work(tmp_path), ["a", "refuses", "b"], lost)
    assert next(found) == "aa"
    with pytest.raises(ConfigError, match="not here"):
        next(found)
