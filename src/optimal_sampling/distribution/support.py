"""Top-k and top-p: which tokens of a row are kept. Functions on the scores of one model."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float32
from torch import Tensor

__all__ = ["keep_largest"]


def keep_largest(
    scores: Float32[Tensor, "rows vocab"], top_k: int, top_p: float
) -> Bool[Tensor, "rows vocab"]:
    """The k likeliest tokens, then of these the fewest whose share reaches p; at least one.

    -1 and 1 switch off. `scores` are log-probabilities up to a constant per row. Of equal scores
    the smaller token id comes first, at the k-th place as in the nucleus.
    """
    vocab = scores.shape[-1]
    count = vocab if top_k < 0 else min(top_k, vocab)
    ranked, order = scores.sort(stable=True, dim=-1, descending=True)
    ranked = ranked[:, :count]
    kept = torch.ones_like(ranked, dtype=torch.bool)
    if top_p < 1:
        mass = ranked.to(torch.float64).softmax(-1)
        kept[:, 1:] = mass.cumsum(-1)[:, :-1] < top_p
    keep = torch.zeros_like(scores, dtype=torch.bool)
    return keep.scatter_(-1, order[:, :count], kept)
