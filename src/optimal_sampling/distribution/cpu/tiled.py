"""A pair over a large vocabulary, or on an accelerator: float32, in tiles near a CPU's cache.

A pair borrows the buffers of its thread's workspace: only the newest of a shape can be used, and
an older one raises RuntimeError.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from optimal_sampling.distribution.arrays import (
    Array,
    Flags,
    Scores,
    Tokens,
    argmax,
    array_of,
    dot,
    tensor_of,
    values_of,
)
from optimal_sampling.distribution.cpu.workspace import (
    MIN_EXPONENT,
    Block,
    Loan,
    Tile,
    Workspace,
    borrow,
)
from optimal_sampling.distribution.pair import MASKED, MASKED_LOGIT, Moments, Pair

__all__ = ["TiledPair"]

_UNDERFLOW = 1e-12  # a sum below this is taken again, relative to the largest term


@dataclass(slots=True, eq=False)
class TiledMoments(Moments):
    """With E_q[score], and the buffers that hold the models."""

    mean_score: Array
    loan: Loan

    @property
    def entropy(self) -> Array:
        """H(q)."""
        return self.log_sum - self.mean_score

    def draw(self, noise: Scores) -> tuple[Tokens, Array]:
        """argmax(log q + noise) and its log q."""
        space = self._weighted()
        tokens = [torch.zeros(0, dtype=torch.int64, device=space.device)]
        winners = [torch.zeros(2, 0, 1, device=space.device)]
        for block in space.blocks:
            noisy = block.w[:, block.inner]
            torch.add(_scores(block), noise[block.rows, block.columns], out=noisy)
            best = argmax(noisy)
            tokens.append(best + block.columns.start)
            # of the score and of the noisy score
            both = best.expand(2, -1)[..., None]
            winners.append(block.scratch.gather(-1, both))
        token = torch.cat(tokens)
        score, noisy = torch.cat(winners, 1)[..., 0]
        if space.tiles > 1:
            shape = space.rows, space.tiles
            tile = noisy.view(shape).argmax(-1, keepdim=True)
            token = token.view(shape).gather(-1, tile).squeeze(-1)
            score = score.view(shape).gather(-1, tile).squeeze(-1)
        return token, array_of(score) - self.log_sum

    def log_q(self) -> Scores:
        """The normalised mixture."""
        space = self._weighted()
        log_q = torch.empty(space.rows, space.vocab, device=space.device)
        # in float64 this would take three times as long
        log_sum = tensor_of(self.log_sum).to(log_q.dtype)[:, None]
        for block in space.blocks:
            out = log_q[block.rows, block.columns]
            torch.sub(_scores(block), log_sum[block.rows], out=out)
        return torch.threshold_(log_q, MASKED, -torch.inf)

    def _weighted(self) -> Workspace:
        """The buffers, with this alpha as weight."""
        space = self.loan.space
        space.weight_array[:, 0] = self.alpha
        return space


class TiledPair(Pair):
    """A pair of float32 tensors in the buffers of a workspace."""

    def _load(self, student_logits: Tensor, teacher_logits: Tensor) -> None:
        self._logits = (student_logits, teacher_logits)
        self._loan = borrow(self.rows, self.vocab, self.device)
        self.space.shift.zero_()
        self._relative = False
        self._shifted: Array | float = 0.0
        self._shift(self._given, 1 / self.temperature)

    @property
    def space(self) -> Workspace:
        """The buffers; RuntimeError where a newer pair of this shape has them."""
        return self._loan.space

    @property
    def models(self) -> Float[Tensor, "2 rows vocab"]:
        """Student and teacher, without the padding."""
        return self.space.both[:, :, : self.vocab]

    def _measure(self) -> None:
        self._shift(lambda block, model: block.inside[model])

    def _shift(self, source: Callable[[Block, int], Tensor], scale: float = 1.0) -> None:
        """Shift the rows of `source` by their largest, into `models`, and sum their exponentials.

        Band by band, while the numbers are near the cache. `scale`: multiplied with after the
        shift, which keeps the digits of what lies near the largest.
        """
        space = self.space
        xp = self.xp
        self._underflows: list[bool] = []
        for band in space.bands:
            rows = band[0].rows
            sources = [self._ranged(block, source) for block in band]
            top = xp.amax(space.most[:, rows], -1)
            least = xp.amin(space.least[:, rows], -1)
            # otherwise bad, or a student without the teacher's support
            usual = (top > MASKED) & (top < float("inf"))
            top = xp.where(usual, top, 0.0)
            space.maximum_array[:, rows, 0] = top
            # true for NaN
            underflows = not self.on_cpu or not (scale * (least - top) >= MIN_EXPONENT).all()
            self._underflows += [underflows] * len(band)
            for block, models in zip(band, sources, strict=True):
                self._exponentiate(block, models, underflows, scale)
        self.largest = xp.amax(space.most, -1)
        masked = xp.amin(space.least, -1) < MASKED
        self.maybe_masked = not self.none(masked)
        tops = xp.asarray(space.maximum_array[..., 0], dtype=xp.float64)
        self._shifted = self._shifted + tops * scale

    def _given(self, block: Block, model: int) -> Tensor:
        """A model's logits in one block, as they were given; a view where they are float32."""
        logits = self._logits[model][block.rows, block.columns]
        return logits if logits.dtype == torch.float32 else block.inside[model].copy_(logits)

    def _ranged(self, block: Block, source: Callable[[Block, int], Tensor]) -> list[Tensor]:
        """Both models in one block; notes their largest and least."""
        models = [source(block, 0), source(block, 1)]
        for x, most, least in zip(models, block.most, block.least, strict=True):
            array = array_of(x)
            self.xp.amax(array, -1, out=most)
            self.xp.amin(array, -1, out=least)
        return models

    def _exponentiate(
        self, block: Block, models: list[Tensor], underflows: bool, scale: float
    ) -> None:
        for x, maximum, kept in zip(models, block.maximum, block.inside, strict=True):
            # before the scale, which could lift what stands for -inf above MASKED
            masked = x < MASKED if underflows and scale != 1 else None
            finite = torch.clamp(x, min=MASKED_LOGIT, out=kept) if underflows else x
            torch.sub(finite, maximum, out=kept)
            if scale != 1:
                kept.mul_(scale)
            if masked is not None:
                kept.masked_fill_(masked, MASKED_LOGIT)
        terms = block.both
        if underflows:
            terms = torch.clamp(terms, min=MIN_EXPONENT, out=block.scratch)
        torch.exp(terms, out=block.scratch)
        torch.sum(block.scratch, -1, out=block.per_model)

    def _normalise(self) -> None:
        self.no_student = self.largest[0] < MASKED
        xp = self.xp
        sums = xp.sum(self.space.per_model_array, -1, dtype=xp.float64)
        log_z = xp.log(sums)
        self.log_z = tuple(log_z)
        self.offset = tuple(self._shifted + log_z)

    def _moments(self, alpha: Array, changed: Flags) -> Moments:
        space = self.space
        space.weight_array[:, 0] = alpha
        if self.on_cpu:
            self._sweep(changed)
        else:
            everywhere = self.bad | True
            for block in space.blocks:
                self._sums(block, True, everywhere[block.rows, None])
        totals, top = self._totals(space.sums_array, space.shift_array)
        mean_score, *means = totals[1:] / totals[0]
        log_sum = self.xp.log(totals[0]) + top
        derivatives = self._derivatives(alpha, log_sum, means)
        return TiledMoments(*derivatives, log_sum, mean_score, self._loan)

    def _sweep(self, changed: Flags) -> None:
        """Take the sums of blocks with a changed row; again, relative, where they underflow."""
        space = self.space
        flags = changed.tolist()
        for block, underflows in zip(space.blocks, self._underflows, strict=True):
            if any(flags[block.rows]):
                if self._relative:
                    block.shift.zero_()
                self._sums(block, underflows)
        underflow = self.xp.sum(space.sums_array[0], -1) < _UNDERFLOW
        if not underflow.any():
            return
        self._relative = True
        usual = space.sums_array.copy()
        for block in space.blocks:
            relative = underflow[block.rows, None]
            if relative.any():
                self._sums(block, True, relative)
        # relative sums do not clamp the score: they have other bits
        space.sums_array[:, ~underflow] = usual[:, ~underflow]

    def _sums(self, block: Block, underflows: bool, relative: Flags | None = None) -> None:
        """Sums of w, w score, w d, w d^2 and w d^3, with w = exp(score - shift)."""
        score = block.x
        w = block.w
        torch.lerp(block.student, block.teacher, block.weight, out=score)
        if relative is not None:
            score[:, block.inner.stop :] = MASKED_LOGIT
            torch.amax(score, -1, keepdim=True, out=block.shift)
            block.shift.mul_(tensor_of(relative))
            torch.sub(score, block.shift, out=w)
            w.clamp_(min=MIN_EXPONENT).exp_()
        else:
            torch.exp(score.clamp_(min=MIN_EXPONENT) if underflows else score, out=w)
        torch.sum(w, -1, out=block.sums[0])
        dot(block.w_array, block.x_array, out=block.sums_array[1])
        d = torch.sub(block.teacher, block.student, out=block.x)
        w.mul_(d)
        torch.sum(w, -1, out=block.sums[2])
        w.mul_(d)
        torch.sum(w, -1, out=block.sums[3])
        dot(block.w_array, block.x_array, out=block.sums_array[4])

    def _totals(self, sums: Array, shift: Array) -> tuple[Array, Array]:
        """Sums over the last axis, the tiles of a row, relative to exp(top), and top."""
        xp = self.xp
        if self.space.tiles == 1:
            only = sums[..., 0]
            return xp.asarray(only, dtype=xp.float64), shift[..., 0]
        top = xp.amax(shift, -1)
        lower = shift - top[..., None]
        scale = xp.exp(xp.asarray(lower, dtype=xp.float64))
        return xp.sum(sums * scale, -1), top

    def _log_sums(self, betas: Array, known: Flags) -> Array:
        space = self.space
        needed = ~(known[0] & known[1])
        everywhere = known | True
        space.betas_array[..., 0] = betas
        space.shift_per_model.zero_()
        for block in space.blocks:
            if not self.none(needed[block.rows]):
                relative = None if self.on_cpu else everywhere[:, block.rows]
                self._partition(block, relative)
        if self.on_cpu:
            sums = self.xp.sum(space.per_model_array, -1)
            far = needed & ~((sums > _UNDERFLOW) & (sums < float("inf")))
            for block in space.blocks:
                relative = far[:, block.rows]
                if relative.any():
                    self._partition(block, relative)
        totals, top = self._totals(space.per_model_array, array_of(space.shift_per_model))
        return self.xp.log(totals) + top

    def _partition(self, block: Block, relative: Flags | None) -> None:
        """Sums of exp(x - shift) at both betas, where `relative` with the largest x as shift."""
        x = torch.lerp(block.student, block.teacher, block.betas, out=block.scratch)
        if relative is not None:
            x[..., block.inner.stop :] = MASKED_LOGIT
            shift = torch.amax(x, -1, out=block.shift_per_model)
            shift.mul_(tensor_of(relative))
            x.sub_(shift[..., None])
        x.clamp_(min=MIN_EXPONENT).exp_()
        torch.sum(x, -1, out=block.per_model)

    def _logits_of(self, token: Tokens) -> list[Array]:
        return [values_of(logits, token) for logits in self._logits]


def _scores(block: Block) -> Tile:
    """(1 - alpha) student + alpha teacher of one block, in its scratch."""
    torch.lerp(block.student, block.teacher, block.weight, out=block.x)
    return block.x[:, block.inner]
