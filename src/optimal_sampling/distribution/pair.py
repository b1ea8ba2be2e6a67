"""Student and teacher over one batch of positions, and the moments of their mixtures.

With p_student and p_teacher on their common support, d = log p_teacher - log p_student and

    F(alpha) = log sum p_student^(1-alpha) p_teacher^alpha,

F'(alpha) = E_q[d] = KL(q||p_student) - KL(q||p_teacher) and F''(alpha) = Var_q[d]. Knows nothing of how alpha is
chosen or a token is drawn.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Float32
from torch import Tensor

from optimal_sampling.distribution.support import keep_largest
from optimal_sampling.distribution.tiles import (
    FLOOR,
    LEAST,
    Block,
    Rows,
    namespace,
    rows_of,
    stack,
    tensor_of,
    workspace,
)

__all__ = ["Moments", "Pair"]

_UNDERFLOW = 1e-12  # a sum below this is taken again, relative to the largest term


@dataclass(frozen=True)
class Moments:
    """Of the mixture q at one alpha per row; nats, float64."""

    alpha: Rows
    F: Rows
    """log of the sum of p_student^(1-alpha) p_teacher^alpha; at most 0 for alpha in [0, 1]."""
    slope: Rows
    """F' = E_q[d] = KL(q||p_student) - KL(q||p_teacher)."""
    curvature: Rows
    """F'' = Var_q[d]."""
    entropy: Rows
    """H(q)."""
    log_sum: Rows
    """log_q of a token is its score (`Pair.scores`) less this."""

    @property
    def kl_student(self) -> Rows:
        """KL(q||p_student)."""
        return self.alpha * self.slope - self.F

    @property
    def kl_teacher(self) -> Rows:
        """KL(q||p_teacher)."""
        return (self.alpha - 1) * self.slope - self.F


