"""Operations on rows of scores."""

import pytest
import torch

from optimal_sampling.distribution.arrays import keep_by_threshold, keep_largest

CUTS = [(-1, 0.6), (-1, 1e-6), (1, 1.0), (7, 1.0), (40, 0.37), (7, 0.99), (200, 0.5), (-1, 0.999)]


@pytest.mark.parametrize("step", [0.0, 0.5])
@pytest.mark.parametrize(("top_k", "top_p"), CUTS)
def test_a_threshold_keeps_what_sorting_keeps(top_k, top_p, step):
    """Guards: another nucleus on a GPU; ties by another rule than the smaller id; a token of weight
    0; scores around zero, whose float bits change their order.
    """
    generator = torch.Generator().manual_seed(3)
    scores = torch.randn(64, 200, generator=generator) * torch.logspace(-3, 1, 64)[:, None]
    if step:
        scores = (scores / step).round() * step  # many ties, and zeros of both signs
    scores[1::5, ::3] = -torch.inf
    expected = keep_largest(scores, top_k, top_p)
    found = keep_by_threshold(scores, top_k, top_p)
    assert torch.equal(found, expected)
    if top_p < 1 or top_k < 200:
        assert (expected.sum(-1) < 200).any()


def test_equal_scores_are_kept_by_id():
    """Guards: all of equal scores, or none of them."""
    scores = torch.zeros(1, 8)
    assert keep_by_threshold(scores, -1, 0.3)[0].nonzero().flatten().tolist() == [0, 1, 2]
    assert keep_by_threshold(scores, 2, 1.0)[0].nonzero().flatten().tolist() == [0, 1]


def test_rows_that_are_no_distribution_do_not_fail():
    """Guards: an exception from a bad row, which ends all rows beside it."""
    scores = torch.zeros(3, 5)
    scores[0], scores[1] = torch.nan, -torch.inf
    kept = keep_by_threshold(scores, 3, 0.5)
    assert kept.shape == (3, 5)
    assert kept[2].tolist() == [True, True, False, False, False]
