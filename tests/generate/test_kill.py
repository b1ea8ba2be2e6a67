"""The command, ended at any moment and called again: nothing is lost or made twice."""

from __future__ import annotations

import json
import random
import re
import shlex
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from optimal_sampling.records import load, load_verdicts

COMMAND = [sys.executable, "-m", "optimal_sampling"]


def arguments(folder, rows, **options):
    options = {
        "engine": "toy",
        "output-dir": folder,
        "num-examples": rows,
        "max-new-tokens": 24,
        **options,
    }
    return ["generate", *(f"--{name}={value}" for name, value in options.items())]


def lines(folder):
    """The lines of a folder by identity, but for the time; fails on a repeated identity."""
    found = {}
    for path in (Path(folder) / "records").glob("*.jsonl"):
        for line in path.read_bytes().split(b"\n")[:-1]:
            record = json.loads(line)
            key = record["id"], record["sample_index"]
            assert key not in found
            found[key] = re.sub(rb'"seconds":[0-9.]+,|"checksum":"\w+"', b"", line)
    return found


def size(folder):
    return sum(path.stat().st_size for path in (Path(folder) / "records").glob("*.jsonl"))


def wait_for_a_moment(process, folder, kills, rng, longest):
    """In turn: just after a record was written, some time into the run, and any time from the
    start.
    """
    before = size(folder)
    if kills % 3 == 0:
        while process.poll() is None and size(folder) == before:
            time.sleep(0.005)
    elif kills % 3 == 1:
        process.stderr.readline()
        time.sleep(rng.uniform(0, longest))
    else:
        time.sleep(rng.uniform(0, 3 + longest))


def kill_until_done(command, folder, rng, longest, most):
    """Kill at random moments, at most so often, until it has finished all the same; the number of
    kills.
    """
    kills = 0
    while True:
        before = len(lines(folder))
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        if kills < most:
            wait_for_a_moment(process, folder, kills, rng, longest)
            process.kill()
        process.stderr.read()
        process.stderr.close()
        code = process.wait()
        assert len(lines(folder)) >= before
        if code != -signal.SIGKILL:
            assert code == 0
            return kills
        kills += 1


@pytest.mark.timeout(120)
def test_kill_and_resume(tmp_path):
    """Guards: a lost record, a repeated one, and a resumed run that differs from an uninterrupted
    one.
    """
    options = {"samples-per-prompt": 2}
    subprocess.run(
        [*COMMAND, *arguments(tmp_path / "whole", 30, **options)], check=True, capture_output=True
    )
    command = [*COMMAND, *arguments(tmp_path / "killed", 30, **options)]
    kills = kill_until_done(command, tmp_path / "killed", random.Random(3), longest=1.5, most=4)
    assert kills >= 1
    assert lines(tmp_path / "killed") == lines(tmp_path / "whole")


STAGES = """
- {name: own, mode: student, tries: 3}
- {name: kl}
- {name: teacher, mode: teacher, top_k: 1}
"""


def staged(tmp_path, **options):
    """Options of a run of stages: completions that end by themselves, which is about half of them,
    are right with a chance of a third.
    """
    stages, grader = tmp_path / "stages.yaml", tmp_path / "own.py"
    stages.write_text(STAGES)
    grader.write_text(
        "def check(completion, reference, row):\n    return sum(map(ord, completion)) % 3 == 0\n"
    )
    grading = {"verify": f"{grader}:check", "verify-workers": 1}
    return {"stages": stages, "max-new-tokens": 160, **grading, **options}


def verdicts(folder):
    """Verdicts by identity."""
    return {key: graded["verdict"] for key, graded in load_verdicts(folder).items()}


