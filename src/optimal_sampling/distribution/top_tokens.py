"""The likeliest tokens of student, teacher and q*, for distillation on soft targets."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Float32, Int32, Int64
from torch import Tensor

from optimal_sampling.config import MixtureConfig
from optimal_sampling.distribution.arrays import cuts
from optimal_sampling.distribution.mixture import Drawn
from optimal_sampling.types import TRACE_FIELDS

__all__ = ["top_tokens"]

_BLOCK = 128
"""Ids of which the largest is compared first: a tenth of the time of `topk` over all ids."""

Top = tuple[Int64[Tensor, "rows k"], Float32[Tensor, "rows k"]]


@torch.no_grad()
def top_tokens(
    logits: Sequence[Float[Tensor, "rows vocab"]], drawn: Drawn, mixture: MixtureConfig, k: int
) -> tuple[Int32[Tensor, "rows models k"], Float32[Tensor, "rows models k"]]:
    """Ids and log-probabilities of the k likeliest tokens, the likeliest first, per distribution.

    `logits`: of student and teacher, or of one model alone, with `drawn` of `step` for these rows.
    The distributions are the models' own at the run's temperature, whatever the teacher's support,
    and of two models also q: `drawn.log_q` where it was kept, else q before top-k and top-p. There
    are k columns, or as many as there are ids. A log-probability of -inf stands for no token.
    """
    scores = [each.float() / mixture.temperature for each in logits]
    tops = [_normalised(each, each.logsumexp(-1), k) for each in scores]
    if drawn.log_q is not None:
        tops.append(_largest(drawn.log_q, k))
    elif len(scores) == 2:
        tops.append(_of_mixture(scores[0], scores[1], drawn, mixture, k))
    ids, log_p = (torch.stack(column, 1) for column in zip(*tops, strict=True))
    return ids.to(torch.int32), log_p


def _of_mixture(
    student: Float32[Tensor, "rows vocab"],
    teacher: Float32[Tensor, "rows vocab"],
    drawn: Drawn,
    mixture: MixtureConfig,
    k: int,
) -> Top:
    """Of q, with the alpha of the trace; log Z follows from log q of the token that was drawn."""
    trace = dict(zip(TRACE_FIELDS, drawn.trace.T, strict=True))
    mixed = _mixed(student, teacher, trace["alpha"][:, None])
    if cuts(mixture.top_k, mixture.top_p):  # the trace has log q after these
        return _normalised(mixed, mixed.logsumexp(-1), k)
    return _normalised(mixed, mixed.gather(1, drawn.token[:, None])[:, 0] - trace["log_q"], k)


def _mixed(
    student: Float32[Tensor, "rows vocab"],
    teacher: Float32[Tensor, "rows vocab"],
    alpha: Float32[Tensor, "rows 1"],
) -> Float32[Tensor, "rows vocab"]:
    """log q up to a number per row. 0 times -inf is no part of it."""
    mixed = torch.addcmul(student * (1 - alpha), teacher, alpha)
    if student.device.type == "cpu" and bool(((alpha > 0) & (alpha < 1)).all()):
        return mixed
    mixed = torch.where(alpha == 0, student, mixed)
    return torch.where(alpha == 1, teacher, mixed)


def _normalised(
    scores: Float32[Tensor, "rows vocab"], log_z: Float32[Tensor, " rows"], k: int
) -> Top:
    ids, values = _largest(scores, k)
    return ids, values - log_z[:, None]


def _largest(scores: Float32[Tensor, "rows vocab"], k: int) -> Top:
    """Ids and values of the k largest: they lie in the k blocks with the largest maxima."""
    vocab = scores.shape[1]
    blocks = vocab // _BLOCK
    if blocks <= k:
        values, ids = scores.topk(min(k, vocab))
        return ids, values
    whole = scores[:, : blocks * _BLOCK].reshape(len(scores), blocks, _BLOCK)
    best = whole.amax(-1).topk(k).indices
    inside = torch.arange(_BLOCK, device=scores.device)
    rest = torch.arange(blocks * _BLOCK, vocab, device=scores.device).expand(len(scores), -1)
    places = torch.cat([(best[..., None] * _BLOCK + inside).flatten(1), rest], 1)
    values, chosen = scores.gather(1, places).topk(k)
    return places.gather(1, chosen), values
