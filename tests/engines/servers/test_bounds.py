"""The bound on the total variation between q of two lists and q of the whole rows."""

from dataclasses import replace
from itertools import product
from types import MappingProxyType

import numpy as np
import pytest
import torch

from optimal_sampling.config import MixtureConfig
from optimal_sampling.distribution import log_q, make_pair, solve
from optimal_sampling.engines.servers.bounds import alpha_interval
from optimal_sampling.engines.servers.box import Limits, box_of
from optimal_sampling.engines.servers.mixing import ListMixer, Place
from optimal_sampling.engines.servers.replies import token_list as reply_list
from optimal_sampling.engines.servers.table_model import token_list
from optimal_sampling.engines.servers.union import find_support, join
from optimal_sampling.types import LIST_FIELDS, TRACE_FIELDS

VOCAB = 300
ROUNDING = 1e-6  # of float32
FREE = {"alpha_min": 0.0}
MIXTURES = {
    "kl_symmetry": MixtureConfig(**FREE),
    "clamped": MixtureConfig(),
    "mirror": MixtureConfig(alpha_method="mirror", **FREE),
    "fixed": MixtureConfig(alpha_method="fixed", fixed_alpha=0.7),
    "student": MixtureConfig(alpha_method="fixed", fixed_alpha=0.0, **FREE),
    "teacher": MixtureConfig(alpha_method="fixed", fixed_alpha=1.0),
    "teacher's nucleus": MixtureConfig(
        alpha_method="fixed", fixed_alpha=1.0, teacher_support_top_p=0.9, teacher_support_min_p=0.01
    ),
    "first token": MixtureConfig(force_first_token=True),
    "trust region": MixtureConfig(alpha_method="trust_region", trust_region=0.1, **FREE),
    "schedule": MixtureConfig(alpha_method="schedule"),
    "ess": MixtureConfig(alpha_method="ess_balance"),
    "reverse": MixtureConfig(alpha_method="reverse_kl_symmetry"),
    "entropy": MixtureConfig(alpha_method="entropy"),
    "arithmetic": MixtureConfig(alpha_method="arithmetic", arithmetic_weight=0.3),
    "veto": MixtureConfig(alpha_method="veto", veto_min_p=0.02),
    "top-k": MixtureConfig(teacher_support_top_k=12, **FREE),
    "top-p": MixtureConfig(teacher_support_top_p=0.9, **FREE),
    "all supports": MixtureConfig(
        teacher_support_top_k=30, teacher_support_top_p=0.8, teacher_support_min_p=0.01
    ),
    "cold": MixtureConfig(temperature=0.7, **FREE),
    "hot": MixtureConfig(temperature=1.3, **FREE),
    "hot top-p": MixtureConfig(temperature=1.3, teacher_support_top_p=0.9, **FREE),
    "cold veto": MixtureConfig(alpha_method="veto", temperature=0.7),
}


def language(rng):
    """Steep rows of which one is the other, sharper and disturbed."""
    logits = 3 * rng.standard_normal(VOCAB)
    return logits, 1.3 * logits + 0.8 * rng.standard_normal(VOCAB)


def flat(rng):
    return rng.standard_normal(VOCAB), rng.standard_normal(VOCAB)


def unequal(rng):
    """A sharp and a flat row."""
    return 8 * rng.standard_normal(VOCAB), rng.standard_normal(VOCAB)


def disjoint(rng):
    """Heads that do not meet."""
    shares = [rng.dirichlet(np.full(VOCAB, 0.05)) for _ in range(2)]
    return tuple(np.log(share + 1e-12) for share in shares)


def adversarial(rng, k=20):
    """All that neither list has lies on ids that both models have there."""
    rows = [rng.dirichlet(np.full(VOCAB, 0.2)) + 1e-12 for _ in range(2)]
    top = np.union1d(*[np.argsort(-row)[:k] for row in rows])
    out = np.setdiff1d(np.arange(VOCAB), top)
    for row in rows:
        mass = row[out].sum()
        row[out] = 1e-12
        count = max(1, int(np.ceil(mass / np.sort(row)[-k])))
        row[out[:count]] = mass / count
    return tuple(np.log(row) for row in rows)


