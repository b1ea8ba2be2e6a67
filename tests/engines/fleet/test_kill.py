"""Workers and drivers, killed at any moment: nothing is lost, made twice, or left running."""

from __future__ import annotations

import random
import signal
import subprocess
import time
from functools import partial

import psutil
import pytest

from tests.generate.test_kill import COMMAND, arguments, lines, size


def start(folder, rows, **options):
    command = [*COMMAND, *arguments(folder, rows, **options)]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def workers_of(process):
    """Worker processes of a running command."""
    try:
        children = psutil.Process(process.pid).children(recursive=True)
        return [each for each in children if "worker_main" in " ".join(each.cmdline())]
    except psutil.Error:
        return []


def wait_for(condition, seconds=120):
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return found


def wait_for_a_record(process, folder):
    before = size(folder)
    wait_for(lambda: process.poll() is not None or size(folder) > before)


def are_gone(processes):
    return not any(each.is_running() and each.status() != "zombie" for each in processes)


def finish(process):
    """Exit code, once the process and all that it wrote have ended."""
    process.stderr.read()
    process.stderr.close()
    return process.wait()


def plain(folder, rows, **options):
    command = [*COMMAND, *arguments(folder, rows, **options)]
    subprocess.run(command, check=True, capture_output=True)
    return lines(folder)


@pytest.mark.timeout(240)
def test_a_killed_worker_and_a_killed_driver(tmp_path):
    """Guards: a lost record, a repeated one, and processes that outlive their driver."""
    folder = tmp_path / "fleet"
    process = start(folder, 200, workers=2)
    workers = wait_for(lambda: size(folder) and workers_of(process))
    workers[0].kill()
    before = size(folder)
    wait_for(lambda: size(folder) > before)
    workers += workers_of(process)
    process.kill()
    finish(process)
    wait_for(lambda: are_gone(workers), seconds=20)
    assert 0 < len(lines(folder)) < 200
    assert finish(start(folder, 200, workers=1)) == 0
    assert lines(folder) == plain(tmp_path / "plain", 200)


@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    "number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)]
)
def test_an_interrupted_fleet_leaves_no_process(tmp_path, number):
    """Guards: workers that go on after Ctrl-C, while they load or while they work."""
    folder = tmp_path / "run"
    process = start(folder, 500, workers=2)
    if number == signal.SIGINT:
        wait_for(lambda: size(folder))
    workers = wait_for(lambda: workers_of(process))
    process.send_signal(number)
    assert finish(process) == 130
    assert are_gone(workers)


@pytest.mark.slow
@pytest.mark.timeout(5400)
@pytest.mark.parametrize("engine", ["toy", "local"])
def test_workers_killed_at_random(tmp_path, engine):
    """30 runs, 15 with each engine: 0 lost, 0 repeated, equal to a plain run."""
    whole = plain(tmp_path / "plain", 150, engine=engine)
    kills = 0
    for seed in range(15):
        rng, folder = random.Random(seed), tmp_path / f"killed{seed}"
        process = start(folder, 150, engine=engine, workers=2)
        seen = wait_for(partial(workers_of, process))
        for kill in range(4):
            if kill:  # the first one may hit a worker that loads
                wait_for_a_record(process, folder)
            time.sleep(rng.uniform(0, 2))
            workers = workers_of(process)
            seen += workers
            if workers:
                rng.choice(workers).kill()
                kills += 1
        assert finish(process) == 0
        assert lines(folder) == whole
        assert are_gone(seen)
    print(f"{kills} kills in 15 runs")
    assert kills >= 30


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_drivers_killed_at_random(tmp_path):
    """Ten times kill -9 in one run, workers of other numbers each time: the same."""
    whole = plain(tmp_path / "plain", 300, engine="local")
    folder, rng, seen = tmp_path / "killed", random.Random(0), []
    for kill in range(10):
        process = start(folder, 300, engine="local", workers=1 + kill % 3)
        if kill % 2:
            wait_for_a_record(process, folder)
        time.sleep(rng.uniform(0, 3))
        seen += workers_of(process)
        process.kill()
        finish(process)
        wait_for(partial(are_gone, seen), seconds=20)
    assert finish(start(folder, 300, engine="local", workers=2)) == 0
    assert lines(folder) == whole


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_one_two_and_three_workers_make_the_same_records(tmp_path):
    """float32, one thread each: equal by id without `seconds` and `checksum`."""
    made = [plain(tmp_path / f"{n}", 120, engine="local", workers=n) for n in (1, 2, 3)]
    assert len(made[0]) > 100
    assert made[0] == made[1] == made[2]
