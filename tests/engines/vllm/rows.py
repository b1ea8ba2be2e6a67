"""Every log-probability of an engine's completions, and what they have to be."""

import random

import numpy as np

from optimal_sampling.distribution.naive import naive_step

LIMIT = 1e-5  # largest error of a log-probability above e^-20


def full_rows(engine, mixture, student_ids, teacher_ids, new=4, mode="mixture"):
    """Tokens of one completion and, for each, vLLM's log-probability of every token id."""
    from vllm import SamplingParams

    from optimal_sampling.engines.vllm.request_options import RequestOptions

    ids = tuple(student_ids) if student_ids != teacher_ids else None
    extra = RequestOptions(mixture, mode, student_ids=ids).extra_args(engine.base)
    params = SamplingParams(
        temperature=mixture.temperature,
        top_k=mixture.top_k,
        top_p=mixture.top_p,
        max_tokens=new,
        logprobs=-1,
        ignore_eos=True,
        detokenize=False,
        extra_args=extra,
    )
    engine.core.add_request(
        f"full {random.random()}", {"prompt_token_ids": list(teacher_ids)}, params
    )
    while engine.core.has_unfinished_requests():
        for output in engine.core.step():
            if output.finished:
                done = output.outputs[0]
    width = engine.vocab_size
    rows = [
        [row[i].logprob if i in row else -np.inf for i in range(width)] for row in done.logprobs
    ]
    return list(done.token_ids), np.array(rows)


def expected_rows(pair, mixture, student_ids, teacher_ids, tokens):
    """The naive float64 mathematics on the reference's logits."""
    rows = []
    for place in range(len(tokens)):
        text = tokens[:place]
        logits = [
            pair.logits("student", [*student_ids, *text]),
            pair.logits("teacher", [*teacher_ids, *text]),
        ]
        noise = [0.0] * pair.size
        rows.append(naive_step(*(row.tolist() for row in logits), noise, place, mixture).log_drawn)
    return np.array(rows)


def assert_rows(given, wanted, limit=LIMIT):
    seen = wanted > -20
    assert np.abs(given[seen] - wanted[seen]).max() <= limit
    assert (given[~seen] < -19).all()
