"""Lists of both models -> q, and how far it may be from the exact one.

q is made over the union of the lists and one id more, the tail, which stands for all others. The
tail is part of what alpha is solved over, and is never drawn: its share of q is given to the ids of
the union, and counted in the bound.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Bool, Float32, Float64, Int64
from torch import Tensor

from optimal_sampling.config import MixtureConfig
from optimal_sampling.distribution import Solved, log_q, make_pair, solve, solve_single
from optimal_sampling.engines.servers.bounds import total_variation_bound
from optimal_sampling.engines.servers.box import box_of
from optimal_sampling.engines.servers.model import TokenList
from optimal_sampling.engines.servers.union import (
    PerRow,
    Side,
    Union,
    find_support,
    join,
    log_sum,
)

__all__ = ["ListSolver", "MixedLists", "rows_of"]

_SHARE = 0.25  # of the most that an id outside of a list can have: what is taken for it
_LEAST_ALPHA = 0.05  # and as far from 1: nearer, an id may have anything

Positions = Int64[Tensor, " rows"]
Shares = tuple[PerRow | float, PerRow | float]
"""Of the student and the teacher."""


@dataclass(frozen=True, slots=True, eq=False)
class MixedLists:
    """q over the ids of the rows of a union, before top-k and top-p."""

    solved: Solved
    """With the tail as the last id."""
    scores: Float32[Tensor, "rows ids"]
    """log q without it; -inf beyond the ids of a row."""
    bound: PerRow
    """Of the total variation to the exact q."""

    @property
    def q(self) -> Float64[np.ndarray, "rows ids"]:
        """Probabilities."""
        q: Float64[np.ndarray, "rows ids"] = self.scores.double().exp().numpy()
        return q


class ListSolver:
    """q of rows of lists. `vocab_size`: ids that both models share.

    `rows`: by role, how many ids a model has, which may give the ids beyond a mass too; None:
    unknown. A role that is not named has the shared ids.
    """

    def __init__(
        self,
        mixture: MixtureConfig,
        roles: Sequence[str],
        vocab_size: int,
        rows: Mapping[str, int | None],
    ) -> None:
        self.mixture = mixture
        self.roles = roles
        self.vocab_size = vocab_size
        self._whole = replace(mixture, top_k=-1, top_p=1.0)
        sizes = [rows.get(role, vocab_size) for role in (roles[0], roles[-1])]
        student, teacher = (math.inf if size is None else size - vocab_size for size in sizes)
        self._more_ids = (max(0, student), max(0, teacher))

    def join(self, student: Sequence[TokenList], teacher: Sequence[TokenList]) -> Union:
        """The union of both models' lists; of one model, twice its own."""
        return join(student, teacher, self.vocab_size, self.mixture.temperature, self._more_ids)

    def solve(self, union: Union, position: Positions) -> MixedLists:
        """q over the rows of a union, and the bound. `position`: of tokens in their completions."""
        support = find_support(union, self.mixture)
        box = box_of(union, support)
        drawn = None if support is None else rows_of(box.drawn, union, False)
        shares: Shares = (_SHARE, _SHARE)
        if self.mixture.is_geometric and not union.is_known:
            guessed = self._solve(union, drawn, position, shares, ess=False)
            alpha = np.clip(guessed.alpha, _LEAST_ALPHA, 1 - _LEAST_ALPHA)
            shares = (0.5 ** (1 / (1 - alpha)), 0.5 ** (1 / alpha))
        solved = self._solve(union, drawn, position, shares)
        mixed = MixedLists(solved, _without_tail(solved), np.empty(0))
        q = np.ascontiguousarray(mixed.q.T[: len(union.ids)])
        alpha = np.asarray(solved.alpha)
        bound = total_variation_bound(box, self._whole, position.numpy(), alpha, q)
        return replace(mixed, bound=bound)

    def alone(self, union: Union) -> MixedLists:
        """One model, of which both lists of the union are."""
        side = union.student
        solved = solve_single(_logits(side, union, _SHARE), self._whole, self.roles[0])
        bound = np.maximum(0.0, -np.expm1(log_sum(side.log_p) - side.total[1]))
        return MixedLists(solved, _without_tail(solved), bound)

    def _solve(
        self,
        union: Union,
        drawn: Bool[Tensor, "rows columns"] | None,
        position: Positions,
        shares: Shares,
        *,
        ess: bool = True,
    ) -> Solved:
        """q over a union, where an unknown id has a share of the most that it can have."""
        sides = zip((union.student, union.teacher), shares, strict=True)
        student, teacher = (_logits(side, union, share) for side, share in sides)
        pair = make_pair(student, teacher, self._whole, drawn)
        return solve(pair, position, self._whole, ess=ess)


def _logits(side: Side, union: Union, share: PerRow | float) -> Float64[Tensor, "rows columns"]:
    """log p of the ids and of the tail at temperature 1; -inf for what a row does not have."""
    logs = side.guessed(share) * side.temperature
    logs[:-1][~union.present] = -np.inf
    logs[-1][union.is_whole] = -np.inf
    return rows_of(logs, union, -np.inf)


def rows_of(columns: np.ndarray, union: Union, filler: float) -> Tensor:
    """[ids, rows], perhaps with a tail, as [rows, ids and tail] for lists of this length.

    The number of columns is that of the row's own lists, so that sums over it are too.
    """
    rows = np.full((columns.shape[1], union.most_ids + 1), filler, columns.dtype)
    rows[:, : len(union.ids)] = columns[: len(union.ids)].T
    rows[:, -1] = columns[-1] if len(columns) > len(union.ids) else filler
    return torch.from_numpy(rows)


def _without_tail(solved: Solved) -> Float32[Tensor, "rows ids"]:
    """log q of the ids of a union, with the tail's share given to them."""
    return log_q(solved)[:, :-1].log_softmax(-1)
