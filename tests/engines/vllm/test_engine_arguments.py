"""Arguments for vLLM that depend on the machine: drafts and threads."""

import os

import pytest
from vllm import envs
from vllm.v1.spec_decode.dynamic.utils import build_dynamic_sd_schedule_lookup

from optimal_sampling.config import MixtureConfig, ModelConfig, VllmOptions
from optimal_sampling.engines.vllm.cpu_threads import choose_threads, idle_threads
from optimal_sampling.engines.vllm.engine_arguments import engine_arguments
from optimal_sampling.vocabulary import Vocabulary

VOCABULARY = Vocabulary(size=264, stop_ids=frozenset({0}))


def arguments(options, full_batches=True, **models):
    models = ModelConfig(**models)
    given = (MixtureConfig(), options, VOCABULARY, options.settings)
    return engine_arguments(models, *given, full_batches=full_batches)


@pytest.mark.parametrize(
    ("options", "models", "drafts"),
    [
        (VllmOptions(batch_size=4), {}, 5),
        (VllmOptions(batch_size=5), {}, 0),
        (VllmOptions(batch_size=1, draft_tokens=0), {}, 0),
        (VllmOptions(batch_size=64, draft_tokens=2), {}, 2),
        (VllmOptions(batch_size=1), {"student": "toy-teacher"}, 0),
        (VllmOptions(batch_size=1, tensor_parallel_size=3), {}, 0),
    ],
)
def test_auto_drafts_only_where_they_pay(options, models, drafts):
    """Guards: drafts at batches where they are slower, of a student that is no smaller."""
    found = arguments(options, **models)
    assert found.get("speculative_config", {}).get("num_speculative_tokens", 0) == drafts
    assert found["max_num_batched_tokens"] >= options.batch_size * (drafts + 1)


@pytest.mark.parametrize(("batch_size", "switches"), [(4, False), (6, True)])
def test_auto_drafts_of_a_server_depend_on_the_batch(batch_size, switches):
    """Guards: drafts in steps of many requests; none for a client that is alone."""
    if envs.VLLM_USE_V2_MODEL_RUNNER:
        pytest.skip("the second runner drafts in every step")
    found = arguments(VllmOptions(batch_size=batch_size), full_batches=False)
    speculation = found["speculative_config"]
    assert speculation["num_speculative_tokens"] == 5
    schedule = speculation.get("num_speculative_tokens_per_batch_size")
    assert (schedule is not None) == switches
    if switches:
        assert build_dynamic_sd_schedule_lookup(schedule, batch_size, 5) == [0, 5, 5, 5, 5, 0, 0]
    fixed = arguments(VllmOptions(batch_size=6, draft_tokens=5), full_batches=False)
    assert "num_speculative_tokens_per_batch_size" not in fixed["speculative_config"]


def test_options_of_the_command_line_reach_vllm():
    """Guards: an option that is read and lost."""
    options = VllmOptions(
        max_model_len=64,
        tensor_parallel_size=2,
        vllm=("block_size=32", "--seed=5", 'compilation-config={"mode": 0}', "tokenizer_mode=slow"),
    )
    found = arguments(options)
    expected = {
        "max_model_len": 64,
        "tensor_parallel_size": 2,
        "block_size": 32,
        "seed": 5,
        "compilation_config": {"mode": 0},
        "tokenizer_mode": "slow",
    }
    assert expected.items() <= found.items()


@pytest.mark.parametrize(
    ("cores", "busy", "devices", "threads"),
    [(8, 3, 1, 5), (8, 3, 2, 2), (2, 2, 1, 1), (4, 4, 8, 1)],
)
def test_threads_on_a_busy_machine(cores, busy, devices, threads):
    """Guards: threads that wait for cores which others use."""
    assert idle_threads(cores, busy, devices) == threads


def test_a_number_of_threads_in_the_environment_is_kept(monkeypatch):
    """Guards: a user's own setting that is overridden."""
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert choose_threads(1) == ""
    assert os.environ["OMP_NUM_THREADS"] == "3"
