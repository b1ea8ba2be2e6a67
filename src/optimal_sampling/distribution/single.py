"""One model alone, in the form of a solved pair: the same noise, temperature and truncation."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Float32, Int64
from torch import Tensor

from optimal_sampling.distribution.arrays import (
    Array,
    argmax,
    array_of,
    namespace,
    tensor_of,
    uses_numpy,
)
from optimal_sampling.distribution.pair import Moments

__all__ = ["SingleModel"]


@dataclass(frozen=True, slots=True, eq=False)
class SingleMoments(Moments):
    """alpha is 0 or 1; what takes two models is NaN."""

    log_p: Float32[Tensor, "rows vocab"]

    @property
    def entropy(self) -> Array:
        """Not taken: it would cost a pass."""
        return self.F

    def draw(self, noise: Float32[Tensor, "rows vocab"]) -> tuple[Int64[Tensor, " rows"], Array]:
        """argmax(log p + noise) and its log p."""
        token = argmax(self.log_p + noise)
        return token, array_of(self.log_p.gather(-1, token[:, None])[:, 0].to(torch.float64))

    def log_q(self) -> Float32[Tensor, "rows vocab"]:
        """log p, to be changed at will."""
        return self.log_p.clone()

    def renormalise(self, scores: Float32[Tensor, "rows vocab"]) -> Float32[Tensor, "rows vocab"]:
        """Log-probabilities of what truncation has left."""
        return scores.log_softmax(-1)


class SingleModel:
    """A model's log-probabilities, [rows, vocab], and which rows are bad."""

    def __init__(self, logits: Float[Tensor, "rows vocab"], temperature: float, role: str) -> None:
        self.xp = namespace(logits.device)
        self.vocab = logits.shape[1]
        log_p = (logits.to(torch.float32) / temperature).log_softmax(-1)
        is_teacher = torch.full(log_p.shape[:1], role == "teacher", device=logits.device)
        bad = log_p[:, 0].isnan()  # then all of the row are
        self.bad = array_of(bad)
        self.bad_student = array_of(bad & ~is_teacher)
        self.bad_teacher = array_of(bad & is_teacher)
        self.use_student = self.use_teacher = array_of(bad & False)
        self.maybe_bad = not uses_numpy(logits.device) or bool(bad.any())
        self.maybe_masked = False
        unknown = self.full(float("nan"))
        self.moments = SingleMoments(
            alpha=array_of(is_teacher.to(torch.float64)),
            F=unknown,
            slope=unknown,
            curvature=unknown,
            third=unknown,
            log_sum=unknown,
            log_p=log_p,
        )

    def full(self, value: float) -> Array:
        """The same number for every row."""
        return array_of(torch.full_like(tensor_of(self.bad), value, dtype=torch.float64))

    def token_log_p(self, token: Int64[Tensor, " rows"]) -> tuple[Array, Array]:
        """log p of tokens under student and teacher; NaN for the model that is not here."""
        log_p = self.moments.log_p.gather(-1, token[:, None])[:, 0]
        own = array_of(log_p.to(torch.float64))
        teacher = self.moments.alpha == 1
        where = self.xp.where
        unknown = self.moments.F
        return where(teacher, unknown, own), where(teacher, own, unknown)
