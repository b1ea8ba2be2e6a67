"""One symbol per row, drawn from the mixture of two laws over bytes and the end."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from optimal_sampling.config import MixtureConfig
from optimal_sampling.distribution import (
    gumbel,
    keys_tensor,
    make_pair,
    single_step,
    solve,
    step,
    trace_of,
)
from optimal_sampling.engines.bytes.byte_view import SYMBOLS
from optimal_sampling.types import TRACE_FIELDS, Mode

__all__ = ["Place", "SymbolMixer", "TraceRow"]

Laws = Float[np.ndarray, "rows symbols"]
Scores = Float[Tensor, "rows symbols"]
TraceRow = tuple[float, ...]
"""In the order of TRACE_FIELDS."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a row's next symbol stands."""

    noise_key: int
    byte: int
    """Number of bytes before it."""
    token: int
    """Number of whole student tokens before it."""
    forced: int | None = None
    """The symbol, where it is known already: a byte of a forced first token."""


class SymbolMixer:
    """The mixture of a run: temperature and what restricts tokens are in the laws already."""

    def __init__(self, mixture: MixtureConfig, mode: Mode) -> None:
        self.mode = mode
        self._restricts = replace(mixture, alpha_method="kl_symmetry").has_support
        self.mixture = replace(
            mixture,
            temperature=1.0,
            top_k=-1,
            top_p=1.0,
            teacher_support_top_k=-1,
            teacher_support_top_p=1.0,
            teacher_support_min_p=None,
            force_first_token=False,
        )
        self._forced = replace(self.mixture, force_first_token=True)

    def draw(
        self, laws: Sequence[Laws], places: Sequence[Place]
    ) -> tuple[list[int], list[TraceRow]]:
        """The symbol of every row and its trace. `laws`: by role, one row each, with mass."""
        log_p = [_logarithms(each) for each in laws]
        noise = self._noise(places)
        if len(log_p) == 1:
            drawn = single_step(log_p[0], noise, self.mixture, self.mode)
            return drawn.token.tolist(), _rows(drawn.trace)
        if self._restricts:
            return self._draw_restricted(log_p[0], log_p[1], noise, places)
        return self._draw(log_p[0], log_p[1], noise, places)

    def draft(self, student: Laws, places: Sequence[Place]) -> list[int]:
        """What the student alone would draw with the noise of these places."""
        found: list[int] = (_logarithms(student) + self._noise(places)).argmax(-1).tolist()
        return found

    def _noise(self, places: Sequence[Place]) -> Scores:
        bytes_before = torch.tensor([place.byte for place in places])
        return gumbel(keys_tensor(place.noise_key for place in places), bytes_before, SYMBOLS)

    def _draw(
        self, student: Scores, teacher: Scores, noise: Tensor, places: Sequence[Place]
    ) -> tuple[list[int], list[TraceRow]]:
        tokens_before = torch.tensor([place.token for place in places])
        drawn = step(student, teacher, noise, tokens_before, self.mixture)
        symbols, trace = drawn.token.tolist(), _rows(drawn.trace)
        for row, place in enumerate(places):
            if place.forced is not None:
                symbols[row] = place.forced
                only = slice(row, row + 1)
                trace[row] = self._forced_trace(student[only], teacher[only], place.forced)
        return symbols, trace

    def _draw_restricted(
        self, student: Scores, teacher: Scores, noise: Tensor, places: Sequence[Place]
    ) -> tuple[list[int], list[TraceRow]]:
        """With the student restricted to the bytes that the teacher's support can write.

        The plain names of the trace are of the unrestricted student, as everywhere.
        """
        inside = student.masked_fill(teacher == -torch.inf, -torch.inf)
        log_mass = inside.logsumexp(-1)
        apart = log_mass == -torch.inf  # the supports do not meet: q is the teacher
        inside = torch.where(apart[:, None], student, inside)
        symbols, trace = self._draw(inside, teacher, noise, places)
        pairs = zip(trace, log_mass.tolist(), strict=True)
        return symbols, [_unrestricted(row, log_mass) for row, log_mass in pairs]

    def _forced_trace(self, student: Scores, teacher: Scores, symbol: int) -> TraceRow:
        """Of a given symbol, where the teacher alone draws: alpha is 1."""
        solved = solve(make_pair(student, teacher, self._forced), torch.tensor([0]), self._forced)
        return _rows(trace_of(solved, torch.tensor([symbol])))[0]


def _logarithms(laws: Laws) -> Scores:
    with np.errstate(divide="ignore"):
        return torch.from_numpy(np.log(laws))


def _unrestricted(row: TraceRow, log_mass: float) -> TraceRow:
    """A trace against the student restricted to a mass -> the same against the whole student."""
    values = dict(zip(TRACE_FIELDS, row, strict=True))
    mass = math.exp(log_mass)
    if mass > 0:
        values["kl_student"] -= log_mass
        values["log_p_student"] += log_mass
        values["ess_student"] *= mass
    values["vetoed"] = 1 - mass + mass * values["vetoed"]
    return tuple(values.values())


def _rows(trace: Float[Tensor, "rows fields"]) -> list[TraceRow]:
    return [tuple(row) for row in trace.tolist()]
