"""The kernel scripts of `benchmarks/gpu`, which need no GPU, or take tiny shapes without one."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

GPU = Path(__file__).parents[2] / "benchmarks/gpu"
pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed"
)


def module_of(name):
    spec = importlib.util.spec_from_file_location(f"gpu_{name}", GPU / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(("name", "plain"), [("Qwen2.5-3B", 26), ("Qwen3-1.7B", 28)])
def test_launches_per_layer(name, plain):
    """Guards: a copy or a kernel that comes back into the fused layers."""
    launches = module_of("launches")
    before, _ = launches.per_layer(name, fused=False)
    after, beside = launches.per_layer(name, fused=True)
    assert before.total() == plain
    assert after.total() <= 10
    assert after["linear"] == 4
    assert after.total() + beside.total() < before.total()


def test_kernels_on_tiny_shapes():
    """Guards: a script whose first run on a GPU dies of its own mistakes."""
    checks = ["add_rms_norm", "rotate_with_head_norms", "silu_mul", "draft", "mixture"]
    checks += ["mixture_veto", "mixture_min_p", "mixture_likeliest", "mixture_all_three"]
    checks += ["top_k", "split_attention_5", "pass"]
    command = [sys.executable, str(GPU / "kernels.py"), "--tiny", "--rows", "2", "--only", *checks]
    done = subprocess.run(
        command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("\nok ") == len(checks)


def test_one_failed_check_does_not_hide_the_others(monkeypatch):
    """Guards: a traceback that ends a run on a rented GPU."""
    monkeypatch.syspath_prepend(str(GPU))
    kernels = module_of("kernels")

    def fails(setting, rows):
        raise RuntimeError("illegal memory access\nmore")

    def holds(setting, rows):
        return "fine", lambda: None, None

    monkeypatch.setattr(kernels, "CHECKS", {"bad": fails, "good": holds})
    found = list(kernels.lines(kernels.settings(tiny=True), ["bad", "good"], [1]))
    assert [held for held, _ in found] == [False, True]
    assert "RuntimeError at test_gpu_kernels.py" in found[0][1]
    assert "illegal memory access" in found[0][1]
