"""Scores against enumeration, intervals against closed forms and published values."""

import random
import sys
from fractions import Fraction
from itertools import combinations, pairwise, product
from math import comb, sqrt

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest, ttest_1samp
from scipy.stats import t as student_t
from tests.evaluate.scoring import samples_of, scores_of

from optimal_sampling.errors import ConfigError, MissingDependencyError
from optimal_sampling.evaluate import EvaluateConfig, evaluate
from optimal_sampling.evaluate.statistics import (
    CheckpointScores,
    Metric,
    average_at_k,
    interval,
    majority_at_k,
    no_answer_rate,
    paired_difference,
    pass_at_k,
    score,
    truncated_rate,
)

QUESTION = st.text("RABC-T", min_size=1, max_size=6)


def share_with_a_right_one(letters, k):
    subsets = [*combinations(letters, k)]
    return sum("R" in subset for subset in subsets) / len(subsets)


def share_won(letters, k):
    """The mean over all subsets of the chance that a most frequent answer is the right one."""
    subsets = [*combinations(letters, k)]
    total = 0.0
    for subset in subsets:
        votes = [letter for letter in subset if letter not in "-T"]
        winners = {x for x in votes if votes.count(x) == max(map(votes.count, votes))}
        total += ("R" in winners) / len(winners) if winners else 0
    return total / len(subsets)


@given(letters=QUESTION, data=st.data())
def test_pass_at_k_is_the_share_of_subsets(letters, data):
    """Guards: 1 - (1 - c/n)^k, which is biased low for k near n."""
    k = data.draw(st.integers(1, len(letters)))
    expected = share_with_a_right_one(letters, k)
    assert pass_at_k(scores_of(letters), k) == pytest.approx([expected], abs=1e-12)


@given(letters=QUESTION, data=st.data())
def test_majority_at_k_is_the_mean_over_subsets_and_ties(letters, data):
    """Guards: ties that go to the first answer seen, votes of samples without an answer."""
    k = data.draw(st.integers(1, len(letters)))
    expected = share_won(letters, k)
    assert majority_at_k(scores_of(letters), k) == pytest.approx([expected], abs=1e-12)


@pytest.mark.parametrize(
    ("letters", "k", "expected"),
    [
        ("RRAB", 4, 1),
        ("RA", 2, 1 / 2),
        ("RAB", 3, 1 / 3),
        ("RRAAB", 5, 1 / 2),
        ("RAAB", 4, 0),
        ("R---", 4, 1),
        ("R-TT", 2, 1 / 2),  # 3 of 6 pairs hold R, which then wins unopposed
        ("----", 4, 0),
        ("RRAA", 2, 1 / 2),  # RR wins (1 of 6), AA loses (1), the other 4 tie
        ("R??", 3, 1 / 3),  # answers that are not known agree with none
        ("RRRAA", 3, 7 / 10),  # RRR and RRA: 1 + 3 * 2 of 10
    ],
)
def test_majority_of_known_votes(letters, k, expected):
    """Guards: an error that enumeration in the other test shares."""
    assert majority_at_k(scores_of(letters), k) == pytest.approx([expected])


def test_majority_of_many_samples_is_exact():
    """Guards: overflow or rounding of the binomial coefficients of large sample counts."""
    letters = "R" * 40 + "A" * 35 + "B" * 25
    won = Fraction(0)
    for right, first in product(range(26), repeat=2):
        second = 25 - right - first
        if second >= 0 and right == max(right, first, second):
            ways = comb(40, right) * comb(35, first) * comb(25, second)
            won += Fraction(ways, [right, first, second].count(right))
    exact = float(won / comb(100, 25))
    assert majority_at_k(scores_of(letters), 25)[0] == pytest.approx(exact, abs=1e-15)


def test_values_belong_to_their_questions():
    """Guards: questions that are sorted in one array and not in another."""
    scores = scores_of("RRRR", "AAAA", "RA-T")
    assert average_at_k(scores).tolist() == [1, 0, 0.25]
    assert scores.truncated.tolist() == [[False] * 4, [False] * 4, [False, False, False, True]]
    assert scores.tokens.tolist()[1] == [10, 11, 12, 13]
    assert scores.samples == 4


def test_samples_may_come_in_any_order():
    """Guards: scores that depend on the order in which completions finished."""
    samples = samples_of("RRA-", "AB-T", "RRRR")
    mixed = random.Random(1).sample(samples, len(samples))
    one, other = CheckpointScores.from_samples(samples), CheckpointScores.from_samples(mixed)
    assert one.questions == other.questions
    for name in ("correct", "truncated", "no_answer", "tokens", "hedging", "votes"):
        assert np.array_equal(getattr(one, name), getattr(other, name))


