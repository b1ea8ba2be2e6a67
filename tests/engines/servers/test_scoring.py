"""Which way of scoring is taken."""

import pytest

from optimal_sampling.engines.servers.scoring import ScoringTime, ScoringTimes

PROMPTS = ScoringTime(0.010, 0.0, 0.004)
WHOLE = ScoringTime(0.012, 0.0005, 0.0)


def test_the_time_of_a_way_is_fitted():
    """Guards: a way that is measured at one size and taken at another."""
    sizes = [(9, 2), (15, 8), (129, 2), (135, 8)]
    found = ScoringTime.fitted({size: 0.01 + 0.001 * size[0] + 0.002 * size[1] for size in sizes})
    assert (found.start, found.per_token, found.per_list) == pytest.approx((0.01, 0.001, 0.002))
    noisy = ScoringTime.fitted({(9, 2): 0.03, (15, 8): 0.02, (129, 2): 0.03, (135, 8): 0.02})
    assert (noisy.per_token, noisy.per_list) == (pytest.approx(0, abs=1e-9), 0)
    assert noisy(50, 4) == pytest.approx(0.025)


def test_short_texts_are_scored_whole_and_long_ones_are_not():
    """Guards: a way that is fast on a short probe, and scores every long prompt again."""
    times = ScoringTimes({"prompts": PROMPTS, "echo": WHOLE}, longest=135)
    assert times.general() == "prompts"
    assert times.best(20, 8, 20) == "echo"
    assert times.best(20, 2, 20) == "prompts"  # not clearly faster
    assert times.best(100, 8, 20) == "prompts"
    assert times.best(136, 100, 20) == "prompts"  # longer than what was tried
    assert times.best(20, 8, 150_000) == "prompts"  # a whole list for every token of the text


def test_a_server_with_one_way_or_none():
    """Guards: a way that the server does not offer."""
    assert ScoringTimes({"echo": WHOLE}, 135).best(20, 2, 20) == "echo"
    assert ScoringTimes({"echo": WHOLE}, 135).best(900, 2, 20) == "echo"
    assert ScoringTimes({}, 135).general() is None
    assert ScoringTimes({}, 135).best(20, 2, 20) is None