@pytest.mark.timeout(180)
def test_kill_and_resume_in_stages(tmp_path):
    """Guards: a killed run that tries a prompt again after its correct completion, or not at all
    before it.
    """
    options = staged(tmp_path)
    whole = [*COMMAND, *arguments(tmp_path / "whole", 12, **options)]
    subprocess.run(whole, check=True, capture_output=True)
    command = [*COMMAND, *arguments(tmp_path / "killed", 12, **options)]
    kills = kill_until_done(command, tmp_path / "killed", random.Random(5), longest=1.5, most=3)
    assert kills >= 1
    assert lines(tmp_path / "killed") == lines(tmp_path / "whole")
    assert verdicts(tmp_path / "killed") == verdicts(tmp_path / "whole")
    stages = {record["stage"] for record in load(tmp_path / "whole")}
    assert stages == {"own", "kl", "teacher"}
    solved = list(verdicts(tmp_path / "whole").values()).count("correct")
    assert 2 < solved < 12  # or the verdicts would have closed nothing


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("engine", ["toy", "local"])
def test_kill_and_resume_in_stages_for_long(tmp_path, engine):
    """The same with many kills, and with real models."""
    options = staged(tmp_path, engine=engine)
    whole = [*COMMAND, *arguments(tmp_path / "whole", 40, **options)]
    subprocess.run(whole, check=True, capture_output=True)
    for seed in range(2):
        folder = tmp_path / f"killed{seed}"
        command = [*COMMAND, *arguments(folder, 40, **options)]
        kill_until_done(command, folder, random.Random(seed), longest=1.0, most=15)
        assert lines(folder) == lines(tmp_path / "whole")
        assert verdicts(folder) == verdicts(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("engine", ["toy", "local"])
def test_kill_and_resume_for_long(tmp_path, engine):
    """The same with many kills, and with real models."""
    options = {"samples-per-prompt": 2, "engine": engine}
    subprocess.run(
        [*COMMAND, *arguments(tmp_path / "whole", 40, **options)], check=True, capture_output=True
    )
    for seed in range(2):
        folder = tmp_path / f"killed{seed}"
        kill_until_done(
            [*COMMAND, *arguments(folder, 40, **options)],
            folder,
            random.Random(seed),
            longest=1.0,
            most=20,
        )
        assert lines(folder) == lines(tmp_path / "whole")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_command_says_how_to_go_on(tmp_path, number):
    """Guards: a traceback for Ctrl-C, a wrong exit code, and advice that does not work."""
    folder = tmp_path / "run with a space"
    command = [*COMMAND, *arguments(folder, 500)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stderr.readline()
    deadline = time.monotonic() + 60
    while not list(folder.glob("records/*.jsonl")) or not lines(folder):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(number)
    _, said = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "Traceback" not in said
    safe = int(re.search(r"interrupted; (\d+) good records are safe", said)[1])
    assert safe == len(lines(folder)) > 0
    advice = shlex.split(said.splitlines()[-1])
    assert advice == command
    assert json.loads((folder / "summary.json").read_text())["status"] == "interrupted"
    again = subprocess.run([*advice, f"--num-examples={safe}"], capture_output=True, text=True)
    assert (again.returncode, "(0 new)" in again.stdout) == (0, True)


STUBBORN = """
    import signal, sys, time
    import optimal_sampling.engines as engines
    from optimal_sampling.engines.base import Engine
    from optimal_sampling.cli import main

    class Stubborn(Engine):
        def generate(self, requests):
            try:
                print("generating", flush=True)
                time.sleep(60)
            finally:
                print("stopping", flush=True)
                time.sleep(60)
            yield

    engines.open_engine = lambda *_: Stubborn()
    sys.exit(main(["generate", "--output-dir", sys.argv[1]]))
"""


@pytest.fixture
def stubborn(tmp_path):
    """A run that is told to end once, and does not."""
    code = [sys.executable, "-c", textwrap.dedent(STUBBORN), str(tmp_path / "run")]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(code, **pipes) as process:
        assert process.stdout.readline() == "generating\n"
        process.send_signal(signal.SIGINT)
        assert process.stdout.readline() == "stopping\n"
        yield process
        process.kill()


def test_a_second_ctrl_c_ends_at_once(stubborn):
    """Guards: a command that can only be killed by its number, and one that ends without a word."""
    time.sleep(1.1)  # less is taken for the same wish
    stubborn.send_signal(signal.SIGINT)
    assert stubborn.wait(timeout=10) == -signal.SIGINT
    advice = r"interrupted; ended at once, .* is safe\. To go on:\n  .*python3? -c"
    assert re.search(advice, stubborn.stderr.read())


def test_a_key_that_is_pressed_twice_ends_nothing_at_once(tmp_path):
    """Guards: two Ctrl-C within some milliseconds, which ended a run without its last words."""
    folder = tmp_path / "run"
    command = [*COMMAND, *arguments(folder, 500)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        while not size(folder):
            time.sleep(0.02)
        for _ in range(5):
            process.send_signal(signal.SIGINT)
            time.sleep(0.01)
        said = process.stderr.read()
    assert process.returncode in (130, -signal.SIGINT)  # the latter while Python takes itself down
    assert re.search(r"interrupted; \d+ good records are safe", said)
    assert "Traceback" not in said


FULL_DISK = """
    import resource, signal, sys
    from optimal_sampling.cli import main
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8000, 8000))
    sys.exit(main(sys.argv[1:]))
"""


def test_a_full_disk(tmp_path):
    """Guards: a traceback, a torn file, and a run that cannot go on when there is room again."""
    given = arguments(tmp_path / "run", 12)
    full = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(FULL_DISK), *given], capture_output=True, text=True
    )
    assert full.returncode == 1
    assert "Traceback" not in full.stderr
    assert (
        "every record acknowledged before is safe. Free some space and run the same command again"
        in full.stderr
    )
    kept = lines(tmp_path / "run")
    again = subprocess.run([*COMMAND, *given], capture_output=True, text=True)
    assert again.returncode == 0
    assert f"({12 - len(kept)} new)" in again.stdout
    assert "torn" not in again.stdout
    assert lines(tmp_path / "run").items() >= kept.items()