@given(letters=st.lists(st.text("RAB-", min_size=4, max_size=4), min_size=1, max_size=8))
def test_metrics_meet_at_one_sample(letters):
    """Guards: pass@1 or maj@1 that is not avg@1; pass@k that falls with k."""
    scores = scores_of(*letters)
    average = average_at_k(scores)
    assert pass_at_k(scores, 1) == pytest.approx(average)
    assert majority_at_k(scores, 1) == pytest.approx(average)
    by_k = [pass_at_k(scores, k) for k in (1, 2, 3, 4)]
    assert all((more >= less - 1e-12).all() for less, more in pairwise(by_k))


@pytest.mark.parametrize("right", range(0, 31, 5))
@pytest.mark.parametrize("level", [0.8, 0.95])
def test_one_sample_gives_the_wilson_interval(right, level):
    """Guards: another interval than Wilson's where every question has one sample."""
    values = np.array([1.0] * right + [0.0] * (30 - right))
    ours = interval(values, 1, level)
    wilson = binomtest(right, 30).proportion_ci(level, method="wilson")
    assert (ours.low, ours.high) == pytest.approx((wilson.low, wilson.high), abs=1e-12)
    assert ours.value == right / 30


def test_interval_of_several_samples_by_hand():
    """Guards: a wrong design effect. The formula is worked out here from its source."""
    values = np.array([0.0, 0.25, 0.5, 0.5, 1.0])
    p, n, z = 0.45, 5, 1.959963984540054
    size = p * (1 - p) / (np.var(values, ddof=1) / n)
    size *= (z / student_t.ppf(0.975, 4)) ** 2
    centre = (p + z**2 / (2 * size)) / (1 + z**2 / size)
    half = z / (1 + z**2 / size) * sqrt(p * (1 - p) / size + z**2 / (4 * size**2))
    ours = interval(values, draws=4)
    assert (ours.low, ours.high) == pytest.approx((centre - half, centre + half))


def test_copies_of_a_sample_are_no_evidence():
    """Guards: an interval that shrinks because each answer is there sixteen times."""
    once = interval(np.array([1.0] * 10 + [0.0] * 20))
    often = score(scores_of(*["R" * 16] * 10, *["A" * 16] * 20), Metric("avg", 16))
    assert often.high - often.low >= once.high - once.low


@given(
    values=st.lists(st.integers(0, 4).map(lambda x: x / 4), min_size=1, max_size=12),
    level=st.sampled_from([0.5, 0.9, 0.95, 0.99]),
)
def test_an_interval_holds_its_value_and_lies_in_the_unit(values, level):
    """Guards: bounds outside [0, 1], NaN for one question or equal values, width 0."""
    ours = interval(np.array(values), 4, level)
    assert 0 <= ours.low <= ours.value <= ours.high <= 1
    assert ours.high > ours.low
    mirrored = interval(1 - np.array(values), 4, level)
    assert (1 - mirrored.high, 1 - mirrored.low) == pytest.approx((ours.low, ours.high))


def test_more_questions_and_a_lower_level_narrow_the_interval():
    """Guards: a level that is ignored, questions that are not counted."""

    def width(questions, level):
        found = interval(np.array([0.0, 0.25, 1.0] * questions), 4, level)
        return found.high - found.low

    assert width(10, 0.8) < width(10, 0.95) < width(10, 0.99)
    assert width(40, 0.95) == pytest.approx(width(10, 0.95) / 2, rel=0.1)


def test_equal_checkpoints_differ_by_zero():
    """Guards: a difference of equal results that is not 0, or is claimed to be exactly known."""
    scores = scores_of("RRA-", "AB-T", "RRRR", "ARAR")
    for metric in (Metric("avg", 4), Metric("pass", 2), Metric("maj", 4)):
        found = paired_difference(scores, scores, metric)
        assert found.value == 0
        assert -1 < found.low < 0 < found.high < 1
        assert found.low == -found.high


def test_paired_difference_is_a_t_interval():
    """Guards: pairing by place instead of by question, the unpaired variance."""
    draw = np.random.default_rng(3)
    letters = [["".join(draw.choice([*"RA"], 16)) for _ in range(40)] for _ in range(2)]
    new, base = scores_of(*letters[0]), scores_of(*letters[1])
    ours = paired_difference(new, base, Metric("avg", 16))
    differences = new.correct.mean(1) - base.correct.mean(1)
    theirs = ttest_1samp(differences, 0).confidence_interval(0.95)
    assert ours.value == pytest.approx(differences.mean())
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=1e-3)
    assert ours.high - ours.low > theirs.high - theirs.low
    opposite = paired_difference(base, new, Metric("avg", 16))
    assert (opposite.low, opposite.high) == pytest.approx((-ours.high, -ours.low))


