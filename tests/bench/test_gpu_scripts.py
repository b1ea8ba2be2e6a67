"""The scripts in benchmarks/gpu, on a CPU with small shapes."""

import importlib
import importlib.util
import json
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


@pytest.fixture
def round_profile(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    return importlib.import_module("round_profile")


def test_the_profile_script_with_small_shapes(tmp_path):
    """Guards: a script that breaks before anybody has the GPU to run it on."""
    output = tmp_path / "profile.json"
    in_own_process(
        SCRIPTS / "round_profile.py", "--tiny", "--device", "cpu", "--rounds", "3",
        "--output", output,
    )  # fmt: skip
    found = json.loads(output.read_text())
    assert found["4 drafts"]["rounds"] == 3
    assert found["4 drafts"]["ms"] > 0


def test_busy_and_idle_time_of_kernels_that_overlap(round_profile):
    """Guards: kernels that run at once counted twice, and pauses that one of them fills."""
    spans = [(0, 10), (2, 5), (8, 20), (30, 40), (30, 35), (41, 50)]
    names = ["nvjet_gemm", "void at::native::copy", "flash_fwd", "x", "x", "Memcpy DtoH"]
    made = [
        round_profile.Kernel(name, 1000 * a, 1000 * b)
        for name, (a, b) in zip(names, spans, strict=True)
    ]
    facts = round_profile.Profile(2, 0.1, made, 4).facts()
    assert facts["ms"] == 50
    assert facts["graph_launches"] == 2
    assert facts["busy_ms"] == pytest.approx((20 + 10 + 9) / 2e3)
    assert facts["idle_ms"] == pytest.approx((10 + 1) / 2e3)
    assert facts["longest_gaps_us"] == [10.0, 1.0]
    assert facts["kernel_ms"] == pytest.approx((10 + 3 + 12 + 10 + 5 + 9) / 2e3)
    assert facts["by_kind_ms"]["copies"] == pytest.approx((3 + 9) / 2e3)
    assert facts["by_kind_ms"]["attention"] == pytest.approx(12 / 2e3)


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_the_programs_of_the_mixture_are_known_by_name(round_profile):
    """Guards: a mixture whose time is counted as that of the layers."""
    assert {round_profile.kind_of(name) for name in ("mix", "finish", "draft")} == {"mixture"}
