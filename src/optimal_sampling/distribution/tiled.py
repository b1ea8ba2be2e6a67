"""A pair over a large vocabulary, or on an accelerator: float32, in tiles that stay near a CPU's cache.

A pair borrows the buffers of its thread's workspace: only the newest of a shape is valid.
"""

from __future__ import annotations

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
        for block in self.space.blocks:
            for logits, kept in zip(self._logits, block.inside, strict=True):
                if logits.dtype == torch.float32 and temperature == 1:
                    torch.clamp(logits[block.rows, block.columns], min=FLOOR, out=kept)
                else:
                    kept.copy_(logits[block.rows, block.columns])
                    kept.mul_(1 / temperature).clamp_(min=FLOOR)
            self.xp.amax(block.inside_rows, -1, out=block.per_model_rows)
        self.largest = self.xp.amax(self.space.per_model_rows, -1)

    def _measure(self) -> None:
        for block in self.space.blocks:
            self.xp.amax(block.inside_rows, -1, out=block.per_model_rows)
        self.largest = self.xp.amax(self.space.per_model_rows, -1)

    def _normalise(self) -> None:
        space, xp = self.space, self.xp
        maximum = self.largest
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
        self.log_z = (log_z[0], log_z[1])
        self.offset = (maximum[0] + log_z[0], maximum[1] + log_z[1])
        floored = self._by_row(least) < FLOOR / 2
        self.floored = floored[0] | floored[1]

    def _by_row(self, of_blocks: list[Rows]) -> Rows:
        """Least over the tiles of a row, from one [2, n] per block."""
        whole = self.xp.concatenate(of_blocks, -1) if of_blocks else self.xp.zeros((2, 0))
        return self.xp.amin(whole.reshape(2, self.rows, -1), -1) if self.space.tiles > 1 else whole

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
        w, x, d, dd, ddd = block.scratch
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
        torch.mul(dd, d, out=ddd)
        block.scratch[1:].mul_(w)
        torch.sum(block.scratch, -1, out=block.sums)

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

    def _scores(self, block: Block) -> Float32[Tensor, "n width"]:
        """x = log q + log_sum of one block at the alpha of the last `moments`, in the block's scratch."""
        x = block.scratch[0]
        torch.lerp(block.student, block.teacher, block.weight, out=x)
        return x[:, block.inner]

    def entropy(self) -> Rows:
        """See `Pair`."""
        return self._entropy

    def draw(self, noise: Float32[Tensor, "rows vocab"]) -> tuple[Int64[Tensor, " rows"], Rows]:
        """See `Pair`."""
        winners = []
        for block in self.space.blocks:
            x = self._scores(block)
            y = torch.add(x, noise[block.rows, block.columns], out=block.scratch[1][:, block.inner])
            best = argmax(y)[:, None]
            winners.append((best[:, 0] + block.columns.start, x.gather(-1, best), y.gather(-1, best)))
        if not winners:
            return torch.zeros(0, dtype=torch.int64, device=self.device), self._log_sum
        token, score, value = (torch.cat([w.reshape(-1) for w in part]) for part in zip(*winners, strict=True))
        if self.space.tiles > 1:
            shape = self.rows, self.space.tiles
            tile = value.view(shape).argmax(-1, keepdim=True)
            token, score = (part.view(shape).gather(-1, tile)[:, 0] for part in (token, score))
        return token, rows_of(score) - self._log_sum

    def log_q(self) -> Float32[Tensor, "rows vocab"]:
        """See `Pair`."""
        log_q = torch.empty(self.rows, self.vocab, device=self.device)
        log_sum = tensor_of(self._log_sum).to(log_q.dtype)[:, None]  # in float64 this would take three times as long
        for block in self.space.blocks:
            torch.sub(self._scores(block), log_sum[block.rows], out=log_q[block.rows, block.columns])
        return torch.threshold_(log_q, FLOOR / 2, -torch.inf)

    def token_log_p(self, token: Int64[Tensor, " rows"]) -> tuple[Rows, Rows]:
        """See `Pair`."""
        student, teacher = (
            rows_of(logits.gather(-1, token[:, None])[:, 0].to(torch.float64)) / self._temperature
            for logits in self._logits
        )
        return student - self.offset[0], teacher - self.offset[1]
