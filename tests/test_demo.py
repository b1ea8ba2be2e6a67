"""`optimal-sampling demo`: the newcomer's first run."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from optimal_sampling.generate.progress import MEANS_SHOWN


def without_rates(text):
    """What the demo prints, without the column of tokens per second."""
    return re.sub(r"(% +│) +\d+ +│", r"\1", text)


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
    means = dict(re.findall(r"│ ([\w(),* /]+?) +│ (\d\.\d{4}) │", first.stdout))
    tokens = [record["n_completion_tokens"] for record in records]
    for name, title in MEANS_SHOWN.items():
        if name in ("alpha_mean", "clamped_share", "kl_student", "kl_teacher"):
            values = [record[name] for record in records]
            assert float(means[title]) == pytest.approx(
                np.average(values, weights=tokens), abs=6e-5
            )
    weights = [record["curvature"] * record["n_completion_tokens"] for record in records]
    weighted = np.average([record["alpha_weighted"] for record in records], weights=weights)
    assert float(means["alpha where the models differ"]) == pytest.approx(weighted, abs=6e-5)
    shown = first.stdout.partition("Generations")[2]
    assert sum(record["row"]["problem"] in shown for record in records) == 3
    assert f"12 records in {file}" in first.stdout
    assert first.stdout.endswith(f"optimal-sampling report {folder}\n")
    assert {record["top_tokens"]["k"] for record in records} == {5}
    file.write_bytes(b"".join(reversed(file.read_bytes().splitlines(keepends=True))))
    again = subprocess.run([*command, *options], capture_output=True, text=True, timeout=240)
    assert again.returncode == 0
    assert without_rates(again.stdout) == without_rates(first.stdout)  # whatever finishes first
    records.reverse()
    assert [json.loads(line) for line in file.read_text("utf-8").splitlines()] == records


@pytest.mark.slow
def test_the_readme_shows_what_the_demo_prints(tmp_path):
    """Guards: a README that promises another first run: other numbers, other generations."""
    command = [sys.executable, "-m", "optimal_sampling", "demo"]
    environment = {**os.environ, "COLUMNS": "100"}
    done = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, check=True, env=environment
    )
    shown = (Path(__file__).parents[1] / "README.md").read_text()
    shown = shown.split("```text\n")[1].split("```\n")[0]
    lines = [line.rstrip() for line in without_rates(done.stdout).splitlines()]
    assert lines == without_rates(shown).splitlines()
