"""200 requests of mixed lengths, prompts and options under preemption, against the local engine."""

import contextlib
import itertools
import random
from collections import defaultdict
from dataclasses import replace

import numpy as np
import pytest

from optimal_sampling.config import LocalOptions, MixtureConfig, ModelConfig
from optimal_sampling.types import Request
from tests.engines.conformance import by_key
from tests.engines.vllm.tiny import STOP, Pair, all_rows, log_softmax

COUNT = 200
FREE = MixtureConfig(alpha_min=0.0)
MIXTURES = [
    replace(FREE, temperature=0.9),
    MixtureConfig(temperature=1.4),
    replace(FREE, alpha_method="fixed", fixed_alpha=0.2),
    replace(FREE, alpha_method="reverse_kl_symmetry", alpha_max=0.4),
    replace(FREE, alpha_method="schedule", schedule_tokens=8, schedule_end=0.1),
    replace(FREE, force_first_token=True, temperature=0.7),
    replace(FREE, teacher_support_top_k=5),
    MixtureConfig(alpha_method="veto", temperature=0.8),
    MixtureConfig(alpha_method="interleaved", interleaved_min_p=0.2),
    replace(FREE, top_k=6, top_p=0.9),
]
COMPARED = (
    "alpha",
    "clamped",
    "kl_student",
    "kl_teacher",
    "ess_student",
    "ess_teacher",
    "entropy",
    "log_q",
    "curvature",
)


def mixed_requests():
    """Prompts of 1 to 50 tokens, 1 to 40 new ones; every third has one prompt for both models."""
    random.seed(0)
    requests = []
    for i in range(COUNT):
        student = tuple(random.choices(range(1, 12), k=random.randint(1, 50)))
        teacher = (
            student if i % 3 == 0 else tuple(random.choices(range(1, 12), k=random.randint(1, 50)))
        )
        requests.append(Request(f"r{i}", 0, 7, student, teacher, random.randint(1, 40)))
    return requests


def serve_together(engine, requests):
    """All requests in vLLM at once, with different mixtures: (mixture, completion) of each."""
    added = {}
    for number, (request, mixture) in enumerate(
        zip(requests, itertools.cycle(MIXTURES), strict=False)
    ):
        view = engine.view(mixture)
        added[str(number)] = view, view._add(str(number), request)
    while engine.core.has_unfinished_requests():
        for output in engine.core.step():
            if output.finished:
                view, active = added.pop(output.request_id)
                rows, error = engine._take_traces([active.internal_id])[active.internal_id]
                yield view.mixture, view._completion(active, output.outputs[0], rows, error)


def local_traces(pair, served):
    """The local engine's completion of one token at every token that vLLM drew.

    It draws by its own noise, so it gets one request per prefix of each text: its diagnostics and
    its three rows of logits there do not depend on the token that it draws.
    """
    from optimal_sampling.engines.local.engine import LocalEngine

    models = ModelConfig(teacher=pair.teacher, student=pair.student, dtype="float32", device="cpu")
    options = LocalOptions(batch_size=64, kv_memory_gib=0.5)
    asked = defaultdict(list)
    for mixture, completion in served:
        request, tokens = completion.request, completion.token_ids
        for place in range(len(tokens)):
            prompts = [
                (*ids, *tokens[:place])
                for ids in (request.student_prompt_ids, request.teacher_prompt_ids)
            ]
            asked[at_place(mixture, place)].append(Request(request.id, place, 0, *prompts, 1))
    with LocalEngine.load(models, FREE, options, pair.vocabulary) as base:
        capture = frozenset({"student_logits", "teacher_logits", "log_q"})
        found = {}
        for mixture, requests in asked.items():
            found |= by_key(base.view(mixture, capture=capture).generate(requests))
    return found


def at_place(mixture, place):
    """The mixture that does to a first token what `mixture` does to the token at `place`."""
    if place and mixture.force_first_token:
        return replace(mixture, force_first_token=False)
    if mixture.alpha_method == "schedule":
        share = min(1.0, place / mixture.schedule_tokens)
        start, end = mixture.schedule_start, mixture.schedule_end
        return replace(mixture, alpha_method="fixed", fixed_alpha=start + (end - start) * share)
    return mixture


@pytest.mark.parametrize("draft_tokens", [0, 2])
def test_two_hundred_mixed_requests_under_preemption(folders, draft_tokens):
    """Guards: records of one request in another's after preemption, chunks and reordering."""
    pair = Pair(folders["student"], folders["teacher"])
    # 18 blocks of 32 tokens for 32 requests at once: they cannot all stay.
    settings = {"max_num_batched_tokens": 96, "num_gpu_blocks_override": 18}
    with contextlib.closing(pair.open(draft_tokens, 32, **settings)) as engine:
        preempted = count_preemptions(engine)
        served = list(serve_together(engine, mixed_requests()))
        assert preempted() > 10
    assert len({completion.request.id for _, completion in served}) == len(served) == COUNT
    local = local_traces(pair, served)
    for mixture, completion in served:
        assert completion.finish_reason in ("stop", "length"), completion.error
        assert len(completion.trace) == len(completion.token_ids)
        assert (completion.token_ids[-1] in STOP) == (completion.finish_reason == "stop")
        assert_like_local(completion, mixture, local)
        assert_like_transformers(pair, completion, mixture)


def assert_like_local(completion, mixture, local, limit=2e-5):
    """Every value of every token's record is the local engine's."""
    for place, token in enumerate(completion.token_ids):
        other = local[completion.request.id, place]
        wanted = {name: other.trace[name][0] for name in COMPARED}
        wanted["log_q"] = float(other.captured["log_q"][0][token])
        for role in ("student", "teacher"):
            row = other.captured[f"{role}_logits"][0].double().numpy()
            wanted[f"log_p_{role}"] = log_softmax(row / mixture.temperature)[token]
        given = {name: completion.trace[name][place] for name in wanted}
        assert given == pytest.approx(wanted, abs=limit, rel=limit, nan_ok=True), (
            completion.request.id,
            place,
        )


def assert_like_transformers(pair, completion, mixture, limit=2e-5):
    """log p of both models, by another implementation of them."""
    request, tokens = completion.request, completion.token_ids
    student = all_rows(pair.student, request.student_prompt_ids, tokens)
    teacher = all_rows(pair.teacher, request.teacher_prompt_ids, tokens)
    for role, rows in (("student", student), ("teacher", teacher)):
        wanted = [
            log_softmax(row / mixture.temperature)[token]
            for token, row in zip(tokens, rows, strict=True)
        ]
        assert np.array(completion.trace[f"log_p_{role}"]) == pytest.approx(wanted, abs=limit)


def count_preemptions(engine):
    """A function that tells how many requests were preempted since."""
    scheduler = engine.core.engine_core.engine_core.scheduler
    count = [0]
    preempt = scheduler._preempt_request

    def counted(*args, **kwargs):
        count[0] += 1
        return preempt(*args, **kwargs)

    scheduler._preempt_request = counted
    return lambda: count[0]
