"""The GPU's smoke checks on a CPU: Triton's interpreter, stand-ins for attention and recorder.

`test_gpu_scripts.py` runs this file in a process of its own.
"""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from optimal_sampling.config import ModelConfig
from tests.engines.local.paged.conftest import FakeRecorder, fake_operator, flash_on_cpu

__all__ = ["flash_on_cpu"]

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks" / "gpu"))
from smoke import TINY, Smoke, run, run_checks

NAMES = [
    "versions",
    "attention",
    "mixture",
    "rules",
    "load",
    "replay",
    "chunks",
    "overlap",
    "texts",
    "ahead",
]
CPU = ModelConfig(device="cpu", dtype="float32")


def outcomes(smoke, capsys):
    """(check, outcome) of all that ran, and what was printed."""
    with np.errstate(all="ignore"):  # the interpreter computes with NumPy
        passed = run_checks(smoke)
    text = capsys.readouterr().out
    found = [tuple(line.split()[:2]) for line in text.splitlines() if line.split()[:1]]
    return passed, [pair for pair in found if pair[0] in NAMES], text


def smoke_on_cpu(recorder=FakeRecorder):
    smoke = Smoke(TINY, CPU)
    for runner in smoke.pair.loaded().pair.runners.values():
        runner.new_recorder = recorder
        runner.runs_ahead = True
    return smoke


def test_every_check_runs_and_passes(flash_on_cpu, capsys):
    """Guards: a check that breaks on the GPU, where a minute is dear."""
    passed, found, text = outcomes(smoke_on_cpu(), capsys)
    assert passed, text
    assert found == [(name, "ok") for name in NAMES], text
    assert "drafts 4: 0 of" not in text


def test_a_key_too_few_is_found_and_ends_the_run(flash_on_cpu, capsys, monkeypatch):
    """Guards: a check of attention that any attention passes."""

    def short(*args, seqused_k, **kwargs):
        return fake_operator(*args, seqused_k=(seqused_k - 1).clamp(min=1), **kwargs)

    short.default = fake_operator.default
    monkeypatch.setattr(torch.ops.aten, "_flash_attention_forward", short)
    passed, found, text = outcomes(Smoke(TINY, CPU), capsys)
    assert not passed
    assert found == [("versions", "ok"), ("attention", "FAILED")], text
    assert "segments differ from float64" in text


def test_a_replay_that_differs_is_found(flash_on_cpu, capsys):
    """Guards: replays that are compared with themselves."""

    class Stale:
        def __call__(self, forward):
            forward()
            return lambda: None  # the output stays that of the recording

    class Wrong(Stale):
        def __call__(self, forward):
            forward()
            output = forward.__closure__[[*forward.__code__.co_freevars].index("output")]
            return lambda: output.cell_contents.add_(1e-3)

    for check in ("replay", "chunks"):
        assert run(getattr(smoke_on_cpu(Stale), check))
        assert not run(getattr(smoke_on_cpu(Wrong), check))
        assert f"{check:<10} FAILED" in capsys.readouterr().out


def test_surplus_tokens_that_reach_a_text_are_found(flash_on_cpu, capsys, monkeypatch):
    """Guards: padded passes that are compared with padded ones."""
    from optimal_sampling.engines.local.paged import page_runner

    real = page_runner.pad_chunks

    def wrong(numbers, shape, bucket):
        numbers, made = real(numbers, shape, bucket)
        if bucket.tokens:
            last = made.sizes[-1] - made.chunks  # keys of the rows
            numbers[-last:] -= 1
        return numbers, made

    monkeypatch.setattr(page_runner, "pad_chunks", wrong)
    assert not run(smoke_on_cpu().chunks)
    assert "a padded pass differs" in capsys.readouterr().out


@pytest.mark.parametrize("place", [0, 1])
def test_a_mixture_that_differs_is_found(flash_on_cpu, capsys, monkeypatch, place):
    """Guards: fields of the fused step that are compared with nothing."""
    import mixture_check

    real = mixture_check.fused_step

    def wrong(*arguments):
        fields = list(real(*arguments))
        fields[place] = fields[place] + 1
        return fields

    monkeypatch.setattr(mixture_check, "fused_step", wrong)
    passed, found, _ = outcomes(Smoke(TINY, CPU), capsys)
    assert not passed
    assert found[-1] == ("mixture", "FAILED")
