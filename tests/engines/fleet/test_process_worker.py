"""A worker that is a process: how it starts, what it says when it cannot, and how it ends."""

from __future__ import annotations

import os
import re
import resource
import signal
import time
from dataclasses import replace

import psutil
import pytest

from optimal_sampling.config import MixtureConfig, ModelConfig, ToyOptions
from optimal_sampling.engines.fleet.driver import Driver
from optimal_sampling.engines.fleet.messages import Setup
from optimal_sampling.engines.fleet.placement import Place
from optimal_sampling.engines.fleet.process_worker import ProcessLauncher, _ending
from optimal_sampling.engines.fleet.supervision import Patience
from optimal_sampling.errors import ConfigError, EngineError, ModelError, RunFolderError
from optimal_sampling.version import __version__
from tests.engines.fleet.conftest import ROOT
from tests.engines.fleet.engines import EnvironmentOptions

SETUP = Setup(ModelConfig(device="cpu"), MixtureConfig(), ToyOptions(), "mixture", __version__)
CPU = Place("CPU")


@pytest.fixture
def open_driver(tmp_path):
    """(setup, place) -> a driver of one process, stopped after the test."""
    opened = []

    def open_it(setup=SETUP, place=CPU, **patience):
        driver = Driver(ProcessLauncher([place], setup, tmp_path), Patience(**patience))
        opened.append(driver)
        return driver

    yield open_it
    for driver in opened:
        driver.close()


def test_another_version_is_refused(open_driver, tmp_path, monkeypatch):
    """Guards: a worker that reads messages of another version; one whose modules are those of the
    working directory, where the driver's are not.
    """
    (tmp_path / "queue.py").write_text("raise SystemExit('not the module')")
    monkeypatch.chdir(tmp_path)
    driver = open_driver(replace(SETUP, version="0.0.9"))
    with pytest.raises(ConfigError, match=f"version {__version__} .*, and its driver 0.0.9"):
        driver.open()


def test_a_model_that_is_not_there_is_the_users_error(open_driver):
    """Guards: five attempts at a wrong path, and a traceback in place of its message."""
    driver = open_driver(replace(SETUP, models=ModelConfig(teacher="./nowhere", device="cpu")))
    with pytest.raises(ModelError, match="nowhere"):
        driver.open()


@pytest.mark.parametrize(
    ("code", "text"),
    [(7, "exit code 7"), (-11, "killed by SIGSEGV"), (-9, "killed by SIGKILL .*memory runs out")],
)
def test_how_a_process_ended(code, text):
    """Guards: a number of a signal in place of its name, and no word of memory."""
    assert re.fullmatch(text + r"\)?", _ending(code))


def test_a_dead_process_whose_child_lives(open_driver, monkeypatch):
    """Guards: a worker that is waited for because a process that it forked holds its socket; "a
    worker died", and nobody knows of what.
    """
    monkeypatch.syspath_prepend(str(ROOT))
    setup = replace(SETUP, options=EnvironmentOptions())
    environment = {"FLEET_TEST": "CUDA error: device-side assert"}
    driver = open_driver(setup, Place("CPU", environment), failures=1, loading=60.0)
    with pytest.raises(EngineError) as raised:
        driver.open()
    assert "worker 0 (CPU): exit code 9" in str(raised.value)
    assert "worker-0.log:" in str(raised.value)
    assert "CUDA error: device-side assert" in str(raised.value)


def test_its_environment_is_there_before_torch_and_it_ends_while_stopped(open_driver, monkeypatch):
    """Guards: all workers on the first GPU, because torch had been imported. And, once it is
    stopped: a driver that waits for a process which no longer runs; a process that outlives
    `close`; a driver's Ctrl-C that reaches its workers.
    """
    monkeypatch.syspath_prepend(str(ROOT))
    environment = {"CUDA_VISIBLE_DEVICES": "GPU-8f,3", "FLEET_TEST": ""}
    setup = replace(SETUP, options=EnvironmentOptions())
    driver = open_driver(setup, Place("GPU", environment))
    driver.open()
    assert driver.members[0].facts.notes == {"visible": "GPU-8f,3"}
    pid = driver.members[0].worker.pid
    assert os.getpgid(pid) == pid
    os.kill(pid, signal.SIGSTOP)
    started = time.monotonic()
    driver.close()
    assert time.monotonic() - started < 5
    assert not psutil.pid_exists(pid)


def test_too_many_open_files(open_driver):
    """Guards: a traceback where a process limit leaves no room for a worker's sockets."""
    driver = open_driver(failures=1)
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, before[1]))
    try:
        with pytest.raises(EngineError, match=r"could not be started: .*Too many open files"):
            driver.open()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_a_folder_of_logs_that_cannot_be_made(tmp_path):
    """Guards: a traceback where `logs` of the run folder is a file."""
    (tmp_path / "logs").touch()
    with pytest.raises(RunFolderError, match=r"cannot write .*logs.*--output-dir"):
        ProcessLauncher([CPU], SETUP, tmp_path / "logs")


def test_a_process_that_cannot_be_started(open_driver, tmp_path):
    """Guards: a traceback, and a worker that is waited for though there is none."""
    (tmp_path / "worker-0.log").mkdir()
    with pytest.raises(EngineError, match=r"it could not be started: .*worker-0\.log"):
        open_driver(failures=1).open()