def zeros(rng):
    """Half of the ids impossible for each model; alpha near 1, where little keeps them out."""
    rows = [3 * rng.standard_normal(VOCAB), 0.1 * rng.standard_normal(VOCAB)]
    rows[1][:3] += 12
    for row in rows:
        row[3:][rng.random(VOCAB - 3) < 0.5] = -np.inf
    return tuple(rows)


def one_sided(rng):
    """A row of which the list is a small part, and one with all of its mass in the list."""
    student = rng.standard_normal(VOCAB)
    student[rng.permutation(VOCAB)[:-15]] = -np.inf
    return student, 0.05 * rng.standard_normal(VOCAB)


KINDS = (language, flat, unequal, disjoint, adversarial)


def normalised(logits):
    return logits - np.logaddexp.reduce(logits)


def exact(student, teacher, mixture):
    rows = [torch.from_numpy(row)[None] for row in (student, teacher)]
    solved = solve(make_pair(*rows, mixture), torch.tensor([0]), mixture)
    return log_q(solved)[0].double().exp().numpy(), float(solved.alpha[0])


def of_lists(lists, mixture, rows=MappingProxyType({})):
    """q over the vocabulary, and the bound."""
    mixer = ListMixer(mixture, "mixture", VOCAB, rows)
    union = mixer.solver.join(*([each] for each in lists))
    q = np.zeros(VOCAB)
    solved = mixer.solver.solve(union, torch.tensor([0]))
    ids = union.ids[:, 0]
    q[ids] = solved.q[0, : len(ids)]
    return q, float(solved.bound[0])


def joined(lists, temperature=1.0):
    """The union of one list per model."""
    return join(*([each] for each in lists), VOCAB, temperature)


def lists_of(rows, k, extra):
    plain = [token_list(row, k) for row in rows]
    if not extra:
        return plain
    return [token_list(row, k, other.ids) for row, other in zip(rows, plain[::-1], strict=True)]


def compare(kind, mixture, k, count, extra=False, seed=0):
    """[count, 2]: measured total variation and the bound."""
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(count):
        rows = [normalised(row) for row in kind(rng)]
        q, bound = of_lists(lists_of(rows, k, extra), mixture)
        found.append((np.abs(q - exact(*rows, mixture)[0]).sum() / 2, bound))
    return np.array(found)


@pytest.mark.parametrize("name", MIXTURES)
def test_no_pair_violates_the_bound(name):
    """Guards: a wrong theorem, and an interval of alpha that alpha is not in."""
    kinds = KINDS if name == "ess" else (*KINDS, zeros, one_sided)  # its alpha is then not 1/2
    for kind in kinds:
        for k, extra in ((5, False), (20, False), (20, True), (100, True)):
            tv, bound = compare(kind, MIXTURES[name], k, 4, extra, seed=k).T
            assert (tv <= bound + ROUNDING).all(), (kind.__name__, k, extra)
            assert (bound <= 1).all()


@pytest.mark.parametrize("name", ["kl_symmetry", "clamped", "fixed", "arithmetic"])
def test_bound_is_of_the_order_of_the_error_and_falls_with_k(name):
    """Guards: a bound that is true and useless."""
    medians = []
    for k in (10, 40, 160):
        tv, bound = compare(language, MIXTURES[name], k, 20).T
        seen = tv > 1e-3
        assert seen.sum() > 10 or k == 160
        if seen.any():
            assert np.median(bound[seen] / tv[seen]) <= 4
        medians.append(np.median(bound))
    assert medians[0] > 2 * medians[1] > 4 * medians[2]


def test_a_smaller_bound_would_be_false():
    """Guards: a test of the bound that cannot fail: nine tenths of it are violated."""
    tv, bound = compare(flat, MIXTURES["fixed"], 20, 10, extra=True).T
    assert (tv > 0.9 * bound).all()


def test_fixed_alpha_bound_is_reached():
    """Guards: a term that is counted twice: the tails are proportional, which is the worst case."""
    base = normalised(np.sort(2 * np.random.default_rng(0).standard_normal(VOCAB))[::-1])
    rows = [base, base]
    q, bound = of_lists(lists_of(rows, 20, True), MIXTURES["fixed"])
    assert np.abs(q - np.exp(base)).sum() / 2 == pytest.approx(bound, rel=1e-5)


