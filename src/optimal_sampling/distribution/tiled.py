"""A pair over a large vocabulary, or on an accelerator: float32, in tiles that stay near a CPU's cache.

A pair borrows the buffers of its thread's workspace: only the newest of a shape is valid.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float32, Int64
from torch import Tensor

from optimal_sampling.distribution.pair import Moments, Pair
from optimal_sampling.distribution.tiles import (
    FLOOR,
    LEAST,
    Block,
    Rows,
    argmax,
    dot,
    rows_of,
    stack,
    tensor_of,
    workspace,
)

__all__ = ["TiledPair"]

_UNDERFLOW = 1e-12  # a sum below this is taken again, relative to the largest term


class TiledPair(Pair):
    """See `Pair`."""

    def _load(self, student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> None:
        self._logits, self._temperature = (student_logits, teacher_logits), temperature
        self.space = workspace(self.rows, self.vocab, self.device)
        self.space.shift.zero_()
        self._relative = False
        self.models = self.space.both[:, :, : self.vocab]
        self._shifted: Rows = 0.0
        self._shift(self._copied)

    def _measure(self) -> None:
        self._shift(lambda block, model: block.inside[model])

    def _shift(self, source: Callable[[Block, int], Tensor]) -> None:
        """Shift every row of `source` by its largest, into `models`, and sum its exp: while it is near the cache."""
        space, xp = self.space, self.xp
        self._deep = []
        for band in space.bands:
            rows = band[0].rows
            sources = [self._ranged(block, source) for block in band]
            top, least = xp.amax(space.most[:, rows], -1), xp.amin(space.least[:, rows], -1)
            usual = (top > FLOOR / 2) & (
                top < float("inf")
            )  # else bad, or a student without the teacher's support
            space.maximum_rows[:, rows, 0] = top = xp.where(
                usual, top, 0 * space.maximum_rows[:, rows, 0]
            )
            deep = not self.on_cpu or not bool((least - top >= LEAST).all())  # true for NaN
            self._deep += [deep] * len(band)
            for block, models in zip(band, sources, strict=True):
                self._exponentiate(block, models, deep)
        self.largest, floored = xp.amax(space.most, -1), xp.amin(space.least, -1) < FLOOR / 2
        self.floored = floored[0] | floored[1]
        self._shifted = self._shifted + space.maximum_rows[..., 0]

    def _copied(self, block: Block, model: int) -> Tensor:
        """A model's logits in one block, divided by the temperature; no copy where they can be used as they are."""
        logits = self._logits[model][block.rows, block.columns]
        if logits.dtype == torch.float32 and self._temperature == 1:
            return logits
        return block.inside[model].copy_(logits).mul_(1 / self._temperature)

    def _ranged(self, block: Block, source: Callable[[Block, int], Tensor]) -> list[Tensor]:
        """Both models in one block; notes their largest and least."""
        models = [source(block, 0), source(block, 1)]
        for x, most, least in zip(models, block.most, block.least, strict=True):
            rows = rows_of(x)
            self.xp.amax(rows, -1, out=most)
            self.xp.amin(rows, -1, out=least)
        return models

    def _exponentiate(self, block: Block, models: list[Tensor], deep: bool) -> None:
        for x, maximum, kept in zip(models, block.maximum, block.inside, strict=True):
            torch.sub(torch.clamp(x, min=FLOOR, out=kept) if deep else x, maximum, out=kept)
        terms = torch.clamp(block.both, min=LEAST, out=block.scratch) if deep else block.both
        torch.sum(torch.exp(terms, out=block.scratch), -1, out=block.per_model)

    def _normalise(self) -> None:
        xp = self.xp
        self.no_student = self.largest[0] < FLOOR / 2
        log_z = xp.log(self.space.per_model_rows.sum(-1, dtype=xp.float64))
        self.log_z = (log_z[0], log_z[1])
        self.offset = (self._shifted[0] + log_z[0], self._shifted[1] + log_z[1])

    def _moments(self, alpha: Rows, changed: Rows) -> Moments:
        self.space.weight_rows[:, 0] = alpha
        self._sweep(changed)
        return self._collect(alpha)

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
        """Sums of w, w x, w d, w d^2 and w d^3, with x = (1-alpha) student + alpha teacher and w = exp(x - shift)."""
        x, w = block.x, block.w
        torch.lerp(block.student, block.teacher, block.weight, out=x)
        if relative is not None:
            x[:, block.inner.stop :] = FLOOR
            torch.amax(x, -1, keepdim=True, out=block.shift)
            rows_of(block.shift)[...] *= relative
            torch.exp(torch.sub(x, block.shift, out=w).clamp_(min=LEAST), out=w)
        else:
            torch.exp(x.clamp_(min=LEAST) if deep else x, out=w)
        torch.sum(w, -1, out=block.sums[0])
        dot(block.w_rows, block.x_rows, out=block.sums_rows[1])
        d = torch.sub(block.teacher, block.student, out=x)
        torch.sum(w.mul_(d), -1, out=block.sums[2])
        torch.sum(w.mul_(d), -1, out=block.sums[3])
        dot(block.w_rows, block.x_rows, out=block.sums_rows[4])

    def _collect(self, alpha: Rows) -> Moments:
        """Add up the tiles of each row."""
        xp = self.xp
        totals, top = self._totals(self.space.sums_rows, self.space.shift_rows)
        mean_x, mean_d, mean_dd, mean_ddd = totals[1:] / totals[0]
        self._log_sum = log_sum = xp.log(totals[0]) + top
        self._entropy = log_sum - mean_x
        variance = mean_dd - mean_d * mean_d
        return Moments(
            alpha=alpha,
            F=log_sum - self.log_z[0] - alpha * self.gap,
            slope=mean_d - self.gap,
            curvature=variance,
            third=mean_ddd - mean_d * (3 * variance + mean_d * mean_d),
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
        """See `Pair`."""
        xp, space = self.xp, self.space
        betas = stack([beta, other])
        known = ((betas == 0) | (betas == 1)) & ~(self.student_misses | self.teacher_misses)
        needed = ~(known[0] & known[1])
        space.betas_rows[..., 0] = betas
        space.shift_per_model.zero_()
        for block in space.blocks:
            if not self.none(needed[block.rows]):
                self._partition(block, None if self.on_cpu else True)
        sums = space.per_model_rows.sum(-1)
        far = needed & ~((sums > _UNDERFLOW) & (sums < float("inf")))
        for block in [] if self.none(far) or not self.on_cpu else space.blocks:
            if far[:, block.rows].any():
                self._partition(block, far[:, block.rows])
        totals, top = self._totals(space.per_model_rows, rows_of(space.shift_per_model))
        F = xp.where(known, 0.0, xp.log(totals) + top - self.log_z[0] - betas * self.gap)
        return F[0], F[1]

    def _partition(self, block: Block, relative: Rows | bool | None) -> None:
        """Sums of exp(x - shift) at both betas, where `relative` with the largest x as shift."""
        x = torch.lerp(block.student, block.teacher, block.betas, out=block.scratch)
        if relative is not None:
            x[..., block.inner.stop :] = FLOOR
            torch.amax(x, -1, out=block.shift_per_model)
            rows_of(block.shift_per_model)[...] *= relative
            x.sub_(block.shift_per_model[..., None])
        torch.sum(x.clamp_(min=LEAST).exp_(), -1, out=block.per_model)

    def _scores(self, block: Block) -> Float32[Tensor, "n width"]:
        """x = log q + log_sum of one block at the alpha of the last `moments`, in the block's scratch."""
        x = block.x
        torch.lerp(block.student, block.teacher, block.weight, out=x)
        return x[:, block.inner]

    def entropy(self) -> Rows:
        """See `Pair`."""
        return self._entropy

    def draw(self, noise: Float32[Tensor, "rows vocab"]) -> tuple[Int64[Tensor, " rows"], Rows]:
        """See `Pair`."""
        tokens, winners = [], []
        for block in self.space.blocks:
            y = block.w[:, block.inner]
            torch.add(self._scores(block), noise[block.rows, block.columns], out=y)
            best = argmax(y)
            tokens.append(best + block.columns.start)
            winners.append(block.scratch.gather(-1, best.expand(2, -1)[..., None]))  # of x and y
        if not tokens:
            return torch.zeros(0, dtype=torch.int64, device=self.device), self._log_sum
        token, (score, value) = torch.cat(tokens), torch.cat(winners, 1)[..., 0]
        if self.space.tiles > 1:
            shape = self.rows, self.space.tiles
            tile = value.view(shape).argmax(-1, keepdim=True)
            token, score = (part.view(shape).gather(-1, tile)[:, 0] for part in (token, score))
        return token, rows_of(score) - self._log_sum

    def log_q(self) -> Float32[Tensor, "rows vocab"]:
        """See `Pair`."""
        log_q = torch.empty(self.rows, self.vocab, device=self.device)
        log_sum = tensor_of(self._log_sum).to(log_q.dtype)[
            :, None
        ]  # in float64 this would take three times as long
        for block in self.space.blocks:
            torch.sub(
                self._scores(block), log_sum[block.rows], out=log_q[block.rows, block.columns]
            )
        return torch.threshold_(log_q, FLOOR / 2, -torch.inf)

    def token_log_p(self, token: Int64[Tensor, " rows"]) -> tuple[Rows, Rows]:
        """See `Pair`."""
        student, teacher = (
            rows_of(logits.gather(-1, token[:, None])[:, 0].to(torch.float64)) / self._temperature
            for logits in self._logits
        )
        return student - self.offset[0], teacher - self.offset[1]