def test_one_sample_difference_by_hand():
    """Guards: the added question, which keeps the interval of few changes from being too short."""
    new, base = scores_of("R", "R", "A", "A"), scores_of("R", "A", "A", "A")
    found = paired_difference(new, base, Metric("avg", 1))
    variance = (3 * 0.25**2 + 0.75**2 + 1) / 3
    half = student_t.ppf(0.975, 3) * sqrt(variance / 4)
    assert (found.value, found.low) == (0.25, pytest.approx(0.25 - half))
    assert found.high == 1  # 0.25 + half is more than the largest difference


def test_pairing_pays_where_questions_differ_in_difficulty():
    """Guards: a paired interval as wide as the unpaired one."""
    easy, hard = "RRRRRRRR", "AAAAAAAA"
    base = scores_of(*[easy, hard] * 10)
    new = scores_of(*[easy, "R" + hard[1:]] * 10)
    found = paired_difference(new, base, Metric("avg", 8))
    alone = score(base, Metric("avg", 8))
    assert found.low > 0
    assert found.high - found.low < 0.2 * (alone.high - alone.low)


def test_samples_without_an_answer_and_truncated_ones_count_as_wrong():
    """Guards: scores over the answered samples only."""
    scores = scores_of("RT", "R-", "TT")
    assert average_at_k(scores).tolist() == [0.5, 0.5, 0]
    assert truncated_rate(scores).value == 0.5
    assert no_answer_rate(scores).value == pytest.approx(1 / 6)


def test_questions_without_a_reference_are_left_out_and_named():
    """Guards: an unusable reference that counts as a wrong answer."""
    scores = scores_of("RR", "SS", "AA")
    assert scores.questions == ("question 0", "question 2")
    assert scores.skipped == ("question 1",)
    assert score(scores, Metric("avg", 2)).value == 0.5


REFUSED = {
    "no samples": (lambda: scores_of(), "no graded sample"),
    "all skipped": (lambda: scores_of("SS"), "no graded sample"),
    "a missing sample": (lambda: scores_of("RR", "R"), "lacks 1 of 2 samples"),
    "half skipped": (lambda: scores_of("RS"), "only some samples"),
    "a sample twice": (
        lambda: CheckpointScores.from_samples(samples_of("R") * 2),
        "is there twice",
    ),
    "k too large": (lambda: pass_at_k(scores_of("RR"), 3), r"\[1, 2\].*got 3"),
    "k of avg too large": (lambda: score(scores_of("R"), Metric("avg", 4)), "got 4"),
    "k = 0": (lambda: majority_at_k(scores_of("RR"), 0), "got 0"),
    "unknown answers": (lambda: majority_at_k(scores_of("!A"), 2), "leave maj out"),
    "level": (lambda: interval(np.array([0.0, 1.0]), 1, 95), "such as 0.95; got 95"),
    "other questions": (
        lambda: paired_difference(scores_of("R", "R"), scores_of("R"), Metric("avg", 1)),
        "1 questions are scored for one checkpoint only, such as 'question 1'",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_gives_no_score_is_refused_by_name(case):
    """Guards: NaN, a wrong number or a traceback for incomplete results."""
    call, message = REFUSED[case]
    with pytest.raises(ConfigError, match=message):
        call()


def test_every_verdict_is_known():
    """Guards: a misspelt verdict that silently counts as a wrong answer."""
    sample = samples_of("R")[0]
    for verdict in ("Correct", "", "right"):
        wrong = type(sample)("q", 0, verdict, "1", 1)
        with pytest.raises(ConfigError, match="verdict"):
            CheckpointScores.from_samples([wrong])


def test_without_scipy_an_evaluation_does_not_begin(monkeypatch, tmp_path):
    """Guards: hours of generation before the message that a package is missing."""
    monkeypatch.setitem(sys.modules, "scipy.special", None)
    config = EvaluateConfig(
        extra_models=("toy-student",), benchmarks=("synthetic",), output_dir=str(tmp_path / "out")
    )
    with pytest.raises(MissingDependencyError, match=r"pip install '\.\[eval\]'"):
        evaluate(config)
    assert not (tmp_path / "out").exists()


def test_enumeration_of_all_small_cases():
    """Guards: a case that random search misses: every question of four samples, every k."""
    for letters in product("RAB-", repeat=4):
        for k in (1, 2, 3, 4):
            scores = scores_of("".join(letters))
            assert majority_at_k(scores, k)[0] == pytest.approx(share_won(letters, k))
            none_right = comb(4 - letters.count("R"), k) / comb(4, k)
            assert pass_at_k(scores, k)[0] == pytest.approx(1 - none_right)