def filled(row, kept, first):
    """log p with the list of `row`: what it leaves lies on the ids `first`, each with the most."""
    most, left = np.exp(row[kept].min()), 1 - np.exp(row[kept]).sum()
    others = np.setdiff1d(np.arange(VOCAB), [*kept, *first])
    p = np.zeros(VOCAB)
    for token in [*first, *others]:
        p[token] = min(most, left)
        left -= p[token]
    p[kept] = np.exp(row[kept])
    return np.log(p + 1e-12)


def worst_of_some(rows, lists, q, mixture):
    """The largest total variation of `q` to the exact one of pairs that have these lists."""
    only = [np.setdiff1d(other.ids, own.ids) for own, other in zip(lists, lists[::-1], strict=True)]
    beyond = np.setdiff1d(np.arange(VOCAB), np.union1d(lists[0].ids, lists[1].ids))
    found = []
    for takes_student, takes_teacher, tail in product((0, 1), (0, 1), (beyond, beyond[::-1])):
        first = [[*only[0], *beyond] if takes_student else beyond]
        first.append([*only[1], *tail] if takes_teacher else tail)
        pair = [filled(row, lists[i].ids, first[i]) for i, row in enumerate(rows)]
        found.append(np.abs(q - exact(*pair, mixture)[0]).sum() / 2)
    return max(found)


@pytest.mark.parametrize("name", ["kl_symmetry", "clamped", "fixed"])
def test_some_pair_comes_near_the_bound(name):
    """Guards: errors of alpha and of the weights that are added, where no pair has both."""
    rng = np.random.default_rng(5)
    ratios = []
    for _ in range(20):
        rows = [normalised(row) for row in language(rng)]
        lists = lists_of(rows, 20, False)
        q, bound = of_lists(lists, MIXTURES[name])
        worst = worst_of_some(rows, lists, q, MIXTURES[name])
        assert worst <= bound + ROUNDING
        ratios.append(bound / worst)
    assert np.median(ratios) < 1.5


def test_a_list_is_right_to_the_rounding_of_a_server():
    """Guards: no room for an id that one list lacks, where the list sums to 1 by rounding."""
    rng = np.random.default_rng(0)
    for name in ("kl_symmetry", "clamped", "fixed", "hot"):
        rank = rng.permutation(VOCAB)
        rows = [-0.8 * rank, -np.where(rank < 20, rank, np.where(rank == 20, 4, 40))]
        rows = [normalised(row) for row in rows]
        lists = [token_list((row + 1e-6).astype(np.float32).astype(float), 20) for row in rows]
        q, bound = of_lists(lists, MIXTURES[name])
        assert np.abs(q - exact(*rows, MIXTURES[name])[0]).sum() / 2 <= bound + ROUNDING


@pytest.mark.parametrize("more", [9, None])
@pytest.mark.parametrize("name", ["kl_symmetry", "clamped", "top-p", "all supports", "hot top-p"])
def test_ids_that_one_model_has_alone_may_have_a_part_of_the_mass(name, more):
    """Guards: mass of padding, which is no part of q, counted as that of ids that a list lacks."""
    mixture, rng = MIXTURES[name], np.random.default_rng(2)
    wrong = 0
    for share in (0.0, 0.3, 0.9, 1.1) * 6:
        student, teacher = (np.sort(row)[::-1] for row in language(rng))
        teacher[20:] -= 9
        wide = normalised(np.append(teacher, np.full(9, teacher[19] + np.log(share + 1e-9))))
        top = np.argsort(-wide, kind="stable")[:20]
        lists = [
            token_list(normalised(student), 20, range(40)),
            reply_list({int(token): float(wide[token]) for token in top}, 20, VOCAB),
        ]
        assert lists[1].left_out == pytest.approx(np.exp(wide[top[top >= VOCAB]]).sum())
        truth = exact(normalised(student), normalised(teacher), mixture)[0]
        rows = {"teacher": None if more is None else VOCAB + more}
        q, bound = of_lists(lists, mixture, rows)
        assert np.abs(q - truth).sum() / 2 <= bound + ROUNDING
        q, bound = of_lists(lists, mixture)
        wrong += np.abs(q - truth).sum() / 2 > bound + ROUNDING
    assert wrong > 0 or "top-p" not in name  # others have room enough


