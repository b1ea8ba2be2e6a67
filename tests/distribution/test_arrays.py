"""Operations on rows of scores."""

import pytest
import torch

from optimal_sampling.distribution.arrays import keep_largest, keep_top_k


@pytest.mark.parametrize("step", [0.0, 0.5])
@pytest.mark.parametrize("top_k", [-1, 1, 7, 199, 200])
def test_a_threshold_keeps_what_sorting_keeps(top_k, step):
    """Guards: ties by another rule than the smaller id on a GPU, and zeros of both signs."""
    generator = torch.Generator().manual_seed(3)
    scores = torch.randn(64, 200, generator=generator) * torch.logspace(-3, 1, 64)[:, None]
    if step:
        scores = (scores / step).round() * step  # many ties, and zeros of both signs
    scores[1::5, ::3] = -torch.inf
    expected = keep_largest(scores, top_k, 1.0)
    assert torch.equal(keep_top_k(scores, top_k), expected)
    assert expected.sum(-1).eq(200 if top_k < 0 else top_k).all()


def test_equal_scores_are_kept_by_id():
    """Guards: all of equal scores, or none of them."""
    kept = keep_top_k(torch.zeros(1, 8), 2)
    assert kept[0].nonzero().flatten().tolist() == [0, 1]


def test_rows_that_are_no_distribution_do_not_fail():
    """Guards: an exception from a bad row, which ends all rows beside it."""
    scores = torch.zeros(3, 5)
    scores[0], scores[1] = torch.nan, -torch.inf
    kept = keep_top_k(scores, 3)
    assert kept.shape == (3, 5)
    assert kept[2].tolist() == [True, True, True, False, False]
