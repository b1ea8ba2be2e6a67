"""Lists of both models -> one token of q, its diagnostics, and how far q may be from the exact one.

Where a list is not the whole row, q is made over the union of the lists and one id more, the tail,
which stands for all others. The tail is part of what alpha is solved over, and is never drawn: its
share of q is given to the ids of the union, and counted in the bound.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32, Float64, Int64
from torch import Tensor

from optimal_sampling.config import MixtureConfig
from optimal_sampling.distribution import (
    NoiseKeys,
    Solved,
    cuts,
    gumbel,
    keep_largest,
    keys_tensor,
    log_q,
    make_pair,
    single_step,
    solve,
    solve_single,
    step,
    trace_of,
)
from optimal_sampling.engines.servers.bounds import total_variation_bound
from optimal_sampling.engines.servers.box import box_of
from optimal_sampling.engines.servers.model import TokenList
from optimal_sampling.engines.servers.union import (
    ROLES,
    Side,
    Union,
    find_support,
    join,
    log_sum,
)
from optimal_sampling.errors import ConfigError
from optimal_sampling.types import LIST_FIELDS, TRACE_FIELDS, Mode

__all__ = ["DrawnToken", "ListMixer", "MixedLists", "check_mixture"]

_SHARE = 0.25  # of the most that an id outside of a list can have: what is taken for it
_LEAST_ALPHA = 0.05  # and as far from 1: nearer, an id may have anything

_OF_TOKEN = {
    "student": ("log_p_student", "log_p_student_restricted"),
    "teacher": ("log_p_teacher",),
}
"""Fields of the trace that a token has only where the list of a model has it."""


@dataclass(frozen=True, slots=True)
class DrawnToken:
    """A token, and its values of TRACE_FIELDS and LIST_FIELDS."""

    token: int
    trace: tuple[float, ...]
    bound: float
    """Of the total variation of what was drawn from, before top-k and top-p, to the exact q."""
    missing: tuple[tuple[int, ...], ...]
    """By role, ids of the union whose probability the role's list does not have."""


def check_mixture(mixture: MixtureConfig) -> None:
    """Raise ConfigError for a mixture that lists of the likeliest tokens do not give."""
    if mixture.alpha_method == "interleaved":
        raise ConfigError(
            "alpha_method interleaved needs the student's mass outside of a set of tokens and the "
            "teacher's whole distribution in its place, which lists of likeliest tokens do not "
            "have; use veto, lists of all tokens (--server-top-k -1, where the servers give them), "
            "or an engine with both models (--engine local)"
        )


@dataclass(frozen=True, slots=True, eq=False)
class MixedLists:
    """q over the ids of a union, before top-k and top-p."""

    solved: Solved
    """With the tail as the last id, where there is one."""
    scores: Float32[Tensor, "1 ids"]
    """log q without it."""
    bound: float = math.nan
    """Of the total variation to the exact q."""

    @property
    def q(self) -> Float64[np.ndarray, " ids"]:
        """Probabilities."""
        q: Float64[np.ndarray, " ids"] = self.scores[0].double().exp().numpy()
        return q