def test_alpha_lies_in_its_interval():
    """Guards: a shift of alpha that the bound does not hold."""
    rng = np.random.default_rng(3)
    widths = []
    for kind in KINDS:
        for name in ("kl_symmetry", "mirror", "trust region", "top-p", "hot", "cold"):
            mixture = MIXTURES[name]
            rows = [normalised(row) for row in kind(rng)]
            union = joined(lists_of(rows, 60, True), mixture.temperature)
            limits = Limits(box_of(union, find_support(union, mixture)))
            alpha = exact(*rows, mixture)[1]
            for guess in (alpha, 0.0, 0.3, 1.0):
                guesses = np.array([guess])
                [low], [high] = alpha_interval(limits, mixture, np.array([0]), guesses)
                assert low - 2e-6 <= alpha <= high + 2e-6, (kind, name)
                widths.append(high - low)
    assert min(widths) < 0.1 < max(widths)


@pytest.mark.parametrize(
    "mixture",
    [
        MixtureConfig(alpha_method="veto", veto_min_p=0.1),
        MixtureConfig(teacher_support_top_k=10, **FREE),
        MixtureConfig(teacher_support_top_p=0.8),
        MixtureConfig(alpha_method="fixed", teacher_support_top_p=0.8, teacher_support_top_k=20),
    ],
)
def test_a_support_within_the_list_is_exact(mixture):
    """Guards: a support that is made of the list's shares, not of the whole row's."""
    rng = np.random.default_rng(1)
    for _ in range(10):
        student, teacher = (normalised(row) for row in language(rng))
        lists = lists_of((student, teacher), 60, True)
        support = find_support(joined(lists), mixture)
        assert support is not None
        assert support.is_known.all()
        q, bound = of_lists(lists, mixture)
        assert np.abs(q - exact(student, teacher, mixture)[0]).sum() < 2e-5
        assert bound < 1e-4


def test_values_that_a_list_lacks_are_nan():
    """Guards: a guess that is recorded as a log-probability."""
    student = np.log(np.array([0.7, 0.2, 0.06, 0.04]))
    teacher = np.log(np.array([0.1, 0.2, 0.65, 0.05]))
    lists = [token_list(student, 1), token_list(teacher, 1)]
    mixer = ListMixer(MIXTURES["clamped"], "mixture", 4)
    for key in range(20):
        [drawn] = mixer.draw([Place(lists, key, 0)])
        trace = dict(zip(TRACE_FIELDS + LIST_FIELDS, drawn.trace, strict=True))
        assert drawn.token in (0, 2)
        assert np.isnan(trace["log_p_teacher"]) == (drawn.token == 0)
        assert np.isnan(trace["log_p_student"]) == (drawn.token == 2)
        assert (trace["covered_student"], trace["covered_teacher"]) == pytest.approx((0.7, 0.65))
        assert trace["tv_bound"] == pytest.approx(drawn.bound)
        assert drawn.missing == ((2,), (0,))


def test_a_rule_without_bound_is_refused():
    """Guards: NaN or 0 in place of a bound."""
    rows = [normalised(row) for row in flat(np.random.default_rng(0))]
    with pytest.raises(ValueError, match="no bound is known for alpha_method interleaved"):
        of_lists(lists_of(rows, 20, True), MixtureConfig(alpha_method="interleaved"))


@pytest.mark.parametrize("alpha", [0.998, 0.9999])
def test_an_impossible_id_has_no_weight_near_alpha_one(alpha):
    """Guards: log 0 as a number whose (1 - alpha)-fold is no log 0, so the student's impossible
    ids were drawn."""
    mixture = MixtureConfig(alpha_method="fixed", fixed_alpha=alpha)
    rng = np.random.default_rng(0)
    rows = [normalised(row) for row in zeros(rng)]
    q, bound = of_lists(lists_of(rows, 200, True), mixture)
    truth = exact(*rows, mixture)[0]
    assert q[np.isneginf(rows[0])].max() == 0
    assert np.abs(q - truth).sum() / 2 <= bound + ROUNDING


@pytest.mark.parametrize("name", ["first token", "ess"])
@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_a_list_with_all_of_the_mass_has_no_tail(name, temperature):
    """Guards: a tail of e^2500, from a list whose last ids have the probability 0."""
    mixture = replace(MIXTURES[name], temperature=temperature)
    rng = np.random.default_rng(0)
    rows = [normalised(np.where(np.arange(VOCAB) < 9, row, -np.inf)) for row in flat(rng)]
    q, bound = of_lists(lists_of(rows, 20, False), mixture)
    assert np.abs(q - exact(*rows, mixture)[0]).sum() / 2 <= ROUNDING
    assert bound <= 1e-3
