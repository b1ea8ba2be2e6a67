"""Lists of both models -> tokens of q, and their diagnostics.

Many places are worked on in one call, as one row each: a call for one row takes nearly as long.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TypeVar

import numpy as np
import torch
from jaxtyping import Float32, Float64, Int64
from torch import Tensor

from optimal_sampling.config import MixtureConfig
from optimal_sampling.distribution import (
    NoiseKeys,
    cuts,
    gumbel,
    keep_largest,
    keys_tensor,
    single_step,
    step,
    trace_of,
)
from optimal_sampling.engines.servers.model import TokenList
from optimal_sampling.engines.servers.solving import ListSolver, rows_of
from optimal_sampling.engines.servers.union import (
    ROLES,
    PerRow,
    Side,
    Union,
)
from optimal_sampling.errors import ConfigError
from optimal_sampling.types import LIST_FIELDS, TRACE_FIELDS, Mode

__all__ = ["DrawnToken", "ListMixer", "Place", "check_mixture"]

_MOST_NUMBERS = 2048
"""Entries of lists that are worked on together: what is made of them stays near the cache."""

_OF_TOKEN = {
    "student": ("log_p_student", "log_p_student_restricted"),
    "teacher": ("log_p_teacher",),
}
"""Fields of the trace that a token has only where the list of a model has it."""
_COLUMN = {name: column for column, name in enumerate(TRACE_FIELDS + LIST_FIELDS)}

T = TypeVar("T")
Lists = Sequence[TokenList]
"""One per row, of equal lengths."""
Work = Callable[[Sequence[Lists], NoiseKeys], Sequence[T]]
"""What is done with rows of lists, which come by role."""


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


class ListMixer:
    """Draws from lists. `vocab_size`, `rows`: as of `ListSolver`."""

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
        self.solver = ListSolver(mixture, self.roles, vocab_size, rows)

    def draw(self, places: Sequence[Place]) -> list[DrawnToken]:
        """A token for every place.

        What a place gives has the same bits whatever places are beside it.
        """
        return self._in_batches(places, self._draw)

    def draft(self, places: Sequence[Place]) -> list[int]:
        """What one model alone would draw with this noise at every place, of its list's ids."""
        return self._in_batches(places, self._draft)

    def _in_batches(self, places: Sequence[Place], work: Work[T]) -> list[T]:
        """Work on places whose lists have the same lengths, and on not too many of them at once."""
        alike: dict[tuple[tuple[int, bool], ...], list[int]] = {}
        for index, place in enumerate(places):
            shape = tuple((len(each.ids), self._is_whole(each)) for each in place.lists)
            alike.setdefault(shape, []).append(index)
        found: dict[int, T] = {}
        for shape, indices in alike.items():
            height = max(1, _MOST_NUMBERS // sum(length for length, _ in shape))
            for first in range(0, len(indices), height):
                some = indices[first : first + height]
                found |= zip(some, work(*_columns([places[i] for i in some])), strict=True)
        return [found[index] for index in range(len(places))]

    def _is_whole(self, tokens: TokenList) -> bool:
        """Whether a list has all ids that both models share."""
        return tokens.is_full and int((tokens.ids < self.vocab_size).sum()) == self.vocab_size

    def _draw(self, lists: Sequence[Lists], noise: NoiseKeys) -> list[DrawnToken]:
        """A token for every row of lists, which come by role."""
        if all(self._is_whole(side[0]) for side in lists):
            return self._draw_exactly([self._whole_rows(side) for side in lists], noise)
        union = self.solver.join(lists[0], lists[-1])
        if len(self.roles) == 1:
            mixed, sides = self.solver.alone(union), [union.student]
        else:
            mixed, sides = self.solver.solve(union, noise.position), [union.student, union.teacher]
        scores = mixed.scores
        if cuts(self.mixture.top_k, self.mixture.top_p):
            kept = keep_largest(scores, self.mixture.top_k, self.mixture.top_p)
            scores = scores.masked_fill(~kept, -torch.inf).log_softmax(-1)
        ids = rows_of(union.ids, union, 0)[:, : union.most_ids]
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

    def _draft(self, by_role: Sequence[Lists], noise: NoiseKeys) -> list[int]:
        [lists] = by_role
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


def _columns(places: Sequence[Place]) -> tuple[list[Lists], NoiseKeys]:
    """The lists of places by role, and their noise."""
    by_role: list[Lists] = [*zip(*(place.lists for place in places), strict=True)]
    keys = keys_tensor([place.noise_key for place in places])
    return by_role, NoiseKeys(keys, torch.tensor([place.position for place in places]))


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
