"""The shipped pair behind two real servers, against the same models in this process."""

import asyncio

import numpy as np
import torch

from optimal_sampling.config import MixtureConfig, PromptConfig
from optimal_sampling.distribution import gumbel, keys_tensor
from optimal_sampling.distribution.naive import naive_step
from optimal_sampling.engines.servers.mixing import ListMixer, Place
from optimal_sampling.prompts import PromptRenderer
from optimal_sampling.toy_pair.problems import synthetic_rows
from optimal_sampling.types import Request, prompt_id
from optimal_sampling.vocabulary import resolve_model

__all__ = [
    "SIZE",
    "check_full_vocabulary",
    "check_short_lists",
    "exact_log_p",
    "requests_for",
]

SIZE = 264
NEAR_TIE = 1e-4
"""Difference of the two best noisy scores below which rounding may choose."""
TOKENS = 36


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


def exact_log_p(role, ids):
    """Log-probabilities of the shared ids after every token of a text, by Transformers."""
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(
        resolve_model(f"toy-{role}"), dtype=torch.float32
    )
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0, :, :SIZE]
    return torch.log_softmax(logits.double(), -1).numpy()


def check_full_vocabulary(engine, local, asked):
    """The tokens of whole lists are those of the local engine, near ties apart.

    At every token of the local engine's texts, so a near tie changes one token and not the rest.
    """
    mixer = ListMixer(MixtureConfig(), "mixture", SIZE)
    total, ties = 0, {}
    for completion in local.generate(asked):
        request, tokens = completion.request, completion.token_ids
        lists = engine.thread.run(_scored(engine.models, request, tokens, SIZE + 8))
        for place, (token, *pair) in enumerate(zip(tokens, *lists, strict=True)):
            total += 1
            [drawn] = mixer.draw([Place(pair, request.noise_key, place)])
            if drawn.token != token:
                ties.setdefault(request.key, []).append(_margin(pair, request, place))
    print(f"{total} tokens, near ties: {ties}")
    assert all(each <= NEAR_TIE for found in ties.values() for each in found)
    assert sum(map(len, ties.values())) <= total / 1000
    whole = {each.request.key: each.token_ids for each in local.generate(asked)}
    for completion in engine.generate(asked):
        assert not completion.error
        key = completion.request.key
        assert key in ties or completion.token_ids == whole[key]


def check_short_lists(engine, local, asked):
    """q of short lists is within its bound of q of whole ones, at every token."""
    mixer = ListMixer(MixtureConfig(), "mixture", SIZE, {"teacher": SIZE + 8})
    found = {5: [], 20: []}
    for completion in local.generate(asked):
        request, tokens = completion.request, completion.token_ids
        full = engine.thread.run(_scored(engine.models, request, tokens, SIZE + 8))
        for top_k, measured in found.items():
            short = engine.thread.run(_scored(engine.models, request, tokens, top_k))
            for place in range(len(tokens)):
                pair = [[each[place] for each in lists] for lists in (full, short)]
                measured.append(_total_variation(mixer, *pair, place))
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


def _scored(models, request, tokens, top_k):
    """The lists of every position of a completion, by role."""

    async def main():
        calls = [
            models[role].score(request.prompt_ids(role), tokens[:-1], top_k)
            for role in ("student", "teacher")
        ]
        return await asyncio.gather(*calls)

    return main()


def _margin(lists, request, place):
    """Difference of the two best noisy scores, by the naive mathematics."""
    rows = [each.log_p[each.ids.argsort()] for each in lists]
    noise = gumbel(keys_tensor([request.noise_key]), torch.tensor([place]), SIZE)[0].tolist()
    found = naive_step(*(row.tolist() for row in rows), noise, place, MixtureConfig())
    second, best = np.sort(np.array(found.log_drawn) + noise)[-2:]
    return best - second


def _total_variation(mixer, full, short, place):
    """(measured, bound) of the total variation of q of short lists to that of whole rows."""
    rows = [each.log_p[each.ids.argsort()].tolist() for each in full]
    exact = np.exp(naive_step(*rows, [0.0] * SIZE, place, MixtureConfig()).log_drawn)
    union = mixer.solver.join(*([each] for each in short))
    mixed = mixer.solver.solve(union, torch.tensor([place]))
    q, ids = np.zeros(SIZE), union.ids[:, 0]
    q[ids] = mixed.q[0, : len(ids)]
    return np.abs(q - exact).sum() / 2, mixed.bound[0]
