"""Fleets by the command, by the script of older documents, and from Python."""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import warnings

import pytest

from optimal_sampling import OptimalSamplingModel
from optimal_sampling.errors import ConfigError
from tests.engines.fleet.conftest import ROOT
from tests.generate.test_kill import lines


@pytest.mark.timeout(120)
def test_the_script_of_older_documents(tmp_path):
    """Guards: flags that the documents show and the command refuses."""
    command = [sys.executable, str(ROOT / "scripts" / "generate_data_multigpu.py")]
    command += ["--model_teacher", "toy-teacher", "--model_theta", "toy-student"]
    command += ["--dataset", "synthetic", "--max_tokens", "8", "--output_dir", str(tmp_path)]
    command += ["--resume", "--data_slice", "0::8", "--engine", "toy", "--workers", "2"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(lines(tmp_path)) == 13
    assert "workers: 2 (2 on CPU, 1 thread)" in done.stderr
    for name in ("worker 0", "worker 1"):
        assert re.search(rf"^  {name}: CPU, 1 thread, \w+, \d+ in flight", done.stderr, re.M)
    assert not list(tmp_path.glob("workers*.json"))


@pytest.mark.timeout(120)
def test_the_class_with_workers(tmp_path, monkeypatch):
    """Guards: other texts, diagnostics or logits than those of one engine; files left behind."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    prompts = ["61*8=?", "87*2+74=?", "11*4+46+54+11=?"]
    models = {"model_theta_path": "toy-student", "model_t_path": "toy-teacher"}
    options = {**models, "device": "cpu", "enable_chat_template": True}
    outputs = []
    for workers in (None, 2):
        with OptimalSamplingModel(workers=workers, **options) as model:
            outputs.append(model.generate(prompts, max_new_tokens=20, return_logits=True))
        assert not [*tmp_path.glob("fleet-*")]
    one, two = outputs
    assert one.generated_texts == two.generated_texts
    assert one.alpha_values.nan_to_num().equal(two.alpha_values.nan_to_num())
    assert one.logits["t"].nan_to_num().equal(two.logits["t"].nan_to_num())


def test_loader_options_do_not_reach_workers():
    """Guards: a quantisation that is silently dropped."""
    with warnings.catch_warnings(), pytest.raises(ConfigError, match="quantization_config cannot"):
        OptimalSamplingModel("toy-student", workers=2, device="cpu", quantization_config=object())
