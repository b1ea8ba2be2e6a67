"""Options that cannot be meant get an error that names them."""

import json
from dataclasses import asdict, fields, replace
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest

from optimal_sampling.config import (
    ENGINES,
    DataConfig,
    GenerateConfig,
    LocalOptions,
    MixtureConfig,
    ModelConfig,
    RunConfig,
    VllmOptions,
    engine_options,
)
from optimal_sampling.demo import DemoOptions
from optimal_sampling.errors import ConfigError


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha_method": "nonsense"}, "kl_symmetry, reverse_kl_symmetry"),
        ({"alpha_min": -0.1}, "alpha_min"),
        ({"alpha_max": 1.1}, "alpha_max"),
        ({"alpha_min": 0.9, "alpha_max": 0.2}, "larger than alpha_max"),
        ({"alpha_method": "fixed", "fixed_alpha": 0.3}, "clamped at every token"),
        ({"temperature": 0.0}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"temperature": float("inf")}, "temperature"),
        ({"temperature": 9e-4}, "at least 0.001, got 0.0009.*use --top-k 1"),
        ({"temperature": 1e-40}, "use --top-k 1"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.5}, "top_p"),
        ({"top_k": 0}, "top_k"),
        ({"teacher_support_top_k": -2}, "teacher_support_top_k"),
        ({"trust_region": -1.0}, "trust_region"),
        ({"schedule_tokens": 0}, "schedule_tokens"),
        ({"veto_min_p": 0.0}, "veto_min_p must lie in"),
        ({"interleaved_min_p": 1.5}, "interleaved_min_p must lie in"),
        ({"teacher_support_min_p": 0.0}, "teacher_support_min_p must lie in"),
        ({"interleaved_top_k": 0}, "interleaved_top_k"),
        ({"arithmetic_weight": 1.1}, "arithmetic_weight"),
        ({"alpha_method": "veto", "alpha_min": 0.0}, "alpha_min .0.0. does nothing .* veto"),
        ({"alpha_method": "interleaved", "alpha_max": 0.9}, "which has no bounds; leave alpha_max"),
        ({"alpha_method": "arithmetic", "alpha_min": 0.2}, "leave alpha_min out"),
    ],
)
def test_mixtures_that_make_no_sense(options, message):
    """Guards: a value that is clamped, ignored or divides by zero in the middle of a run."""
    with pytest.raises(ConfigError, match=message):
        MixtureConfig(**options)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (LocalOptions, {"batch_size": 0}),
        (LocalOptions, {"prefill_chunk": 0}),
        (LocalOptions, {"kv_memory_gib": 0.0}),
        (LocalOptions, {"draft_tokens": -1}),
        (RunConfig, {"max_new_tokens": 0}),
        (RunConfig, {"max_attempts": 0}),
        (RunConfig, {"output_dir": ""}),
    ],
)
def test_runs_that_make_no_sense(kind, options):
    """Guards: an empty run that looks like a finished one."""
    with pytest.raises(ConfigError, match=next(iter(options))):
        kind(**options)


def test_every_engine_of_the_list_can_be_imported():
    """Guards: an engine whose name or class is misspelt in its options."""
    for name, options in ENGINES.items():
        assert options.name == name
        module, engine = options.engine_class.split(":")
        assert hasattr(import_module(module), engine)
        assert options.fixed <= {item.name for item in fields(options)}


def test_an_unknown_engine_lists_the_engines():
    """Guards: a KeyError for a misspelt engine."""
    with pytest.raises(
        ConfigError, match="did you mean 'local'\\?; the engines are: local, vllm, servers, toy"
    ):
        engine_options("locl")


def test_drafts_of_vllm():
    """Guards: a step of vLLM without room for the drafts of its requests."""
    assert VllmOptions().drafts_per_step == 0
    assert VllmOptions(8, prefill_chunk=16, draft_tokens=3).tokens_per_step == 32


def test_values_of_other_types_are_refused_or_mean_the_same():
    """Guards: a TypeError out of a comparison, and a NumPy number that JSON cannot hold."""
    for value in (None, "3", True, 2.5, [3]):
        with pytest.raises(ConfigError, match="top_k must be a whole number, got"):
            MixtureConfig(top_k=value)
    mixture = MixtureConfig(top_k=np.int64(3), temperature=np.float32(0.5), alpha_min=0)
    assert mixture == MixtureConfig(top_k=3, temperature=0.5, alpha_min=0.0)
    assert json.dumps(asdict(mixture)) == json.dumps(asdict(replace(mixture)))
    assert type(mixture.alpha_min) is float
    assert MixtureConfig(force_first_token=np.bool_(True)).force_first_token is True
    assert RunConfig(output_dir=Path("run")).output_dir == "run"
    assert DataConfig(num_examples=None).num_examples is None
    with pytest.raises(ConfigError, match="samples_per_prompt must be a whole number, got None"):
        DataConfig(samples_per_prompt=None)
    with pytest.raises(ConfigError, match="dtype must be one of auto, float32, bfloat16, float16"):
        ModelConfig(dtype="float8")
    with pytest.raises(ConfigError, match="draft_tokens must be a whole number or one of auto"):
        LocalOptions(draft_tokens="some")
    with pytest.raises(ConfigError, match="run must be of the class RunConfig, got"):
        GenerateConfig(run={})


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        (RunConfig, "output_dir"),
        (DataConfig, "dataset"),
        (ModelConfig, "teacher"),
        (ModelConfig, "student"),
    ],
)
@pytest.mark.parametrize("value", ["a\0b", ""])
def test_a_path_that_no_system_takes(kind, name, value):
    """Guards: `ValueError: embedded null byte` out of the first file that is looked for."""
    with pytest.raises(ConfigError, match=f"{name} must be a name without NUL characters"):
        kind(**{name: value})


def test_home_folders_are_expanded(monkeypatch):
    """Guards: a run in a folder named `~`, made by `--output-dir=~/run`."""
    monkeypatch.setenv("HOME", "/home/her")
    assert RunConfig(output_dir="~/run").output_dir == "/home/her/run"
    assert DemoOptions(output_dir="~/demo").generate_config().run.output_dir == "/home/her/demo"
