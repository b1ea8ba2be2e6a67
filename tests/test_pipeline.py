"""generate, verify, export, sft, evaluate, one after the other."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from safetensors.numpy import load_file

pytestmark = pytest.mark.xdist_group("pipeline")  # one run is the measure of several tests
GUIDE = Path(__file__).parents[1] / "docs" / "guide.md"
SCRIPT = Path(__file__).parents[1] / "examples" / "pipeline.sh"
SMALL = ("24", "16")
"""Problems to train on, and questions to evaluate with."""


def environment() -> dict[str, str]:
    """The command `optimal-sampling` of this environment comes first."""
    return os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}


def start(folder: Path, **options: Any) -> subprocess.Popen[str]:
    """The script, in a process group of its own."""
    return subprocess.Popen(
        [str(SCRIPT), str(folder), *SMALL],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment(),
        start_new_session=True,
        **options,
    )


def lines(folder: Path, name: str) -> list[dict[str, Any]]:
    """All lines of the files of records or verdicts below a folder."""
    paths = sorted(folder.glob(f"**/{name}/*.jsonl"))
    return [json.loads(line) for path in paths for line in path.read_text().splitlines()]


def identities(folder: Path, name: str) -> Counter[tuple[Any, ...]]:
    """How often each line is there, without what may differ between equal runs."""
    varying = {"seconds", "checksum", "record"}
    return Counter(
        tuple(sorted((k, json.dumps(v)) for k, v in line.items() if k not in varying))
        for line in lines(folder, name)
    )


def results(folder: Path) -> dict[str, Any]:
    """Everything that a finished pipeline has made, in a form that can be compared."""
    scores = (folder / "scores" / "results.json").read_text()
    parts = sorted(folder.glob("data/data/*.parquet"))
    weights = load_file(folder / "student" / "model.safetensors")
    return {
        "records": identities(folder, "records"),
        "verdicts": identities(folder, "verdicts"),
        "exported": [pq.read_table(part).to_pylist() for part in parts],
        "weights": {name: array.tobytes() for name, array in weights.items()},
        # the hash of the checkpoint's files is also that of its summary, which names the folder
        "scores": re.sub(rf'{re.escape(str(folder))}|"files": "\w+"', "", scores),
    }


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A folder of a pipeline that was not interrupted, and what it printed."""
    folder = tmp_path_factory.mktemp("whole") / "pipeline"
    said = finish(folder)
    return folder, said


def finish(folder):
    process = start(folder)
    said, _ = process.communicate(timeout=900)
    assert process.returncode == 0, said
    return said


@pytest.mark.timeout(900)
def test_the_pipeline_trains_and_compares(whole):
    """Guards: a stage that does not take what the one before it wrote."""
    folder, said = whole
    assert "Traceback" not in said
    assert "paired by question" in said
    rows = {row["checkpoint"]: row for row in results_of(folder)["rows"]}
    assert rows.keys() == {"toy-student", "student"}
    paired = rows["student"]["differences"]["avg@1"]
    before, after = (rows[name]["scores"]["avg@1"]["value"] for name in ("toy-student", "student"))
    assert paired["value"] == pytest.approx(after - before)
    assert paired["low"] <= paired["value"] <= paired["high"]


def results_of(folder):
    return json.loads((folder / "scores" / "results.json").read_text())


@pytest.mark.timeout(900)
def test_a_second_call_has_nothing_to_do(whole):
    """Guards: a stage that makes its work again, or adds to it."""
    folder, _ = whole
    before = results(folder)
    said = finish(folder)
    assert "(0 new)" in said
    assert "nothing to do" in said
    assert results(folder) == before


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("seed", range(4))
def test_a_pipeline_that_is_killed_gives_the_same(whole, tmp_path, seed):
    """Guards: records, verdicts, rows, updates or scores that are lost or made twice.

    Killed twice, with all its processes, at random moments of random stages.
    """
    rng = random.Random(seed)
    folder = tmp_path / "pipeline"
    for stage in sorted(rng.sample(range(1, 6), 2)):
        process = start(folder)
        kill_in(process, stage, rng.uniform(0, 12))
    finish(folder)
    assert results(folder) == results(whole[0])


def kill_in(process, stage, seconds):
    """SIGKILL to the process group, some time after a stage began, or when all is done."""
    begun = 0
    while begun < stage and (line := process.stdout.readline()):
        begun += line.startswith("+ optimal-sampling")
    deadline = time.monotonic() + seconds
    while process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


SIZES = (
    (r"--num-examples \d+", "--num-examples 24"),
    (r"--num_train_epochs \d+", "--num_train_epochs 1"),
)


@pytest.mark.timeout(900)
def test_the_commands_of_the_guide_run(tmp_path):
    """Guards: a command in the guide that an option has left behind."""
    blocks = re.findall(r"```sh toy\n(.*?)```", GUIDE.read_text(), re.DOTALL)
    script = "\n".join(blocks)
    for pattern, small in SIZES:
        script = re.sub(pattern, small, script)
    for stage in ("generate", "verify", "export", "sft", "evaluate"):
        assert f"optimal-sampling {stage} " in script
    done = subprocess.run(
        ["sh", "-euc", script],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr
    assert "paired by question" in done.stdout
