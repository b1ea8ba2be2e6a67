"""Two servers of vLLM with the shipped pair, as `optimal-sampling servers --start` starts them."""

import importlib.util

import numpy as np
import pytest

from optimal_sampling.config import LocalOptions, MixtureConfig, ModelConfig, ServersOptions
from optimal_sampling.engines.servers.launch import ServersCommand, server_processes, started
from optimal_sampling.engines.servers.probe import check_tokenizers, scoring_times
from optimal_sampling.engines.servers.server_process import free_port
from optimal_sampling.vocabulary import Vocabulary
from tests.engines.servers.serving import run, served
from tests.engines.servers.shipped_pair import (
    SIZE,
    check_full_vocabulary,
    check_short_lists,
    exact_log_p,
    requests_for,
)

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="needs vLLM"),
    pytest.mark.filterwarnings("default"),
    pytest.mark.timeout(900),
]

PROMPTS = 50


@pytest.fixture(scope="module")
def urls(tmp_path_factory):
    """Addresses by role."""
    command = ServersCommand(
        student_port=free_port(),
        teacher_port=free_port(),
        max_logprobs=-1,
        log_dir=str(tmp_path_factory.mktemp("servers")),
    )
    processes = server_processes(command)
    with started(processes, 600, print):
        yield {process.name: process.url for process in processes}


@pytest.fixture(scope="module")
def vocabulary():
    return Vocabulary.load("toy-student", "toy-teacher")


@pytest.fixture(scope="module")
def asked(vocabulary):
    return requests_for(vocabulary, PROMPTS)


@pytest.fixture(scope="module")
def local(vocabulary):
    """The reference: both models in this process."""
    from optimal_sampling.engines.local.engine import LocalEngine

    models = ModelConfig(device="cpu", dtype="float32")
    with LocalEngine.load(models, MixtureConfig(), LocalOptions(), vocabulary) as engine:
        yield engine


@pytest.fixture(scope="module")
def engine(urls, vocabulary):
    from optimal_sampling.engines.servers.engine import ServersEngine

    options = ServersOptions(
        student_url=(urls["student"],), teacher_url=(urls["teacher"],), server_top_k=-1
    )
    with ServersEngine.load(ModelConfig(), MixtureConfig(), options, vocabulary) as engine:
        yield engine


def test_facts_of_vllm(urls):
    """Guards: a limit, an end token or an ability of vLLM's server that is not noticed."""

    async def main():
        async with (
            served(urls["student"], vocab_size=SIZE, deadline=60) as student,
            served(urls["teacher"], vocab_size=SIZE, deadline=60) as teacher,
        ):
            for role, model, rows in (("student", student, 264), ("teacher", teacher, 272)):
                facts = model.facts
                assert (facts.name, facts.kind) == (f"toy-{role}", "vllm")
                assert (facts.context_length, facts.stop_ids) == (4096, {257})
                assert (facts.max_top_k, facts.vocab_size) == (rows, rows)
                assert (facts.can_choose_ids, facts.can_draft) == (True, True)
            await check_tokenizers({"student": student, "teacher": teacher})

    run(main)


def test_three_ways_of_scoring_agree_and_are_measured(urls):
    """Guards: a way of scoring that is off by a position, and a choice without a measurement."""

    async def main():
        async with served(urls["teacher"], vocab_size=SIZE, deadline=60) as model:
            prefix = await model.tokenize("12+34=? 12+34=46. " * 6)
            lists = {}
            for way in ("prompts", "prompt_logprobs", "echo"):
                lists[way] = await model.score(prefix, [51, 52, 53], 20, way)
            for found in lists.values():
                for one, two in zip(found, lists["prompts"], strict=True):
                    assert one.ids[:5].tolist() == two.ids[:5].tolist()
                    np.testing.assert_allclose(one.log_p[:5], two.log_p[:5], rtol=0, atol=1e-3)
            times = await scoring_times(model._retried, model.dialect, prefix, 20)
            assert times.ways.keys() == lists.keys()
            return {
                (way, tokens): round(1e3 * seconds(tokens, 9), 1)
                for way, seconds in times.ways.items()
                for tokens in (16, 64, 128)
            }

    print("ms of 9 lists by way and length of the text:", run(main))


def test_full_lists_are_those_of_the_local_engine(urls, asked):
    """Guards: padding ids, temperature or rounding that change a distribution."""
    prompt = list(asked[0].teacher_prompt_ids)
    exact = exact_log_p("teacher", prompt)[-1]

    async def main():
        async with served(urls["teacher"], vocab_size=SIZE, deadline=60) as model:
            found = await model.next_tokens(prompt, 272)
            assert found.is_full
            assert len(found.ids) == SIZE
            np.testing.assert_allclose(found.log_p, exact[found.ids], rtol=0, atol=5e-5)

    run(main)


def test_full_vocabulary_is_the_local_engine(engine, local, asked):
    """Guards: tokens that differ from those of the models in this process."""
    check_full_vocabulary(engine, local, asked)


@pytest.mark.parametrize(
    "texts", [pytest.param(4, id="quick"), pytest.param(160, marks=pytest.mark.slow, id="5000")]
)
def test_short_lists_stay_within_their_bound(engine, local, vocabulary, texts):
    """Guards: a bound on the total variation that a token of real models exceeds."""
    check_short_lists(engine, local, requests_for(vocabulary, texts))
