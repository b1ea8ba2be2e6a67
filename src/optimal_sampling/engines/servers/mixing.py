"""Lists of both models -> tokens of q, their diagnostics, and how far q may be from the exact one.

Where a list is not the whole row, q is made over the union of the lists and one id more, the tail,
which stands for all others. The tail is part of what alpha is solved over, and is never drawn: its
share of q is given to the ids of the union, and counted in the bound. All places of a draft are
worked on in one call, as one row each: a call for one row takes nearly as long.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType

import numpy as np
import torch
from jaxtyping import Bool, Float32, Float64, Int64
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
    PerRow,
    Side,
    Union,
    find_support,
    join,
    log_sum,
)
from optimal_sampling.errors import ConfigError
from optimal_sampling.types import LIST_FIELDS, TRACE_FIELDS, Mode

__all__ = ["DrawnToken", "ListMixer", "MixedLists", "Place", "check_mixture"]

_SHARE = 0.25  # of the most that an id outside of a list can have: what is taken for it
_LEAST_ALPHA = 0.05  # and as far from 1: nearer, an id may have anything
_MOST_NUMBERS = 2048
"""Entries of lists that are worked on together: what is made of them stays near the cache."""

_OF_TOKEN = {
    "student": ("log_p_student", "log_p_student_restricted"),
    "teacher": ("log_p_teacher",),
}
"""Fields of the trace that a token has only where the list of a model has it."""
_COLUMN = {name: column for column, name in enumerate(TRACE_FIELDS + LIST_FIELDS)}

Positions = Int64[Tensor, " rows"]
Shares = tuple[PerRow | float, PerRow | float]
"""Of the student and the teacher."""
Lists = Sequence[TokenList]
"""One per row, of equal lengths."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a token is to be drawn."""

    lists: Sequence[TokenList]
    """One per role."""
    noise_key: int
    """Of the text."""
    position: int
    """In the completion."""


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


