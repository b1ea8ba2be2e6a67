"""The fused kernel: its tests in Triton's interpreter, that it compiles for GPUs, and what goes to
it.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from optimal_sampling.config import MixtureConfig
from optimal_sampling.distribution import (
    NoiseKeys,
    draft,
    gumbel,
    kernel_note,
    keys_tensor,
    step,
)
from optimal_sampling.distribution.gpu import launch

HERE = Path(__file__).parent
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed"
)


def in_own_process(arguments, **environment):
    """Whether Triton interprets is decided when it is imported."""
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(
        command,
        env={**os.environ, **environment},
        cwd=HERE.parents[1],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@needs_triton
@pytest.mark.timeout(900)  # a minute and a half on an idle machine
def test_kernel_in_the_interpreter():
    """Guards: everything that `interpreted.py` lists."""
    in_own_process(
        ["-m", "pytest", "-q", "-p", "no:cacheprovider", HERE / "interpreted.py"],
        TRITON_INTERPRET="1",
    )


@needs_triton
def test_kernel_compiles_for_gpus(tmp_path):
    """Guards: what the interpreter takes and a GPU's compiler does not, and registers that spill.
    Needs no GPU.
    """
    command = [HERE.parents[1] / "benchmarks/gpu/registers.py", "--check"]
    in_own_process(command, TRITON_CACHE_DIR=str(tmp_path), TRITON_INTERPRET="0")


def test_covers():
    """Guards: a mixture that the kernel would get wrong."""
    assert launch.covers(MixtureConfig(temperature=0.7, force_first_token=True))
    assert launch.covers(MixtureConfig(alpha_method="veto", teacher_support_min_p=0.2, top_k=1))
    assert not launch.covers(MixtureConfig(), keep_log_q=True)
    for options in (
        {"alpha_method": "entropy"},
        {"alpha_method": "trust_region"},
        {"alpha_method": "interleaved"},
        {"alpha_method": "arithmetic"},
        {"top_k": 3},
        {"top_p": 0.9},
        {"teacher_support_top_k": 3},
        {"teacher_support_top_p": 0.9},
    ):
        assert not launch.covers(MixtureConfig(**options))


def test_a_field_that_the_programs_do_not_write_is_not_covered(monkeypatch):
    """Guards: a column of a new field that stays uninitialised on a GPU."""
    monkeypatch.setattr(launch, "TRACE_FIELDS", (*launch.TRACE_FIELDS, "new"))
    assert not launch.covers(MixtureConfig())


def test_what_runs_where(monkeypatch):
    """Guards: a summary that names another path than the one taken, and a GPU that needs Triton."""
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    monkeypatch.setattr(launch, "triton_version", lambda: "3.7.1")
    assert kernel_note(cuda) == "mixture kernel: fused (Triton 3.7.1)"
    assert launch.runs_fused(cuda, MixtureConfig())
    assert not launch.runs_fused(cuda, MixtureConfig(top_k=3))
    assert "does not cover" in kernel_note(cuda, MixtureConfig(top_k=3))
    assert not launch.runs_fused(cpu)
    assert "this is cpu" in kernel_note(cpu)
    monkeypatch.setattr(launch, "triton_version", lambda: None)
    assert kernel_note(cuda) == "mixture kernel: PyTorch, because Triton is not installed"
    assert not launch.runs_fused(cuda, MixtureConfig())


@pytest.mark.parametrize("vocab", [50, 5000])
def test_keys_stand_for_their_noise(vocab):
    """Guards: noise made for other rows where a batch is worked on in parts, or for another
    vocabulary.
    """
    g = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(40, vocab, generator=g), torch.randn(40, vocab, generator=g)
    keys = NoiseKeys(keys_tensor(range(40)), torch.arange(40) + 3)
    made = gumbel(keys.keys, keys.position, vocab)
    mixture = MixtureConfig(temperature=0.8)
    assert torch.equal(
        step(student, teacher, keys, keys.position, mixture).pack(),
        step(student, teacher, made, keys.position, mixture).pack(),
    )
    assert torch.equal(draft(student, keys, mixture), draft(student, made, mixture))