class ListMixer:
    """Draws from lists. `vocab_size`: ids that both models share."""

    def __init__(self, mixture: MixtureConfig, mode: Mode, vocab_size: int) -> None:
        self.mixture = mixture
        self.roles = ROLES if mode == "mixture" else (mode,)
        self.vocab_size = vocab_size
        self._whole = replace(mixture, top_k=-1, top_p=1.0)

    def draw(self, lists: Sequence[TokenList], noise_key: int, position: int) -> DrawnToken:
        """A token from one list per role."""
        place = NoiseKeys(keys_tensor([noise_key]), torch.tensor([position]))
        rows = [_row(each, self.vocab_size) for each in lists]
        if all(row is not None for row in rows):
            return self._draw_exactly([row for row in rows if row is not None], place)
        if len(self.roles) == 1:
            return self._draw_alone(lists[0], place)
        union = join(lists[0], lists[1], self.vocab_size, self.mixture.temperature)
        return self._draw_mixed(union, place)

    def draft(self, tokens: TokenList, noise_key: int, position: int) -> int:
        """What one model alone would draw with this noise, of the ids in its list."""
        inside = tokens.ids < self.vocab_size
        order = np.argsort(tokens.ids[inside])
        ids = torch.from_numpy(tokens.ids[inside][order])[None]
        scores = torch.from_numpy(tokens.log_p[inside][order]).float()[None]
        scores = scores / self.mixture.temperature
        if cuts(self.mixture.top_k, self.mixture.top_p):
            kept = keep_largest(scores, self.mixture.top_k, self.mixture.top_p)
            scores = scores.masked_fill(~kept, -torch.inf)
        noise = gumbel(keys_tensor([noise_key]), torch.tensor([position]), ids)
        return int(ids[0, (scores + noise).argmax(-1)])

    def _draw_exactly(self, rows: list[Float32[Tensor, "1 vocab"]], place: NoiseKeys) -> DrawnToken:
        """From whole rows, as every engine does."""
        if len(rows) == 1:
            drawn = single_step(rows[0], place, self.mixture, self.roles[0])
        else:
            drawn = step(rows[0], rows[1], place, place.position, self.mixture)
        known = dict.fromkeys(self._covered_names(), 1.0) | {"tv_bound": 0.0}
        trace = _with(drawn.trace[0], known)
        return DrawnToken(int(drawn.token), trace, 0.0, tuple(() for _ in rows))

    def _draw_alone(self, tokens: TokenList, place: NoiseKeys) -> DrawnToken:
        """From one model."""
        union = join(tokens, tokens, self.vocab_size, self.mixture.temperature)
        side = union.student
        logits = self._logits(side, union, _SHARE)
        solved = solve_single(logits, self._whole, self.roles[0])
        bound = max(0.0, -math.expm1(log_sum(side.log_p) - side.total[1]))
        mixed = MixedLists(solved, _without_tail(solved, union), bound)
        index, trace = self._draw(mixed, union, place)
        known = {self._covered_names()[0]: side.covered, "tv_bound": bound}
        return DrawnToken(int(union.ids[index]), _with(trace, known), bound, ((),))

    def _draw_mixed(self, union: Union, place: NoiseKeys) -> DrawnToken:
        mixed = self.solve(union, place.position)
        index, trace = self._draw(mixed, union, place)
        known = {"tv_bound": mixed.bound}
        missing = []
        for role, side in zip(ROLES, (union.student, union.teacher), strict=True):
            known[f"covered_{role}"] = side.covered
            missing.append(tuple(union.ids[~side.known].tolist()))
            if not side.known[index]:
                known |= dict.fromkeys(_OF_TOKEN[role], math.nan)
        token = int(union.ids[index])
        return DrawnToken(token, _with(trace, known), mixed.bound, tuple(missing))

    def solve(self, union: Union, position: Int64[Tensor, " one"]) -> MixedLists:
        """q over a union, and the bound. `position`: of the token in its completion, [1]."""
        support = find_support(union.teacher, self.mixture)
        box = box_of(union, support)
        keep = None if support is None else torch.from_numpy(box.drawn)[None]
        solved = self._solve(union, keep, position, (_SHARE, _SHARE))
        if self.mixture.is_geometric and not union.is_known:
            alpha = min(max(float(solved.alpha[0]), _LEAST_ALPHA), 1 - _LEAST_ALPHA)
            shares = (0.5 ** (1 / (1 - alpha)), 0.5 ** (1 / alpha))
            solved = self._solve(union, keep, position, shares)
        mixed = MixedLists(solved, _without_tail(solved, union))
        bound = total_variation_bound(box, self._whole, int(position), mixed.q)
        return replace(mixed, bound=bound)

    def _solve(
        self,
        union: Union,
        keep: Bool[Tensor, "1 columns"] | None,
        position: Int64[Tensor, " one"],
        shares: tuple[float, float],
    ) -> Solved:
        """q over a union, where an unknown id has a share of the most that it can have."""
        sides = zip((union.student, union.teacher), shares, strict=True)
        rows = [self._logits(side, union, share) for side, share in sides]
        if keep is not None:
            keep = keep[:, : rows[0].shape[1]]
        return solve(make_pair(rows[0], rows[1], self._whole, keep), position, self._whole)

    def _draw(
        self, mixed: MixedLists, union: Union, place: NoiseKeys
    ) -> tuple[int, Float32[Tensor, " fields"]]:
        """Index of a token of the union, and its trace."""
        scores = mixed.scores
        if cuts(self.mixture.top_k, self.mixture.top_p):
            kept = keep_largest(scores, self.mixture.top_k, self.mixture.top_p)
            scores = scores.masked_fill(~kept, -torch.inf).log_softmax(-1)
        noise = gumbel(place.keys, place.position, torch.from_numpy(union.ids)[None])
        index = int((scores + noise).argmax(-1))
        drawn_log_q = scores[:, index].double().numpy()
        return index, trace_of(mixed.solved, torch.tensor([index]), drawn_log_q)[0]

    def _logits(self, side: Side, union: Union, share: float) -> Float64[Tensor, "1 columns"]:
        """log p of the ids and, where there are others, of the tail, at temperature 1."""
        logs = side.guessed(share)[: len(union.ids) + (not union.is_whole)]
        return torch.from_numpy(logs * self.mixture.temperature)[None]

    def _covered_names(self) -> list[str]:
        return [f"covered_{role}" for role in self.roles]


def _without_tail(solved: Solved, union: Union) -> Float32[Tensor, "1 ids"]:
    """log q of the ids of a union, with the tail's share given to them."""
    return log_q(solved)[:, : len(union.ids)].log_softmax(-1)


def _row(tokens: TokenList, vocab_size: int) -> Float32[Tensor, "1 vocab"] | None:
    """The whole row of a full list; None of another."""
    inside = tokens.ids < vocab_size
    if not tokens.is_full or int(inside.sum()) != vocab_size:
        return None
    row = np.empty(vocab_size)
    row[tokens.ids[inside]] = tokens.log_p[inside]
    return torch.from_numpy(row).float()[None]


def _with(trace: Float[Tensor, " fields"], known: dict[str, float]) -> tuple[float, ...]:
    values = dict(zip(TRACE_FIELDS, trace.tolist(), strict=True))
    return tuple((values | dict.fromkeys(LIST_FIELDS, math.nan) | known).values())
