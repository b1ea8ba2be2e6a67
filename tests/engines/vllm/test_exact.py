"""Distributions against float32 Transformers: every token id, option and route of a request."""

import contextlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from optimal_sampling.config import MixtureConfig
from optimal_sampling.types import ALPHA_METHODS, UNBOUNDED_METHODS, Request
from tests.engines.vllm.rows import LIMIT, assert_rows, expected_rows, full_rows
from tests.engines.vllm.tiny import CONTEXT, SECOND_RUNNER, Pair, log_softmax


@pytest.fixture(scope="module")
def wide(folders):
    """V = 2048; 64 tokens per step, so that longer prompts come in chunks."""
    pair = Pair(folders["wide_student"], folders["wide_teacher"], 2048, 4096)
    settings = {"max_num_batched_tokens": 64, "max_num_seqs": 64, "max_logprobs": -1}
    with contextlib.closing(pair.open(0, 64, **settings)) as engine:
        yield pair, engine


@pytest.fixture(scope="module")
def drafted(folders):
    pair = Pair(folders["wide_student"], folders["wide_teacher"], 2048, 4096)
    with contextlib.closing(pair.open(3, 16, max_logprobs=-1)) as engine:
        yield pair, engine


def some_ids(count, seed):
    return torch.randint(1, 2048, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def test_notes_name_the_model_runner(wide):
    """Guards: tests of one runner that ran on the other."""
    assert wide[1].notes()["model_runner"] == ("second" if SECOND_RUNNER else "first")


LENGTHS = [(20, 20), (20, 7), (33, 33), (50, 12), (300, 40), (60, 3), (3, 60), (40, 300), (1, 129)]
"""Tokens of (teacher's, student's) prompt."""


@pytest.mark.parametrize("lengths", LENGTHS)
def test_every_token_of_every_prompt_length(wide, lengths):
    """Guards: positions, masks or blocks off by one where prompts differ or come in chunks."""
    pair, engine = wide
    mixture = MixtureConfig(alpha_min=0.0)
    teacher_ids = some_ids(lengths[0], 1)
    student_ids = teacher_ids if lengths == (20, 20) else some_ids(lengths[1], 2)
    tokens, rows = full_rows(engine, mixture, student_ids, teacher_ids)
    assert_rows(rows, expected_rows(pair, mixture, student_ids, teacher_ids, tokens))


DRAFTED = [
    *((lengths, MixtureConfig(alpha_min=0.0)) for lengths in ((20, 20), (50, 12), (12, 50))),
    *(((20, 12), MixtureConfig(alpha_method=method)) for method in UNBOUNDED_METHODS),
    ((12, 20), MixtureConfig(alpha_method="veto", top_k=3)),
]


@pytest.mark.parametrize(
    ("lengths", "mixture"), DRAFTED, ids=[f"{n} {m.alpha_method} {m.top_k}" for n, m in DRAFTED]
)
def test_drafts_change_no_distribution(drafted, lengths, mixture):
    """Guards: log-probabilities of the draft model or of another row for accepted drafts."""
    pair, engine = drafted
    teacher_ids = some_ids(lengths[0], 1)
    student_ids = teacher_ids if lengths == (20, 20) else some_ids(lengths[1], 2)
    tokens, rows = full_rows(engine, mixture, student_ids, teacher_ids, new=8)
    assert_rows(rows, expected_rows(pair, mixture, student_ids, teacher_ids, tokens))


MIXTURES = [
    *(
        MixtureConfig(alpha_method=method, alpha_min=0.0, schedule_tokens=3)
        for method in ALPHA_METHODS
        if method not in UNBOUNDED_METHODS
    ),
    *(MixtureConfig(alpha_method=method) for method in UNBOUNDED_METHODS),
    MixtureConfig(),
    MixtureConfig(alpha_min=0.1, alpha_max=0.3),
    MixtureConfig(temperature=0.6, alpha_min=0.0),
    MixtureConfig(temperature=1.7, alpha_min=0.0, force_first_token=True),
    MixtureConfig(teacher_support_top_k=40, alpha_min=0.0),
    MixtureConfig(teacher_support_top_p=0.8, temperature=0.8, alpha_min=0.0),
    MixtureConfig(alpha_method="fixed", fixed_alpha=0.0, alpha_min=0.0),
    MixtureConfig(alpha_method="veto", veto_min_p=0.02, temperature=0.8, force_first_token=True),
    MixtureConfig(alpha_method="interleaved", interleaved_min_p=0.05, temperature=0.8),
    MixtureConfig(alpha_method="interleaved", interleaved_top_k=3, teacher_support_top_k=9),
    MixtureConfig(alpha_method="arithmetic", arithmetic_weight=0.9, force_first_token=True),
    MixtureConfig(alpha_min=0.0, teacher_support_min_p=0.05),
]


@pytest.mark.parametrize(
    "mixture",
    MIXTURES,
    ids=lambda m: f"{m.alpha_method} {m.temperature} {m.alpha_min}-{m.alpha_max}",
)
def test_every_method_and_option(wide, mixture):
    """Guards: an option lost on the way to the worker, or a q* solved at another temperature."""
    pair, engine = wide
    # Entropy is flat around its largest, and trust_region is found to 1e-6 of a KL.
    limit = {"entropy": 1e-4, "trust_region": 1e-4}.get(mixture.alpha_method, LIMIT)
    ids, own = some_ids(12, 3), some_ids(9, 4)
    tokens, rows = full_rows(engine, mixture, own, ids)
    assert_rows(rows, expected_rows(pair, mixture, own, ids, tokens), limit)


@pytest.mark.parametrize(
    "truncation", [{"top_k": 5}, {"top_p": 0.7}, {"top_k": 30, "top_p": 0.9, "temperature": 0.8}]
)
def test_truncation_comes_after_mixing(wide, truncation):
    """Guards: top-k of the models in place of top-k of q*."""
    pair, engine = wide
    mixture = MixtureConfig(alpha_min=0.0, **truncation)
    ids = some_ids(12, 3)
    tokens, rows = full_rows(engine, mixture, ids, ids)
    assert_rows(rows, expected_rows(pair, mixture, ids, ids, tokens))


def test_the_teacher_alone(wide):
    """Guards: a student that still has a say; blocks without its part, found by another request."""
    pair, engine = wide
    ids = some_ids(150, 5)
    tokens, rows = full_rows(engine, MixtureConfig(temperature=0.7), ids, ids, mode="teacher")
    wanted = [
        log_softmax(pair.logits("teacher", [*ids, *tokens[:place]]) / 0.7)
        for place in range(len(tokens))
    ]
    assert_rows(rows, np.array(wanted))
    tokens, rows = full_rows(engine, MixtureConfig(), ids, ids)
    assert_rows(rows, expected_rows(pair, MixtureConfig(), ids, ids, tokens))


def test_cached_prefixes_hold_both_models(wide):
    """Guards: a cached block that another request filled with another student prompt."""
    pair, engine = wide
    ids, own = some_ids(130, 6), some_ids(100, 7)
    mixture = MixtureConfig(alpha_min=0.0)
    for student_ids in (ids, own, ids, own, some_ids(170, 8), ids):
        tokens, rows = full_rows(engine, mixture, student_ids, ids)
        assert_rows(rows, expected_rows(pair, mixture, student_ids, ids, tokens))


def test_log_probabilities_of_a_prompt(wide):
    """Guards: rows of a prompt taken for rows of the step's next tokens."""
    from vllm import SamplingParams

    pair, engine = wide
    ids = some_ids(20, 9)
    engine.core.add_request(
        "p",
        {"prompt_token_ids": ids},
        SamplingParams(max_tokens=2, prompt_logprobs=1, detokenize=False),
    )
    done = []
    while engine.core.has_unfinished_requests():
        done += [output for output in engine.core.step() if output.finished]
    for place in range(1, len(ids)):
        wanted = expected_rows(pair, MixtureConfig(), ids[:place], ids[:place], [0])[0][ids[place]]
        assert done[0].prompt_logprobs[place][ids[place]].logprob == pytest.approx(
            wanted, abs=LIMIT
        )


def test_nan_ends_a_completion_and_names_the_model(folders, tmp_path):
    """Guards: tokens drawn from NaN."""
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "broken"
    folder.mkdir()
    for name in ("config.json", "generation_config.json"):
        (folder / name).write_text((Path(folders["student"]) / name).read_text())
    weights = load_file(f"{folders['student']}/model.safetensors")
    weights["model.norm.weight"][:] = float("nan")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with contextlib.closing(Pair(str(folder), folders["teacher"]).open(0, 4)) as engine:
        [done] = engine.generate([Request("a", 0, 0, (1, 2), (1, 2), 5)])
    assert done.finish_reason == "error"
    assert "student" in done.error
    assert done.token_ids == ()


@pytest.mark.parametrize("kinds", [("llama", "teacher"), ("student", "gpt2")])
def test_other_architectures(folders, kinds):
    """Guards: what only fits one family: learned positions, another number of heads."""
    pair = Pair(folders[kinds[0]], folders[kinds[1]])
    mixture = MixtureConfig(alpha_min=0.0)
    with contextlib.closing(pair.open(0, 4, max_logprobs=-1)) as engine:
        for student_ids, teacher_ids in (
            ([1, 2, 3], [1, 2, 3]),
            ([5], [6, 7, 8]),
            ([3] * 40, [2] * 5),
        ):
            tokens, rows = full_rows(engine, mixture, student_ids, teacher_ids)
            assert_rows(rows, expected_rows(pair, mixture, student_ids, teacher_ids, tokens))


def test_context_of_the_longer_prompt(folders):
    """Guards: blocks or positions beyond the context where the student's prompt is longer."""
    with contextlib.closing(Pair(folders["student"], folders["teacher"]).open(0, 4)) as engine:
        [done] = engine.generate([Request("a", 0, 0, tuple([1] * (CONTEXT - 2)), (1, 2), 50)])
        assert done.finish_reason in ("stop", "length")
        assert len(done.token_ids) <= 2


def test_compiled_models(folders):
    """Guards: a compiled graph of one model used for the other, or of the first batch's lengths."""
    pair = Pair(folders["wide_student"], folders["wide_teacher"], 2048, 4096)
    mixture = MixtureConfig(alpha_min=0.0)
    settings = {"enforce_eager": False, "max_num_batched_tokens": 64, "max_logprobs": -1}
    with contextlib.closing(pair.open(0, 16, **settings)) as engine:
        for lengths in ((20, 20), (50, 12), (3, 90)):
            teacher_ids = some_ids(lengths[0], 1)
            student_ids = teacher_ids if lengths == (20, 20) else some_ids(lengths[1], 2)
            tokens, rows = full_rows(engine, mixture, student_ids, teacher_ids)
            assert_rows(rows, expected_rows(pair, mixture, student_ids, teacher_ids, tokens))


def test_options_survive_the_way_through_json():
    """Guards: a field that is written and not read back."""
    from optimal_sampling.engines.vllm.request_options import RequestOptions

    base = MixtureConfig()
    for mixture in MIXTURES:
        extra = json.loads(json.dumps(RequestOptions(mixture, student_ids=(1, 2)).extra_args(base)))
        assert RequestOptions.read(extra, mixture.temperature, base).mixture == mixture
