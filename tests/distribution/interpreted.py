"""The fused kernel on a CPU, in Triton's interpreter.

`test_fused.py` runs this file in a process of its own.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from scipy import stats
from triton.runtime import interpreter

from optimal_sampling.config import MixtureConfig
from optimal_sampling.distribution import (
    Drawn,
    NoiseKeys,
    draft,
    keys_tensor,
    noise,
    step,
)
from optimal_sampling.distribution.gpu import launch, programs
from optimal_sampling.distribution.naive import naive_step, prepare, slope
from optimal_sampling.types import TRACE_FIELDS

INF = math.inf
METHODS = ("kl_symmetry", "mirror", "reverse_kl_symmetry", "ess_balance", "fixed", "schedule")


SMALL = launch.Sizes(512, 256)
"""Several pieces of several tiles in a row of 1000 already."""


@pytest.fixture(autouse=True)
def prepared_once(monkeypatch):
    """The interpreter prepares triton.language anew for every inner call: most of its time."""
    prepared = set()

    def prepare_once(self, *arguments, **options):
        if self.fn.__module__ not in prepared:
            prepared.add(self.fn.__module__)
            interpreter._patch_lang(self.fn)
        return self.rewrite()(*arguments, **options)

    monkeypatch.setattr(interpreter.InterpretedFunction, "__call__", prepare_once)


@np.errstate(all="ignore")
def fused_step(student, teacher, noise, position, mixture, sizes=SMALL) -> Drawn:
    return Drawn(*launch.fused_step(student, teacher, noise, position, mixture, sizes))


def batch(rows, vocab, seed=0, spread=3.0, apart=1.5):
    g = torch.Generator().manual_seed(seed)
    student = torch.randn(rows, vocab, generator=g) * spread
    teacher = student + torch.randn(rows, vocab, generator=g) * apart
    return student, teacher, NoiseKeys(keys_tensor(range(rows)), torch.arange(rows))


def spoil(student, teacher):
    """A hole in one support, in the other, many in both; supports that do not meet; rows that are
    no distribution.
    """
    vocab = student.shape[1]
    ids = torch.arange(vocab)
    student[1, vocab // 2], teacher[2, vocab // 2] = -INF, -INF
    student[3, (ids % 3 == 1)], teacher[3, (ids % 4 == 1)] = -INF, -INF
    student[4, ids % 2 == 0], teacher[4, ids % 2 == 1] = -INF, -INF
    student[5, vocab // 2], teacher[6, -1], student[7], teacher[7] = math.nan, INF, -INF, -INF


def check(got: Drawn, want: Drawn, scale=1.0):
    assert torch.equal(got.token, want.token)
    assert torch.equal(got.bad_student, want.bad_student)
    assert torch.equal(got.bad_teacher, want.bad_teacher)
    torch.testing.assert_close(got.trace, want.trace, rtol=2e-5, atol=2e-5 * scale, equal_nan=True)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("vocab", [1, 2, 63, 64, 65, 1000])
def test_equals_pytorch(vocab, method):
    """Guards: any difference from the path that the oracle's tests check, in supports, bad rows,
    tiles or dtypes.
    """
    dtype = (torch.float32, torch.bfloat16, torch.float16)[(vocab + len(method)) % 3]
    student, teacher, keys = batch(9, vocab, seed=vocab + 1)
    if vocab > 1:
        spoil(student, teacher)
    student, teacher = student.to(dtype), teacher.to(dtype)
    bounds = ((0.0, 1.0), (0.5, 1.0), (0.2, 0.45))[(vocab + METHODS.index(method)) % 3]
    mixture = MixtureConfig(
        alpha_method=method, alpha_min=bounds[0], alpha_max=bounds[1], fixed_alpha=bounds[0],
        schedule_tokens=6, temperature=0.7 if vocab % 2 else 1.0, force_first_token=vocab > 64,
    )  # fmt: skip
    want = step(student, teacher, keys, keys.position, mixture)
    check(fused_step(student, teacher, keys, keys.position, mixture), want)


SUPPORTS = {
    "veto": MixtureConfig(alpha_method="veto"),
    "veto, likeliest": MixtureConfig(alpha_method="veto", top_k=1, temperature=0.7),
    "likeliest": MixtureConfig(top_k=1),
    "root": MixtureConfig(teacher_support_min_p=0.05, alpha_min=0.0),
    "closed form": MixtureConfig(
        teacher_support_min_p=0.01, alpha_method="reverse_kl_symmetry", force_first_token=True
    ),
    "one token": MixtureConfig(teacher_support_min_p=1.0, alpha_method="ess_balance"),
}


@pytest.mark.parametrize("vocab", [63, 1000])
@pytest.mark.parametrize("mixture", SUPPORTS.values(), ids=SUPPORTS)
def test_supports_and_likeliest_tokens_equal_pytorch(vocab, mixture):
    """Guards: a support cut at another logit or in one of the programs only, its mass, and a greedy
    run that draws.
    """
    assert launch.covers(mixture)
    student, teacher, keys = batch(9, vocab, seed=vocab)
    spoil(student, teacher)
    student[8, teacher[8] > teacher[8].max() - 5] = -INF  # nothing of the support is left
    want = step(student, teacher, keys, keys.position, mixture)
    check(fused_step(student, teacher, keys, keys.position, mixture), want)


def test_alpha_keeps_the_contract():
    """Guards: a root that is not one, on rows that differ by 1e-3 up to 1e4. |F'| <= 1e-6 max(1,
    F''), or to 1e-6.
    """
    g = torch.Generator().manual_seed(3)
    scales = torch.logspace(-3, 4, 36)[:, None]
    student = torch.randn(36, 7, generator=g) * scales
    teacher = torch.randn(36, 7, generator=g) * scales[torch.randperm(36, generator=g)]
    mixture = MixtureConfig(alpha_min=0.0)
    position = torch.arange(36)
    result = fused_step(
        student, teacher, NoiseKeys(keys_tensor(range(36)), position), position, mixture
    )
    for row in range(36):
        s, t = prepare(student[row].tolist(), teacher[row].tolist(), mixture)
        alpha = result.trace[row, 0].item()
        largest = max(abs(x) for x in s + t)
        slack = 1e-6 * max(1.0, largest)  # what float32 carries
        assert slope(s, t, max(alpha - 2e-6, 1e-9)) <= slack
        assert slope(s, t, min(alpha + 2e-6, 1 - 1e-9)) >= -slack
        want = naive_step(
            student[row].tolist(), teacher[row].tolist(), [0.0] * 7, row, mixture, alpha=alpha
        ).trace
        slack = (
            2e-5 + 6e-8 * largest * largest
        )  # a weight is known to one float32 step of its logit, and moves d
        for name in ("kl_student", "kl_teacher", "ess_student", "ess_teacher", "entropy"):
            assert abs(result.trace[row, TRACE_FIELDS.index(name)] - want[name]) <= slack, name


def test_extreme_rows():
    """Guards: underflow between models that agree on nothing, division by no variance, and masks of
    finite numbers.
    """
    student, teacher, keys = batch(7, 70)
    student[0], teacher[0] = 0.0, 0.0
    student[1], teacher[1] = 1e4, -1e4
    student[2], teacher[2] = -1e4, -1e4
    student[2, 3], teacher[2, 5] = 1e4, 1e4
    student[3], teacher[3] = -INF, -INF
    student[3, 4] = teacher[3, 4] = 0.0
    teacher[4] = student[4]
    student[5, ::2], teacher[5, ::3] = (
        torch.finfo(torch.float32).min,
        torch.finfo(torch.float32).min,
    )
    student[6] += 300
    for method in METHODS:
        mixture = MixtureConfig(alpha_method=method, alpha_min=0.0)
        got = fused_step(student, teacher, keys, keys.position, mixture)
        assert not got.trace.isnan().any()
        check(got, step(student, teacher, keys, keys.position, mixture), scale=100.0)


def test_bits_of_a_row_are_its_own():
    """Guards: sums that depend on the batch, on a stride, on surplus columns or on the dtype of the
    positions.
    """
    student, teacher, keys = batch(4, 700)
    mixture = MixtureConfig(alpha_min=0.1)
    whole = fused_step(student, teacher, keys, keys.position, mixture).pack()
    wide = torch.cat([student, torch.full((4, 9), 99.0)], 1)[:, :700]
    apart = teacher.T.contiguous().T
    again = fused_step(wide, apart, keys, keys.position.to(torch.int32), mixture)
    assert torch.equal(again.pack(), whole)
    assert torch.equal(
        fused_step(student[2:3], teacher[2:3], keys[2:3], keys.position[2:3], mixture).pack(),
        whole[2:3],
    )


def test_default_pieces():
    """Guards: sizes that no other test here uses, and pieces beyond the first."""
    student, teacher, keys = batch(1, 20_000)
    mixture = MixtureConfig(alpha_min=0.0)
    got = fused_step(student, teacher, keys, keys.position, mixture, launch.SIZES)
    check(got, step(student, teacher, keys, keys.position, mixture))


@pytest.mark.parametrize("passes", [0, 1, 6])
def test_passes_side_by_side_change_nothing(passes):
    """Guards: a search that loses its bracket between two launches, or goes on after its end."""
    student, teacher, keys = batch(9, 300, seed=5, spread=6.0, apart=4.0)
    spoil(student, teacher)
    mixture = MixtureConfig(alpha_min=0.0)
    sizes = SMALL._replace(passes=passes)
    got = fused_step(student, teacher, keys, keys.position, mixture, sizes)
    check(got, step(student, teacher, keys, keys.position, mixture))


def test_no_rows():
    """Guards: a launch of nothing."""
    student, teacher, keys = batch(0, 9)
    assert fused_step(student, teacher, keys, keys.position, MixtureConfig()).pack().shape == (
        0,
        3 + len(TRACE_FIELDS),
    )
    assert launch.fused_draft(student, keys, 1.0).shape == (0,)


@triton.jit
def noise_of_a_row(table, keys, position, hashes, values, vocab, BLOCK: tl.constexpr):
    ids = tl.arange(0, BLOCK)
    inside = ids < vocab
    a, b = programs._words(keys, position)
    tl.store(
        hashes + ids, programs._hash(tl.load(table + ids, mask=inside, other=0), a, b), mask=inside
    )
    tl.store(values + ids, programs._gumbel(table, ids, inside, a, b, True), mask=inside)


def test_noise_is_that_of_every_other_device():
    """Guards: another hash, with which a run on a GPU draws other tokens, and logarithms that lose
    the tail.
    """
    vocab, cpu = 3000, torch.device("cpu")
    table = noise.scrambled_ids(vocab, cpu)
    for key, place in ((0, 0), (2**64 - 1, 7), (0x0123456789ABCDEF, 2**31)):
        keys, position = keys_tensor([key]), torch.tensor([place])
        hashes, values = torch.empty(vocab, dtype=torch.int32), torch.empty(vocab)
        noise_of_a_row[1,](table, keys, position, hashes, values, vocab, BLOCK=4096)
        a, b = noise._words(keys, position)
        assert torch.equal(hashes, torch.from_numpy(noise._hash(table.numpy(), a, b, cpu)))
        torch.testing.assert_close(
            values[None], noise.gumbel(keys, position, vocab), rtol=1e-6, atol=1e-6
        )


def test_noise_given_is_noise_made():
    """Guards: a tensor of noise that is read in another order than noise is made."""
    student, teacher, keys = batch(4, 600)
    made = noise.noise_tensor(keys, 600)
    mixture = MixtureConfig()
    from_keys = fused_step(student, teacher, keys, keys.position, mixture).pack()
    assert torch.equal(fused_step(student, teacher, made, keys.position, mixture).pack(), from_keys)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_drafts(dtype):
    """Guards: drafts of another noise, temperature or support than `step` has."""
    student, _, keys = batch(5, 1100)
    student[1, ::2] = -INF
    student, mixture = student.to(dtype), MixtureConfig(temperature=0.7)
    for some in (keys, noise.noise_tensor(keys, 1100)):
        token = launch.fused_draft(student, some, 0.7, SMALL)
        assert torch.equal(token, draft(student, keys, mixture))
    token = launch.fused_draft(student, keys, 0.7, SMALL, greedy=True)
    assert torch.equal(token, student.float().argmax(-1))


def test_draws_follow_q_and_would_not_follow_the_teacher():
    """Guards: a biased draw. p below 1e-4 by luck once in 10,000; the teacher's is far below."""
    student, teacher = [3.0, 0.0, -1.0, 0.5], [0.0, 2.0, 0.5, -1.0]
    mixture = MixtureConfig(alpha_min=0.0)
    position = torch.arange(150)
    q = np.exp(naive_step(student, teacher, [0.0] * 4, 0, mixture).log_drawn)
    logits = (torch.tensor(student).expand(150, -1), torch.tensor(teacher).expand(150, -1))
    p_values = []
    for some in (mixture, replace(mixture, alpha_method="fixed", fixed_alpha=1.0)):
        token = fused_step(
            *logits, NoiseKeys(keys_tensor([5] * 150), position), position, some
        ).token
        p_values.append(stats.chisquare(torch.bincount(token, minlength=4).numpy(), 150 * q).pvalue)
    assert p_values[0] > 1e-4
    assert p_values[1] < 1e-9
