"""Options that cannot be meant get an error that names them."""

from dataclasses import fields
from importlib import import_module

import pytest

from optimal_sampling.config import (
    ENGINES,
    LocalOptions,
    MixtureConfig,
    RunConfig,
    VllmOptions,
    engine_options,
)
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
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.5}, "top_p"),
        ({"top_k": 0}, "top_k"),
        ({"teacher_support_top_k": -2}, "teacher_support_top_k"),
        ({"trust_region": -1.0}, "trust_region"),
        ({"schedule_tokens": 0}, "schedule_tokens"),
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
        ConfigError, match="did you mean 'local'\\?; the engines are: local, vllm, toy"
    ):
        engine_options("locl")


def test_drafts_of_vllm():
    """Guards: a step of vLLM without room for the drafts of its requests."""
    assert VllmOptions().drafts_per_step == 0
    assert VllmOptions(8, prefill_chunk=16, draft_tokens=3).tokens_per_step == 32
