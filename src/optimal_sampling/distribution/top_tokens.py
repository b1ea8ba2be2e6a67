"""The likeliest tokens of student, teacher and q*, for distillation on soft targets.

The k largest of a row lie in the k blocks of ids with the largest maxima, so one pass over the
vocabulary and a short sort find them.
"""

from __future__ import annotations

import threading
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

Scores = Float32[Tensor, "rows vocab"]
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
    ValueError for a q within the teacher's support or without alpha, without `drawn.log_q`.
    """
    if drawn.log_q is None and (mixture.has_support or not mixture.is_geometric):
        raise ValueError(
            "top tokens within a teacher's support, or of a mixture without alpha, need "
            "`step(keep_log_q=True)`"
        )
    rows, vocab = logits[0].shape
    height = 1 if logits[0].device.type == "cpu" and vocab > _BLOCK * k else max(1, rows)
    parts = []
    for first in range(0, max(1, rows), height):
        part = slice(first, first + height)
        parts.append(_of_rows([each[part] for each in logits], drawn, part, mixture, k))
    ids, log_p = (torch.cat(column) for column in zip(*parts, strict=True))
    return ids.to(torch.int32), log_p


def _of_rows(
    logits: Sequence[Float[Tensor, "rows vocab"]],
    drawn: Drawn,
    part: slice,
    mixture: MixtureConfig,
    k: int,
) -> tuple[Int64[Tensor, "rows models k"], Float32[Tensor, "rows models k"]]:
    """The same for the rows of `part`."""
    scores = [_scaled(each, mixture.temperature, slot) for slot, each in enumerate(logits)]
    trace = dict(zip(TRACE_FIELDS, drawn.trace[part].T[..., None], strict=True))
    token = drawn.token[part, None]
    known = len(scores) == 2 and drawn.log_q is None and _share_support(scores)
    names = ("log_p_student", "log_p_teacher") if known else (None,) * len(scores)
    tops = [
        _normalised(each, k, token, trace[name] if name else None)
        for each, name in zip(scores, names, strict=True)
    ]
    if drawn.log_q is not None:
        tops.append(_largest(drawn.log_q[part], k))
    elif len(scores) == 2:
        mixed = _mixed(scores[0], scores[1], trace["alpha"])
        # the trace has log q after top-k and top-p
        log_q = None if cuts(mixture.top_k, mixture.top_p) else trace["log_q"]
        tops.append(_normalised(mixed, k, token, log_q))
    ids, log_p = (torch.stack(column, 1) for column in zip(*tops, strict=True))
    return ids, log_p


def _share_support(scores: Sequence[Scores]) -> bool:
    """Whether no logit is -inf. Otherwise the trace is about models cut to what both have."""
    return all(bool((each.amin(1) > -torch.inf).all()) for each in scores)


def _scaled(logits: Float[Tensor, "rows vocab"], temperature: float, slot: int) -> Scores:
    if temperature == 1:
        return logits.float()
    # shifted first, which keeps the digits of what lies near the largest
    shifted = torch.sub(logits, logits.amax(-1, keepdim=True), out=_buffer(logits, slot))
    return shifted.div_(temperature)


def _mixed(student: Scores, teacher: Scores, alpha: Float32[Tensor, "rows 1"]) -> Scores:
    """log q up to a number per row. 0 times -inf is no part of it."""
    mixed = torch.mul(student, 1 - alpha, out=_buffer(student, 2))
    mixed.addcmul_(teacher, alpha)
    is_student, is_teacher = alpha == 0, alpha == 1
    if bool((is_student | is_teacher).any()):
        return torch.where(is_teacher, teacher, torch.where(is_student, student, mixed))
    return mixed


def _normalised(
    scores: Scores,
    k: int,
    token: Int64[Tensor, "rows 1"],
    log_p: Float32[Tensor, "rows 1"] | None,
) -> Top:
    """The largest log-probabilities. `log_p`: that of `token`; None where it is not known."""
    ids, values = _largest(scores, k)
    if log_p is not None:
        return ids, values - scores.gather(1, token) + log_p
    shifted = torch.sub(scores, values[:, :1], out=_buffer(scores, 3))
    return ids, values - values[:, :1] - shifted.exp_().sum(1, keepdim=True).log()


def _largest(scores: Scores, k: int) -> Top:
    """Ids and values of the k largest."""
    rows, vocab = scores.shape
    blocks = vocab // _BLOCK
    if blocks <= k:
        values, ids = scores.topk(min(k, vocab))
        return ids, values
    whole = scores[:, : blocks * _BLOCK].view(rows, blocks, _BLOCK)
    best = whole.amax(-1).topk(k).indices[..., None] * _BLOCK
    inside = torch.arange(_BLOCK, device=scores.device)
    rest = torch.arange(blocks * _BLOCK, vocab, device=scores.device).expand(rows, -1)
    places = torch.cat([(best + inside).flatten(1), rest], 1)
    values, chosen = scores.gather(1, places).topk(k)
    return places.gather(1, chosen), values


class _Buffers(threading.local):
    """Of one thread: fresh memory for a row costs a CPU more than the arithmetic."""

    def __init__(self) -> None:
        self.of: dict[int, Scores] = {}


_buffers = _Buffers()


def _buffer(like: Float[Tensor, "rows vocab"], slot: int) -> Scores:
    """A float32 tensor of the same shape, which the next call for this slot overwrites."""
    if like.device.type != "cpu":
        return torch.empty_like(like, dtype=torch.float32)
    kept = _buffers.of.get(slot)
    if kept is None or kept.shape != like.shape:
        with torch.inference_mode(False):  # usable inside and outside of it
            kept = _buffers.of[slot] = torch.empty(like.shape, dtype=torch.float32)
    return kept