class Pair:
    """Two rows of logits per position, as they are used: divided by the temperature, restricted, normalised.

    Kept shifted by their largest value, with log Z beside them. Where supports differ, both are cut to the common
    one, on which q lives for 0 < alpha < 1; `restore` brings one model back whole for alpha = 0 or 1.
    A pair borrows the buffers of its thread's workspace: only the newest of a shape is valid.
    """

    def __init__(
        self,
        student_logits: Float[Tensor, "rows vocab"],
        teacher_logits: Float[Tensor, "rows vocab"],
        temperature: float = 1.0,
        support_top_k: int = -1,
        support_top_p: float = 1.0,
    ) -> None:
        rows, vocab = student_logits.shape
        self.rows, self.vocab, self.device = rows, vocab, student_logits.device
        self.on_cpu, self.xp = self.device.type == "cpu", namespace(self.device)
        self.space = workspace(rows, vocab, self.device)
        self.models = self.space.both[:, :, :vocab]
        self._load(student_logits, teacher_logits, temperature)
        self._find_bad()
        if support_top_k > 0 or support_top_p < 1:
            self._restrict(support_top_k, support_top_p)
        self._normalise()
        self._meet()
        self.passes = self.full(0.0)
        """Passes over the vocabulary that each row has cost, those for normalising not counted (CPU only)."""
        self._last: Moments | None = None
        self._relative = False
        self.space.shift.zero_()

    def full(self, value: float) -> Rows:
        """The same number for every row."""
        if self.on_cpu:
            return self.xp.full(self.rows, value, dtype=self.xp.float64)
        return torch.full((self.rows,), value, dtype=torch.float64, device=self.device)

    def none(self, flags: Rows) -> bool:
        """True where it is known that no flag is set. An accelerator is not waited for."""
        return self.on_cpu and not flags.any()

    # ------------------------------------------------------------------------------------------ loading

    def _load(self, student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> None:
        """Copy, divide by the temperature, floor."""
        for block in self.space.blocks:
            for logits, kept in zip((student_logits, teacher_logits), block.inside, strict=True):
                if logits.dtype == torch.float32 and temperature == 1:
                    torch.clamp(logits[block.rows, block.columns], min=FLOOR, out=kept)
                else:
                    kept.copy_(logits[block.rows, block.columns])
                    kept.mul_(1 / temperature).clamp_(min=FLOOR)
            self.xp.amax(block.inside_rows, -1, out=block.per_model_rows)

    def _find_bad(self) -> None:
        """Rows that are no distribution become harmless: the two models agree on them."""
        largest = self.xp.amax(self.space.per_model_rows, -1)
        bad = ~((largest > FLOOR / 2) & (largest < float("inf")))  # true for NaN
        self.bad_student, self.bad_teacher = bad
        self.bad = self.bad_student | self.bad_teacher
        if not self.none(self.bad):
            bad_rows = tensor_of(self.bad)[:, None]
            self.models.masked_fill_(bad_rows, 0.0)
            self.space.per_model.masked_fill_(bad_rows, 0.0)

    def _restrict(self, top_k: int, top_p: float) -> None:
        """Cut both models to the teacher's top-k and top-p tokens."""
        keep = keep_largest(self.models[1], top_k, top_p)
        self.models.masked_fill_(~keep, FLOOR)
        for block in self.space.blocks:
            self.xp.amax(block.inside_rows, -1, out=block.per_model_rows)

    def _normalise(self) -> None:
        """Shift by the largest value; log Z; and whether any logit is -inf."""
        space, xp = self.space, self.xp
        maximum = xp.amax(space.per_model_rows, -1)
        self.no_student = maximum[0] < FLOOR / 2
        maximum = xp.where(maximum < FLOOR / 2, 0.0 * maximum, maximum)  # a student without the teacher's support
        space.maximum.copy_(tensor_of(maximum)[..., None])
        least, self._deep = [], []
        for block in space.blocks:
            block.inside.sub_(block.maximum)
            least.append(xp.amin(block.inside_rows, -1))
            self._deep.append(not self.on_cpu or bool((least[-1] < LEAST).any()))
            terms = torch.clamp(block.both, min=LEAST, out=block.scratch[:2]) if self._deep[-1] else block.both
            torch.exp(terms, out=block.scratch[:2])
            torch.sum(block.scratch[:2], -1, out=block.per_model)
        log_z = xp.log(space.per_model_rows.sum(-1, dtype=xp.float64))
        self.log_z: tuple[Rows, Rows] = (log_z[0], log_z[1])
        self.offset: tuple[Rows, Rows] = (maximum[0] + log_z[0], maximum[1] + log_z[1])
        """log p of a token is its logit, divided by the temperature, less this."""
        self.gap = log_z[1] - log_z[0]  # d = teacher - student - gap
        floored = self._by_row(least) < FLOOR / 2
        self._floored = floored[0] | floored[1]

    def _by_row(self, of_blocks: list[Rows]) -> Rows:
        """Least over the tiles of a row, from one [2, n] per block."""
        whole = self.xp.concatenate(of_blocks, -1) if of_blocks else self.xp.zeros((2, 0))
        return self.xp.amin(whole.reshape(2, self.rows, -1), -1) if self.space.tiles > 1 else whole

    def _meet(self) -> None:
        """Cut both models to their common support."""
        self.student_misses = self.teacher_misses = self.disjoint = self.use_student = self.use_teacher = (
            self.bad & False
        )
        if self.none(self._floored):
            return
        has_student, has_teacher = self.models > FLOOR / 2
        common = has_student & has_teacher
        self.student_misses = rows_of((has_teacher & ~has_student).any(-1))
        self.teacher_misses = rows_of((has_student & ~has_teacher).any(-1))
        self.disjoint = rows_of(~common.any(-1))
        self._whole = self.models.clone()
        self.models.masked_fill_(~common, FLOOR)
        self.models.masked_fill_(tensor_of(self.disjoint)[:, None], 0.0)  # harmless until `restore`

    def restore(self, alpha: Rows) -> None:
        """Give the rows with alpha = 1 the teacher's whole support, and those with alpha = 0 the student's."""
        self.use_teacher = (alpha == 1) & (self.student_misses | self.disjoint)
        self.use_student = (alpha == 0) & (self.teacher_misses | self.disjoint)
        if self.none(self.use_teacher | self.use_student):
            return
        where, (student_z, teacher_z) = self.xp.where, self.log_z
        for use, model in ((self.use_student, 0), (self.use_teacher, 1)):
            self.models.copy_(torch.where(tensor_of(use)[:, None], self._whole[model], self.models))
        self.log_z = where(self.use_teacher, teacher_z, student_z), where(self.use_student, student_z, teacher_z)
        self.gap = self.log_z[1] - self.log_z[0]
        self._last = None

    # ------------------------------------------------------------------------------------------ mixtures

    def moments(self, alpha: Rows) -> Moments:
        """One pass over the vocabulary, for the rows whose alpha is not that of the call before.

        alpha is rounded to float32, in which the mixture is taken.
        """
        xp = self.xp
        alpha = xp.asarray(xp.asarray(alpha, dtype=xp.float32), dtype=xp.float64)
        changed = ~self.bad | True if self._last is None else alpha != self._last.alpha
        if self._last is not None and self.none(changed):
            return self._last
        self.passes = self.passes + changed
        self._set_weight(alpha)
        self._sweep(changed)
        self._last = self._collect(alpha)
        return self._last

    def _set_weight(self, alpha: Rows) -> None:
        self.space.weight_rows[:, 0] = alpha

    def _sweep(self, changed: Rows) -> None:
        """The sums of every block with a changed row; where they underflow, relative to the largest term."""
        space, flags = self.space, changed.tolist() if self.on_cpu else None
        if flags is None:
            for block in space.blocks:
                self._sums(block, True, relative=True)
            return
        for block, deep in zip(space.blocks, self._deep, strict=True):
            if any(flags[block.rows]):
                if self._relative:
                    block.shift.zero_()
                self._sums(block, deep)
        underflow = space.sums_rows[0].sum(-1) < _UNDERFLOW
        if not underflow.any():
            return
        self._relative = True
        for block in space.blocks:
            if underflow[block.rows].any():
                self._sums(block, True, relative=underflow[block.rows, None])

    def _sums(self, block: Block, deep: bool, relative: Rows | bool | None = None) -> None:
        """Sums of w, w x, w d and w d^2, with x = (1-alpha) student + alpha teacher and w = exp(x - shift)."""
        w, x, d, dd = block.scratch
        torch.lerp(block.student, block.teacher, block.weight, out=x)
        if relative is not None:
            x[:, block.inner.stop :] = FLOOR
            torch.amax(x, -1, keepdim=True, out=block.shift)
            rows_of(block.shift)[...] *= relative
            torch.exp(torch.sub(x, block.shift, out=w).clamp_(min=LEAST), out=w)
        else:
            torch.exp(x.clamp_(min=LEAST) if deep else x, out=w)
        torch.sub(block.teacher, block.student, out=d)
        torch.mul(d, d, out=dd)
        block.scratch[1:].mul_(w)
        torch.sum(block.scratch, -1, out=block.sums)

    def _collect(self, alpha: Rows) -> Moments:
        """Add up the tiles of each row."""
        xp = self.xp
        totals, top = self._totals(self.space.sums_rows, self.space.shift_rows)
        mean_x, mean_d, mean_dd = totals[1:] / totals[0]
        log_sum = xp.log(totals[0]) + top
        return Moments(
            alpha=alpha,
            F=log_sum - self.log_z[0] - alpha * self.gap,
            slope=mean_d - self.gap,
            curvature=mean_dd - mean_d * mean_d,
            entropy=log_sum - mean_x,
            log_sum=log_sum,
        )

    def _totals(self, sums: Rows, shift: Rows) -> tuple[Rows, Rows]:
        """Sums over the tiles of a row, relative to exp(top), and top. [..., rows, tiles] -> [..., rows]."""
        xp = self.xp
        if self.space.tiles == 1:
            return xp.asarray(sums[..., 0], dtype=xp.float64), shift[..., 0]
        top = xp.amax(shift, -1)
        scale = xp.exp(xp.asarray(shift - top[..., None], dtype=xp.float64))
        return (sums * scale).sum(-1), top

    def partitions(self, beta: Rows, other: Rows) -> tuple[Rows, Rows]:
        """F(beta) and F(other), for any real numbers; 0 at 0 and at 1 on a common support, without a sweep."""
        xp, space = self.xp, self.space
        betas = stack([beta, other])
        known = ((betas == 0) | (betas == 1)) & ~(self.student_misses | self.teacher_misses)
        needed = ~(known[0] & known[1])
        space.betas_rows[..., 0] = betas
        for block in space.blocks:
            if not self.none(needed[block.rows]):
                x = block.scratch[:2]
                torch.lerp(block.student, block.teacher, block.betas, out=x)
                x[..., block.inner.stop :] = FLOOR
                torch.amax(x, -1, out=block.shift_per_model)
                x.sub_(block.shift_per_model[..., None]).clamp_(min=LEAST).exp_()
                torch.sum(x, -1, out=block.per_model)
        totals, top = self._totals(space.per_model_rows, rows_of(space.shift_per_model))
        F = xp.where(known, 0.0, xp.log(totals) + top - self.log_z[0] - betas * self.gap)
        return F[0], F[1]

    def scores(self, block: Block) -> Float32[Tensor, "n width"]:
        """x = log q + log_sum of one block at the alpha of the last `moments`, in the block's scratch."""
        x = block.scratch[0]
        torch.lerp(block.student, block.teacher, block.weight, out=x)
        return x[:, block.inner]
