"""`optimal-sampling demo`: the newcomer's first run."""

import json
import re
import subprocess
import sys
from statistics import fmean

import pytest


def test_the_demo_shows_what_it_promises(tmp_path):
    """Guards: a first run that fails, or a table that does not say what the README says it does."""
    folder = tmp_path / "run"
    file = folder / "records" / "main.jsonl"
    command = [sys.executable, "-m", "optimal_sampling", "demo", "--output-dir", str(folder)]
    options = ["--num-examples", "12", "--max-new-tokens", "40"]
    first = subprocess.run([*command, *options], capture_output=True, text=True, timeout=240)
    assert first.returncode == 0, first.stderr
    outcome = r" +│ +\d+\.\d% ± \d+\.\d% +│ +\d+ +│ +\d+\.\d +│"
    for name in ("student", "teacher", r"q\*"):
        assert re.search(rf"│ {name}{outcome}", first.stdout)
    records = [json.loads(line) for line in file.read_text("utf-8").splitlines()]
    assert len({record["id"] for record in records}) == len(records) == 12
    names = ("alpha_mean", "clamped_share", "kl_student", "kl_teacher")
    means = re.search(r"│ +(\d\.\d{4}) " * 4 + "│", first.stdout)
    expected = [fmean(record[name] for record in records) for name in names]
    assert [float(mean) for mean in means.groups()] == pytest.approx(expected, abs=6e-5)
    shown = first.stdout.partition("Generations")[2]
    assert sum(record["row"]["problem"] in shown for record in records) == 3
    assert f"12 records in {file}" in first.stdout
    again = subprocess.run([*command, *options], capture_output=True, text=True, timeout=240)
    assert again.returncode == 0
    assert [json.loads(line) for line in file.read_text("utf-8").splitlines()] == records
