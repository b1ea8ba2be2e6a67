"""`optimal-sampling demo`: the newcomer's first run."""

import json
import subprocess
import sys


def test_the_demo_shows_what_it_promises(tmp_path):
    """Guards: a first run that fails, or a table that does not say what the README says it does."""
    folder = tmp_path / "run"
    command = [sys.executable, "-m", "optimal_sampling", "demo", "--output-dir", str(folder)]
    options = ["--num-examples", "12", "--max-new-tokens", "40"]
    first = subprocess.run([*command, *options], capture_output=True, text=True, timeout=240)
    assert first.returncode == 0, first.stderr
    for text in (
        "student",
        "teacher",
        "q*",
        "tokens/s",
        "alpha",
        "clamped",
        "KL",
        "Generations",
        "main.jsonl",
    ):
        assert text in first.stdout
    lines = (folder / "records" / "main.jsonl").read_text().splitlines()
    assert len(lines) == len({json.loads(line)["id"] for line in lines}) >= 10
    again = subprocess.run([*command, *options], capture_output=True, text=True, timeout=240)
    assert again.returncode == 0
    assert (folder / "records" / "main.jsonl").read_text().splitlines() == lines
