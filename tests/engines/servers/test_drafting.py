"""The width of rounds, from measured times and agreement."""

import numpy as np
import pytest

from optimal_sampling.engines.servers.drafting import MOST_WIDTH, DraftWidth


def learned(drafting, scoring, agreement, rounds=400):
    """A width policy after rounds whose times are functions of the width."""
    width = DraftWidth("auto", is_possible=True)
    chosen = []
    for number in range(rounds):
        chosen.append(width.choose())
        width.observe_drafting(chosen[-1], drafting(chosen[-1]))
        width.observe_scoring(chosen[-1], scoring(chosen[-1]))
        width.observe_token(number % 10 < 10 * agreement)
    return width, chosen


def test_a_fixed_cost_per_request_makes_long_drafts():
    """Guards: a policy that never drafts, or stops learning times."""
    width, chosen = learned(lambda n: 0.03 + 0.001 * n, lambda n: 0.03 + 0.001 * n, 0.9)
    assert width.best() > 8
    assert max(chosen) == MOST_WIDTH
    width, _ = learned(lambda n: 0.03 + 0.001 * n, lambda n: 0.03 + 0.001 * n, 0.5)
    assert 2 <= width.best() <= 6


def test_drafts_that_cost_more_than_they_give_are_left():
    """Guards: drafts that slow a run down."""
    width, chosen = learned(lambda n: 0.02 * n, lambda n: 0.02, 0.3)
    assert width.best() == 1
    assert chosen[-24:].count(1) >= 20
    width, _ = learned(lambda n: 0.02, lambda n: 0.02 * n, 0.3)
    assert width.best() == 1


def test_a_changed_agreement_is_noticed():
    """Guards: a width that is chosen once for all."""
    width, _ = learned(lambda n: 0.03 + 0.001 * n, lambda n: 0.03, 0.9)
    long = width.best()
    for _ in range(300):
        width.observe_token(False)
    assert width.best() < long / 2


def test_slow_moments_do_not_end_long_drafts():
    """Guards: one width that is left for good because the machine was busy when it was tried."""
    for slow in range(24):
        moments = iter(range(10**6))

        def scoring(n, moments=moments, slow=slow):
            return (0.04 + 0.001 * n) * (20 if next(moments) in (slow, slow + 3) else 1)

        _, chosen = learned(lambda n: 0.02 + 0.003 * n, scoring, 0.9, rounds=60)
        assert 5 <= np.median(chosen[-20:]) <= 12  # 8 without slow moments


def test_a_path_is_drafted_alone_where_the_models_agree():
    """Guards: a round trip that yields nothing, where the first draft is mostly wrong."""
    width = DraftWidth("auto", is_possible=True)
    assert not width.drafts_alone
    for _ in range(40):
        width.observe_token(True)
    assert width.drafts_alone
    for _ in range(40):
        width.observe_token(False)
    assert not width.drafts_alone


@pytest.mark.parametrize(
    ("given", "possible", "wanted"), [(0, True, 1), (3, True, 4), (3, False, 1)]
)
def test_a_given_number_is_kept(given, possible, wanted):
    """Guards: `--draft-tokens 3` that drafts two, or drafts where a server cannot."""
    width = DraftWidth(given, possible)
    width.observe_drafting(4, 9.0)
    assert {width.choose() for _ in range(50)} == {wanted}
