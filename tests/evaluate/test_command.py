"""The command `evaluate`: exit codes, the older command line, and ends at any moment."""

from __future__ import annotations

import json
import random
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from optimal_sampling import toy_pair
from optimal_sampling.cli import main

SCRIPT = Path(__file__).parents[2] / "scripts" / "eval_checkpoints.py"
COMMAND = [sys.executable, "-m", "optimal_sampling", "evaluate"]


def arguments(folder, **options):
    options = {
        "extra-models": "toy-student",
        "benchmarks": "synthetic",
        "num-examples": 20,
        "samples": 2,
        "max-new-tokens": 100,
        "output-dir": folder,
        **options,
    }
    return [word for name, value in options.items() for word in (f"--{name}", str(value))]


def results(folder):
    """The scores, without the paths of the machine."""
    found = json.loads((folder / "results.json").read_text())
    return {name: found[name] for name in ("rows", "missing", "baseline", "benchmarks")}


def answers(folder):
    """Records by identity; fails on a repeated one."""
    found = {}
    for path in folder.glob("runs/*/*/records/*.jsonl"):
        for line in path.read_bytes().split(b"\n")[:-1]:
            record = json.loads(line)
            key = path.parts[-4:-2], record["id"], record["sample_index"]
            assert key not in found
            found[key] = record["completion_ids"]
    return found


def test_the_older_command_line(tmp_path):
    """Guards: the command line of the documents this project comes from, refused or changed."""
    for name in ("run/checkpoint-20", "run/checkpoint-100"):
        (tmp_path / "c" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copytree(toy_pair.path("toy-student"), tmp_path / "c" / name)
    line = (
        f"--checkpoint-dir {tmp_path / 'c'} --output-dir {tmp_path / 'out'} "
        "--tensor-parallel-size 8 --batch-size 256 --resume --verbose "
        "--extra-models toy-teacher --benchmarks synthetic --num-examples 4 --max_new_tokens 60"
    )
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *shlex.split(line)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    rows = results(tmp_path / "out")["rows"]
    names = ["toy-teacher", "run/checkpoint-20", "run/checkpoint-100"]
    assert [row["checkpoint"] for row in rows] == names
    for words in (*names, "avg@1", "minus toy-teacher"):
        assert words in done.stdout
    assert "--- correct" in done.stderr or "--- wrong" in done.stderr
    assert done.stdout.splitlines()[-1].endswith("results.md")


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        ({"benchmarks": "synthetic", "num-examples": 2, "samples": 1}, 0, "results.json"),
        ({"benchmark-file": "mine=/none.jsonl", "benchmarks": "mine"}, 2, "does not exist"),
        ({"benchmarks": "sythetic"}, 2, "did you mean 'synthetic'"),
        ({"workers": "4"}, 2, "--workers 4"),
        ({"pass-at": "3"}, 2, "--pass-at 3 needs 3 samples"),
        ({"checkpoint-dir": "/none"}, 2, "is no folder"),
    ],
)
def test_exit_codes(tmp_path, capsys, options, code, words):
    """Guards: a traceback for a mistake, and success where there is no score."""
    try:
        found = main(["evaluate", *arguments(tmp_path / "out", **options)])
    except SystemExit as end:  # of the parser, for values that contradict each other
        found = end.code
    assert found == code
    said = capsys.readouterr()
    assert words in " ".join((said.out + said.err).split())
    assert "Traceback" not in said.err


def test_something_without_a_score_is_exit_code_3(tmp_path, capsys):
    """Guards: a script that goes on although one of two benchmarks was not there."""
    given = arguments(tmp_path / "out", **{"num-examples": 2, "samples": 1})
    place = given.index("synthetic")
    given[place:place] = ["mine"]
    given += ["--benchmark-file", f"mine={tmp_path / 'none.jsonl'}"]
    assert main(["evaluate", *given]) == 3
    said = capsys.readouterr()
    assert "synthetic: 2 questions" in said.out
    assert "without a whole score: mine" in said.err


def wait_for_answers(process, folder, before, seconds=120):
    deadline = time.monotonic() + seconds
    while process.poll() is None and len(answers(folder)) <= before:
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_ctrl_c_says_how_to_go_on(tmp_path):
    """Guards: a traceback for Ctrl-C, lost answers, and advice that does not work."""
    folder = tmp_path / "out"
    command = [*COMMAND, *arguments(folder, **{"num-examples": 400})]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_for_answers(process, folder, 0)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in said
    assert f"what was finished is safe in {folder}" in said
    kept = answers(folder)
    assert 0 < len(kept) < 800
    advice = shlex.split(said.splitlines()[-1])
    assert advice == command
    again = subprocess.run([*advice, "--num-examples=4"], capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert answers(folder).items() >= kept.items()


def kill_until_done(command, folder, rng, most):
    """Kill -9 at random moments, at most so often; the number of kills."""
    said = folder.with_name(f"{folder.name}.stderr")
    for kills in range(most + 1):
        with said.open("w") as errors:
            process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=errors)
        before = len(answers(folder))
        if kills < most:
            if kills % 2 == 0:
                wait_for_answers(process, folder, before)
            time.sleep(rng.uniform(0, 1 if kills % 2 == 0 else 6))
            process.kill()
        code = process.wait()
        assert len(answers(folder)) >= before
        if code != -signal.SIGKILL:
            assert code == 0, said.read_text()
            return kills
    raise AssertionError("the last call was killed by another")


@pytest.mark.timeout(280)
def test_kill_and_resume(tmp_path):
    """Guards: an answer that is lost or drawn twice, and scores that differ after a kill."""
    given = {"samples": 4, "num-examples": 40}
    subprocess.run(
        [*COMMAND, *arguments(tmp_path / "whole", **given)], check=True, capture_output=True
    )
    command = [*COMMAND, *arguments(tmp_path / "killed", **given)]
    assert kill_until_done(command, tmp_path / "killed", random.Random(5), most=3) >= 1
    assert answers(tmp_path / "killed") == answers(tmp_path / "whole")
    assert results(tmp_path / "killed") == results(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_kill_and_resume_for_long(tmp_path):
    """The same with twenty kills, over two models."""
    given = {"samples": 4, "num-examples": 100}
    models = ["--extra-models", "toy-teacher", "toy-student"]
    whole = [*COMMAND, *arguments(tmp_path / "whole", **given), *models]
    subprocess.run(whole, check=True, capture_output=True)
    kills = seed = 0
    while kills < 20:  # how often one evaluation is killed depends on the machine's speed
        folder = tmp_path / f"killed{seed}"
        command = [*COMMAND, *arguments(folder, **given), *models]
        found = kill_until_done(command, folder, random.Random(seed), most=8)
        assert found
        assert answers(folder) == answers(tmp_path / "whole")
        assert results(folder) == results(tmp_path / "whole")
        kills, seed = kills + found, seed + 1