class ListMixer:
    """Draws from lists. `vocab_size`: ids that both models share.

    `rows`: by role, how many ids a model has, which may give the ids beyond a mass too; None:
    unknown. A role that is not named has the shared ids.
    """

    def __init__(
        self,
        mixture: MixtureConfig,
        mode: Mode,
        vocab_size: int,
        rows: Mapping[str, int | None] = MappingProxyType({}),
    ) -> None:
        self.mixture = mixture
        self.roles = ROLES if mode == "mixture" else (mode,)
        self.vocab_size = vocab_size
        self._whole = replace(mixture, top_k=-1, top_p=1.0)
        sizes = [rows.get(role, vocab_size) for role in (self.roles[0], self.roles[-1])]
        student, teacher = (math.inf if size is None else size - vocab_size for size in sizes)
        self._more_ids = (max(0, student), max(0, teacher))

    def draw(self, places: Sequence[Place]) -> list[DrawnToken]:
        """A token for every place.

        What a place gives has the same bits whatever places are beside it.
        """
        drawn: dict[int, DrawnToken] = {}
        for indices in self._batches([place.lists for place in places]):
            some = [places[index] for index in indices]
            by_role = [*zip(*(place.lists for place in some), strict=True)]
            keys = keys_tensor([place.noise_key for place in some])
            noise = NoiseKeys(keys, torch.tensor([place.position for place in some]))
            drawn |= zip(indices, self._draw(by_role, noise), strict=True)
        return [drawn[index] for index in range(len(places))]

    def draft(self, lists: Sequence[TokenList], noise_key: int, position: int) -> list[int]:
        """What one model alone would draw with this noise at every place, of its list's ids."""
        drafted: dict[int, int] = {}
        for places in self._batches([[each] for each in lists]):
            keys = keys_tensor([noise_key] * len(places))
            noise = NoiseKeys(keys, torch.tensor(places) + position)
            found = self._draft([lists[place] for place in places], noise)
            drafted |= zip(places, found, strict=True)
        return [drafted[place] for place in range(len(lists))]

    def join(self, student: Lists, teacher: Lists) -> Union:
        """The union of both models' lists; of one model, twice its own."""
        return join(student, teacher, self.vocab_size, self.mixture.temperature, self._more_ids)

    def solve(self, union: Union, position: Positions) -> MixedLists:
        """q over the rows of a union, and the bound. `position`: of tokens in their completions."""
        support = find_support(union, self.mixture)
        box = box_of(union, support)
        drawn = None if support is None else _rows_of(box.drawn, union, False)
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

    def _batches(self, lists: Sequence[Sequence[TokenList]]) -> Iterator[list[int]]:
        """Places whose lists have the same lengths, and not too many of them."""
        alike: dict[tuple[tuple[int, bool], ...], list[int]] = {}
        for place, of_place in enumerate(lists):
            shape = tuple((len(each.ids), self._is_whole(each)) for each in of_place)
            alike.setdefault(shape, []).append(place)
        for shape, places in alike.items():
            height = max(1, _MOST_NUMBERS // sum(length for length, _ in shape))
            for first in range(0, len(places), height):
                yield places[first : first + height]

    def _is_whole(self, tokens: TokenList) -> bool:
        """Whether a list has all ids that both models share."""
        return tokens.is_full and int((tokens.ids < self.vocab_size).sum()) == self.vocab_size

    def _draw(self, lists: Sequence[Lists], noise: NoiseKeys) -> list[DrawnToken]:
        """A token for every row of lists, which come by role."""
        if all(self._is_whole(side[0]) for side in lists):
            return self._draw_exactly([self._whole_rows(side) for side in lists], noise)
        union = self.join(lists[0], lists[-1])
        if len(self.roles) == 1:
            mixed, sides = self._alone(union), [union.student]
        else:
            mixed, sides = self.solve(union, noise.position), [union.student, union.teacher]
        scores = mixed.scores
        if cuts(self.mixture.top_k, self.mixture.top_p):
            kept = keep_largest(scores, self.mixture.top_k, self.mixture.top_p)
            scores = scores.masked_fill(~kept, -torch.inf).log_softmax(-1)
        ids = _rows_of(union.ids, union, 0)[:, : union.most_ids]
        index = (scores + gumbel(noise.keys, noise.position, ids)).argmax(-1)
        drawn_log_q = scores.gather(-1, index[:, None])[:, 0].double().numpy()
        trace = trace_of(mixed.solved, index, drawn_log_q)
        return self._tokens(mixed.bound, union, sides, index.numpy(), trace)

    def _tokens(
        self,
        bound: PerRow,
        union: Union,
        sides: Sequence[Side],
        index: Int64[np.ndarray, " rows"],
        trace: Float32[Tensor, "rows fields"],
    ) -> list[DrawnToken]:
        """The tokens of rows, and what is known of them."""
        place = index[None]
        table = _table(trace, dict(zip(self.roles, (s.covered for s in sides), strict=True)), bound)
        missing = []
        for role, side in zip(self.roles, sides, strict=True):
            is_missing = ~np.take_along_axis(side.known, place, 0)[0]
            for name in _OF_TOKEN[role]:
                table[is_missing, _COLUMN[name]] = np.nan
            rows = zip(union.ids.T, side.known.T, strict=True)
            missing.append([tuple(ids[~known].tolist()) for ids, known in rows])
        tokens = np.take_along_axis(union.ids, place, 0)[0]
        return [
            DrawnToken(token, tuple(values), values[_COLUMN["tv_bound"]], each)
            for token, values, each in zip(
                tokens.tolist(), table.tolist(), zip(*missing, strict=True), strict=True
            )
        ]

    def _draw_exactly(
        self, rows: Sequence[Float32[Tensor, "rows vocab"]], noise: NoiseKeys
    ) -> list[DrawnToken]:
        """From whole rows, as every engine does."""
        if len(rows) == 1:
            drawn = single_step(rows[0], noise, self.mixture, self.roles[0])
        else:
            drawn = step(rows[0], rows[1], noise, noise.position, self.mixture)
        ones, zeros = np.ones(len(rows[0])), np.zeros(len(rows[0]))
        table = _table(drawn.trace, dict.fromkeys(self.roles, ones), zeros)
        nothing = tuple(() for _ in rows)
        return [
            DrawnToken(token, tuple(values), 0.0, nothing)
            for token, values in zip(drawn.token.tolist(), table.tolist(), strict=True)
        ]

    def _whole_rows(self, lists: Lists) -> Float32[Tensor, "rows vocab"]:
        rows = np.empty((len(lists), self.vocab_size))
        for row, tokens in zip(rows, lists, strict=True):
            inside = tokens.ids < self.vocab_size
            row[tokens.ids[inside]] = tokens.log_p[inside]
        return torch.from_numpy(rows).float()

    def _draft(self, lists: Lists, noise: NoiseKeys) -> list[int]:
        listed = np.array([each.ids for each in lists])
        order = listed.argsort(-1)
        listed = np.take_along_axis(listed, order, -1)
        log_p = np.take_along_axis(np.array([each.log_p for each in lists]), order, -1)
        log_p[listed >= self.vocab_size] = -np.inf
        ids = torch.from_numpy(listed)
        scores = torch.from_numpy(log_p).float() / self.mixture.temperature
        if cuts(self.mixture.top_k, self.mixture.top_p):
            kept = keep_largest(scores, self.mixture.top_k, self.mixture.top_p)
            scores = scores.masked_fill(~kept, -torch.inf)
        index = (scores + gumbel(noise.keys, noise.position, ids)).argmax(-1)
        return [*map(int, ids.gather(-1, index[:, None])[:, 0])]

    def _alone(self, union: Union) -> MixedLists:
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
    return _rows_of(logs, union, -np.inf)


def _rows_of(columns: np.ndarray, union: Union, filler: float) -> Tensor:
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


def _table(
    trace: Float32[Tensor, "rows fields"], covered: Mapping[str, PerRow], bound: PerRow
) -> Float64[np.ndarray, "rows all_fields"]:
    """Values of TRACE_FIELDS and LIST_FIELDS. `covered`: mass of the list, by role."""
    table = np.full((len(trace), len(_COLUMN)), np.nan)
    table[:, : len(TRACE_FIELDS)] = trace.numpy()
    for role, mass in covered.items():
        table[:, _COLUMN[f"covered_{role}"]] = mass
    table[:, _COLUMN["tv_bound"]] = bound
    return table
