"""vLLM's V2 model runner, in a process of its own: vLLM settles once which runner it uses.

`VLLM_USE_V2_MODEL_RUNNER=1 make test-vllm` runs all tests on it, in the better part of an hour;
this is a part for every run.
"""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from optimal_sampling.config import MixtureConfig
from optimal_sampling.errors import ConfigError
from tests.engines.vllm.tiny import SECOND_RUNNER

ROOT = Path(__file__).resolve().parents[3]
EXACT = (
    "model_runner or every_token or drafts_change or every_method or truncation or teacher_alone "
    "or cached_prefixes or of_a_prompt"
)
RECORDS = (
    "(TestLockstep or TestThreeDrafts) and "
    "((answered_once and 64) or alpha_and_divergences or own_prompt)"
)


@pytest.mark.skipif(SECOND_RUNNER, reason="this run is on the second runner as a whole")
@pytest.mark.parametrize(("file", "chosen"), [("test_exact", EXACT), ("test_conformance", RECORDS)])
def test_a_part_of_these_tests_on_the_second_runner(file, chosen):
    """Guards: log-probabilities, options, prompts, drafts and traces of the V1 runner alone."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        f"tests/engines/vllm/{file}.py",
        "-k",
        chosen,
        "-q",
        "-p",
        "no:cacheprovider",
    ]
    environment = {**os.environ, "VLLM_USE_V2_MODEL_RUNNER": "1"}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=850
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-5000:]
    assert " passed" in done.stdout
    assert " skipped" not in done.stdout


def test_without_triton_it_is_refused(monkeypatch):
    """Guards: an error from somewhere inside vLLM."""
    from optimal_sampling.engines.vllm.engine_arguments import prepare_environment

    monkeypatch.setattr("vllm.triton_utils.HAS_TRITON", False)
    monkeypatch.setattr("vllm.envs.VLLM_USE_V2_MODEL_RUNNER", True, raising=False)
    with pytest.raises(ConfigError, match="unset VLLM_USE_V2_MODEL_RUNNER"):
        prepare_environment()


class Runner:
    """A model runner that keeps how it was called."""

    def __init__(self):
        self.model = SimpleNamespace(
            default=MixtureConfig(),
            expected=None,
            separate_forward=None,
            needs_student=lambda mode: mode == "mixture",
        )

    def get_model(self):
        return self.model

    def execute_model(self, scheduler_output, intermediate_tensors=None, dummy_run=False, **kwargs):
        self.without_graphs = kwargs.get("is_profile", False)
        if not dummy_run:
            self.prepare_inputs(scheduler_output)

    def prepare_inputs(self, scheduler_output):
        return SimpleNamespace(req_ids=list(scheduler_output.num_scheduled_tokens))


def output_of(requests):
    new = [
        SimpleNamespace(
            req_id=name,
            prompt_token_ids=[1, 2, 3],
            num_computed_tokens=0,
            sampling_params=SimpleNamespace(extra_args=extra, temperature=1.0),
        )
        for name, extra in requests.items()
    ]
    return SimpleNamespace(
        finished_req_ids=set(),
        scheduled_new_reqs=new,
        scheduled_cached_reqs=SimpleNamespace(req_ids=[], num_computed_tokens=[]),
        scheduled_spec_decode_tokens={},
        num_scheduled_tokens=dict.fromkeys(requests, 3),
    )


def test_graphs_are_left_out_where_the_models_see_other_tokens():
    """Guards: a CUDA graph of both models over the same tokens, replayed for two prompts."""
    from optimal_sampling.engines.vllm.request_options import STUDENT_IDS, RequestOptions
    from optimal_sampling.engines.vllm.runner_v2 import V2RunnerMixin

    alone = RequestOptions(mode="teacher").extra_args(MixtureConfig())
    for requests, apart in (
        ({"a": None, "b": {}}, False),
        ({"a": None, "b": {STUDENT_IDS: [1, 2]}}, True),
        ({"a": None, "b": alone}, False),
        ({"a": alone, "b": alone}, True),
    ):
        runner = type("Hooked", (V2RunnerMixin, Runner), {})()
        runner.init_mixture_state()
        runner.execute_model(output_of(requests))
        assert runner.without_graphs is apart
        assert (runner.model.separate_forward is not None) is apart
        runner.execute_model(None, dummy_run=True)
        assert runner.without_graphs is False
