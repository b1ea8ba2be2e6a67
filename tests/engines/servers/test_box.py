"""Limits of sums over all pairs of distributions that have two given lists."""

import numpy as np
import pytest

from optimal_sampling.config import MixtureConfig
from optimal_sampling.engines.servers.box import Limits, box_of, weights
from optimal_sampling.engines.servers.table_model import token_list
from optimal_sampling.engines.servers.union import NEVER, find_support, join

VOCAB, K = 60, 6
CONSTANTS = np.array([0.0, 1.0, -1.0, 1.0, -1.0])
SLOPES = np.array([1.0, 0.05, 0.2, 2.0, 1.0])


def refilled(row, kept, rng):
    """Probabilities with the same list, and what it leaves at random places."""
    most = row[kept].min()
    found, left = np.zeros(VOCAB), 1 - row[kept].sum()
    found[kept] = row[kept]
    for token in rng.permutation(np.setdiff1d(np.arange(VOCAB), kept)):
        found[token] = min(most * rng.choice([1.0, rng.random()]), left)
        left -= found[token]
    return found if left < 1e-12 else row


def pairs_of_one_box(mixture, seed, count):
    """A box, the factor of t in it as a log, and pairs of rows that have its lists."""
    rng = np.random.default_rng(seed)
    rows = [rng.dirichlet(np.full(VOCAB, rng.choice([0.1, 0.5]))) + 1e-9 for _ in range(2)]
    rows = [row / row.sum() for row in rows]
    lists = [token_list(np.log(row), K) for row in rows]
    union = join(*([each] for each in lists), VOCAB, mixture.temperature)
    box = box_of(union, find_support(union, mixture))
    pairs = [
        [refilled(row, each.ids, rng) for row, each in zip(rows, lists, strict=True)]
        for _ in range(count)
    ]
    return box, box.teacher[0, 0] - union.teacher.log_p[0, 0], [rows, *pairs]


def sums(pair, shift, alphas, temperature):
    """The sums of a pair, [alphas, terms]."""
    with np.errstate(divide="ignore"):
        student, teacher = (np.maximum(np.log(each) / temperature, NEVER) for each in pair)
    teacher = teacher + shift
    table = weights(student[:, None], teacher[:, None], alphas)[:, 0]
    weight, psi = table.sum(0), (table * (teacher - student)[:, None]).sum(0)
    return weight[:, None] * CONSTANTS + psi[:, None] * SLOPES


@pytest.mark.parametrize("temperature", [1.0, 1.4])
def test_no_pair_has_a_sum_beyond_its_limits(temperature):
    """Guards: a wrong lemma of sums, which the bound on total variation may hide."""
    mixture = MixtureConfig(temperature=temperature)
    alphas = np.array([1e-3, 0.2, 0.5, 0.8, 0.999])
    nearest = np.inf
    for seed in range(40):
        box, shift, pairs = pairs_of_one_box(mixture, seed, 30)
        terms = alphas[None], CONSTANTS[None, None], SLOPES[None, None]
        limits = Limits(box)
        [least], [most] = limits.least(*terms), limits.most(*terms)
        for pair in pairs:
            found = sums(pair, shift, alphas, temperature)
            assert (found >= least - 1e-9).all()
            assert (found <= most + 1e-9).all()
            nearest = min(nearest, ((most - found) / (most - least)).min())
    assert nearest < 0.1
