"""Top tokens against a sort of the whole vocabulary in float64."""

from __future__ import annotations

import pytest
import torch

from optimal_sampling.config import MixtureConfig
from optimal_sampling.distribution import gumbel, keys_tensor, single_step, step, top_tokens

VOCABULARIES = (7, 300, 5000, 40_003)
MIXTURES = {
    "plain": MixtureConfig(),
    "temperature": MixtureConfig(temperature=0.7),
    "cold": MixtureConfig(temperature=0.001),
    "truncated": MixtureConfig(top_k=5, top_p=0.9),
    "student": MixtureConfig(alpha_method="fixed", fixed_alpha=0.0, alpha_min=0.0),
    "teacher": MixtureConfig(alpha_method="fixed", fixed_alpha=1.0),
}


def pair(vocab, masked):
    generator = torch.Generator().manual_seed(vocab)
    student = 3 * torch.randn(3, vocab, generator=generator)
    teacher = student + torch.randn(3, vocab, generator=generator)
    if masked:
        student[:, ::3] = teacher[:, 1::3] = -torch.inf
    return student, teacher


def drawn_of(student, teacher, mixture, **options):
    position = torch.arange(1, 4)
    noise = gumbel(keys_tensor([1, 2, 3]), position, student.shape[1])
    return step(student, teacher, noise, position, mixture, **options)


def expected(student, teacher, drawn, mixture):
    """log p of student, teacher and q over the whole vocabulary."""
    p, t = (x.double().div(mixture.temperature).log_softmax(-1) for x in (student, teacher))
    alpha = drawn.trace[:, :1].double()
    mixed = torch.where(alpha == 0, p, torch.where(alpha == 1, t, (1 - alpha) * p + alpha * t))
    return torch.stack([p, t, mixed.log_softmax(-1)], 1)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("mixture", MIXTURES.values(), ids=MIXTURES)
@pytest.mark.parametrize("vocab", VOCABULARIES)
def test_they_are_the_largest_of_all(vocab, mixture, masked):
    """Guards: a token that is missed in a block, another's log-probability, a wrong log Z."""
    student, teacher = pair(vocab, masked)
    drawn = drawn_of(student, teacher, mixture)
    ids, log_p = top_tokens((student, teacher), drawn, mixture, 20)
    wanted = expected(student, teacher, drawn, mixture)
    k = min(20, vocab)
    assert ids.shape == log_p.shape == (3, 3, k)
    assert (ids.dtype, log_p.dtype) == (torch.int32, torch.float32)
    values = wanted.topk(k).values
    # log p of -500 and less, in float32
    exact = {"atol": 2e-5 if mixture.temperature > 0.1 else 5e-4, "rtol": 1e-5}
    torch.testing.assert_close(log_p.double(), values, **exact)
    picked = wanted.gather(-1, ids.long())
    torch.testing.assert_close(picked, values, **exact)
    assert all(len(set(each)) == k for each in ids.flatten(0, 1).tolist())


def test_within_the_teachers_support():
    """Guards: soft targets of a q that nothing was drawn from."""
    mixture = MixtureConfig(teacher_support_top_k=4)
    student, teacher = pair(5000, masked=False)
    drawn = drawn_of(student, teacher, mixture, keep_log_q=True)
    ids, log_p = top_tokens((student, teacher), drawn, mixture, 6)
    assert log_p[:, 2].isfinite().sum(-1).tolist() == [4, 4, 4]
    assert log_p[:, :2].isfinite().all()
    torch.testing.assert_close(log_p[:, 2].exp().sum(-1), torch.ones(3))
    support = teacher.topk(4).indices
    for row in range(3):
        assert {*ids[row, 2, :4].tolist()} == {*support[row].tolist()}


def test_one_model_alone():
    """Guards: top tokens of a mixture where there is none."""
    student, _ = pair(300, masked=False)
    noise = gumbel(keys_tensor([1, 2, 3]), torch.arange(3), 300)
    drawn = single_step(student, noise, MixtureConfig(), "student")
    ids, log_p = top_tokens([student], drawn, MixtureConfig(), 3)
    assert ids.shape == (3, 1, 3)
    torch.testing.assert_close(log_p[:, 0], student.log_softmax(-1).topk(3).values)


def test_rows_do_not_depend_on_their_batch():
    """Guards: soft targets that change with the batch, and records that differ after a resume."""
    student, teacher = pair(40_003, masked=False)
    mixture = MixtureConfig()
    drawn = drawn_of(student, teacher, mixture)
    together = top_tokens((student, teacher), drawn, mixture, 20)
    position = torch.arange(1, 4)
    for row in range(3):
        part = slice(row, row + 1)
        noise = gumbel(keys_tensor([row + 1]), position[part], 40_003)
        alone = step(student[part], teacher[part], noise, position[part], mixture)
        single = top_tokens((student[part], teacher[part]), alone, mixture, 20)
        assert all(torch.equal(a[part], b) for a, b in zip(together, single, strict=True))
