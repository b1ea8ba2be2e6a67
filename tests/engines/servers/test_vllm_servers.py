"""Two servers of vLLM with the shipped pair, as `optimal-sampling servers --start` starts them."""

import asyncio
import importlib.util

import numpy as np
import pytest
import torch

from optimal_sampling.config import (
    LocalOptions,
    MixtureConfig,
    ModelConfig,
    PromptConfig,
    ServersOptions,
)
from optimal_sampling.distribution import gumbel, keys_tensor
from optimal_sampling.distribution.naive import naive_step
from optimal_sampling.engines.servers.launch import ServersCommand, server_processes, started
from optimal_sampling.engines.servers.mixing import ListMixer, Place
from optimal_sampling.engines.servers.probe import check_tokenizers, scoring_times
from optimal_sampling.engines.servers.server_process import free_port
from optimal_sampling.prompts import PromptRenderer
from optimal_sampling.toy_pair.problems import synthetic_rows
from optimal_sampling.types import Request, prompt_id
from optimal_sampling.vocabulary import Vocabulary, resolve_model
from tests.engines.servers.serving import run, served

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="needs vLLM"),
    pytest.mark.filterwarnings("default"),
    pytest.mark.timeout(900),
]

SIZE = 264
NEAR_TIE = 1e-4
"""Difference of the two best noisy scores below which rounding may choose."""
PROMPTS = 50
TOKENS = 36


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


def requests_for(vocabulary, count):
    """Requests of the first synthetic problems."""
    renderer = PromptRenderer(PromptConfig(), vocabulary)
    rows = [renderer.render(row) for row in synthetic_rows(0, count)]
    return [
        Request(
            prompt_id(row.student_text, row.teacher_text),
            0,
            0,
            tuple(row.student_ids),
            tuple(row.teacher_ids),
            TOKENS,
        )
        for row in rows
    ]


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


def test_full_lists_are_those_of_the_local_engine(urls, local, asked):
    """Guards: padding ids, temperature or rounding that change a distribution."""
    prompt = list(asked[0].teacher_prompt_ids)
    logits = local_logits(local, "teacher", prompt)
    exact = logits - np.log(np.exp(logits - logits.max()).sum()) - logits.max()

    async def main():
        async with served(urls["teacher"], vocab_size=SIZE, deadline=60) as model:
            found = await model.next_tokens(prompt, 272)
            assert found.is_full
            assert len(found.ids) == SIZE
            np.testing.assert_allclose(found.log_p, exact[found.ids], rtol=0, atol=5e-5)

    run(main)


def local_logits(engine, role, ids):
    """Logits of the next token over the shared ids, by Transformers."""
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(
        resolve_model(f"toy-{role}"), dtype=torch.float32
    )
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0, -1, :SIZE].double().numpy()


def scored(models, request, tokens, top_k):
    """The lists of every position of a completion, by role."""

    async def main():
        calls = [
            models[role].score(request.prompt_ids(role), tokens[:-1], top_k)
            for role in ("student", "teacher")
        ]
        return await asyncio.gather(*calls)

    return main()


def margin(lists, request, place):
    """Difference of the two best noisy scores, by the naive mathematics."""
    rows = [each.log_p[each.ids.argsort()] for each in lists]
    noise = gumbel(keys_tensor([request.noise_key]), torch.tensor([place]), SIZE)[0].tolist()
    found = naive_step(*(row.tolist() for row in rows), noise, place, MixtureConfig())
    second, best = np.sort(np.array(found.log_drawn) + noise)[-2:]
    return best - second


def test_full_vocabulary_is_the_local_engine(engine, local, asked):
    """Guards: tokens that differ from those of the models in this process.

    At every token of the local engine's texts, so a near tie changes one token and not the rest.
    """
    mixer = ListMixer(MixtureConfig(), "mixture", SIZE)
    total, ties = 0, {}
    for completion in local.generate(asked):
        request, tokens = completion.request, completion.token_ids
        lists = engine.thread.run(scored(engine.models, request, tokens, SIZE + 8))
        for place, (token, *pair) in enumerate(zip(tokens, *lists, strict=True)):
            total += 1
            [drawn] = mixer.draw([Place(pair, request.noise_key, place)])
            if drawn.token != token:
                ties.setdefault(request.key, []).append(margin(pair, request, place))
    print(f"{total} tokens, near ties: {ties}")
    assert all(each <= NEAR_TIE for found in ties.values() for each in found)
    assert sum(map(len, ties.values())) <= total / 1000
    whole = {each.request.key: each.token_ids for each in local.generate(asked)}
    for completion in engine.generate(asked):
        assert not completion.error
        key = completion.request.key
        assert key in ties or completion.token_ids == whole[key]


@pytest.mark.parametrize(
    "texts", [pytest.param(4, id="quick"), pytest.param(160, marks=pytest.mark.slow, id="5000")]
)
def test_short_lists_stay_within_their_bound(engine, local, vocabulary, texts):
    """Guards: a bound on the total variation that a token of real models exceeds."""
    mixer = ListMixer(MixtureConfig(), "mixture", SIZE, {"teacher": SIZE + 8})
    found = {5: [], 20: []}
    for completion in local.generate(requests_for(vocabulary, texts)):
        request, tokens = completion.request, completion.token_ids
        full = engine.thread.run(scored(engine.models, request, tokens, SIZE + 8))
        for top_k, measured in found.items():
            short = engine.thread.run(scored(engine.models, request, tokens, top_k))
            for place in range(len(tokens)):
                pair = [[each[place] for each in lists] for lists in (full, short)]
                measured.append(total_variation(mixer, *pair, place))
    means = {}
    for top_k, measured in found.items():
        tv, bound = np.array(measured).T
        assert (tv <= bound + 1e-5).all()  # two requests differ by rounding
        seen = tv > 1e-3
        ratio = np.median(bound[seen] / tv[seen]) if seen.any() else np.nan
        print(
            f"top {top_k}: {len(tv)} tokens, TV mean {tv.mean():.2g} most {tv.max():.2g}, "
            f"bound mean {bound.mean():.2g} most {bound.max():.2g}; {seen.sum()} above 1e-3, "
            f"bound / TV there {ratio:.2g}"
        )
        assert seen.sum() < 20 or ratio <= 4
        means[top_k] = bound.mean()
    assert 10 * means[20] < means[5]


def total_variation(mixer, full, short, place):
    """(measured, bound) of the total variation of q of short lists to that of whole rows."""
    rows = [each.log_p[each.ids.argsort()].tolist() for each in full]
    exact = np.exp(naive_step(*rows, [0.0] * SIZE, place, MixtureConfig()).log_drawn)
    union = mixer.join(*([each] for each in short))
    mixed = mixer.solve(union, torch.tensor([place]))
    q, ids = np.zeros(SIZE), union.ids[:, 0]
    q[ids] = mixed.q[0, : len(ids)]
    return np.abs(q - exact).sum() / 2, mixed.bound[0]
