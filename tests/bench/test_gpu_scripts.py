"""The scripts in benchmarks/gpu, on a CPU with small shapes."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
SCRIPTS = HERE.parents[1] / "benchmarks" / "gpu"


def in_own_process(*arguments, **environment):
    """The output of a Python process that has to succeed."""
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(
        command,
        env={**os.environ, **environment},
        cwd=HERE.parents[1],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
@pytest.mark.timeout(600)
def test_the_smoke_checks_in_the_interpreter():
    """Guards: what `interpreted_smoke.py` lists. Whether Triton interprets is decided on import."""
    file = HERE / "interpreted_smoke.py"
    in_own_process("-m", "pytest", "-q", "-p", "no:cacheprovider", file, TRITON_INTERPRET="1")


def test_the_smoke_script_without_a_gpu():
    """Guards: a check that is skipped without a word."""
    text = in_own_process(SCRIPTS / "smoke.py", "--tiny", "--device", "cpu")
    assert "attention  skipped" in text
    assert "smoke: passed" in text
