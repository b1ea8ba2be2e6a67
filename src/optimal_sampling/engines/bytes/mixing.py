"""One symbol per row, drawn from the mixture of two laws over bytes and the end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from optimal_sampling.config import MixtureConfig
from optimal_sampling.distribution import (
    cuts,
    gumbel,
    keys_tensor,
    make_pair,
    single_step,
    solve,
    step,
    trace_of,
)
from optimal_sampling.engines.bytes.byte_view import SYMBOLS
from optimal_sampling.errors import ConfigError
from optimal_sampling.types import Mode

__all__ = ["Place", "SymbolMixer", "check_mixture"]

Laws = Float[np.ndarray, "rows symbols"]


def check_mixture(mixture: MixtureConfig) -> None:
    """Raise ConfigError for options that cut q of tokens and mean nothing for q of bytes."""
    for name, off in (("top_p", 1.0), ("top_k", -1)):
        if getattr(mixture, name) != off:
            raise ConfigError(
                f"{name} truncates q after mixing, and with two tokenizers q is a law of bytes, "
                f"not of tokens: use temperature, or teacher_support_{name} on the teacher's tokens"
            )


@dataclass(frozen=True, slots=True)
class Place:
    """Where a row's next symbol stands."""

    noise_key: int
    byte: int
    """Number of bytes before it."""
    token: int
    """Number of whole student tokens before it."""
    allowed: Bool[np.ndarray, " symbols"]
    """Symbols that keep the text valid UTF-8."""
    forced: int | None = None
    """The symbol, where it is known already: a byte of a forced first token."""


class SymbolMixer:
    """The mixture of a run: temperature and teacher support are in the laws already."""

    def __init__(self, mixture: MixtureConfig, mode: Mode) -> None:
        check_mixture(mixture)
        self.mode = mode
        self._restricts = cuts(mixture.teacher_support_top_k, mixture.teacher_support_top_p)
        self.mixture = replace(
            mixture,
            temperature=1.0,
            teacher_support_top_k=-1,
            teacher_support_top_p=1.0,
            force_first_token=False,
        )
        self._forced = replace(self.mixture, force_first_token=True)

    def draw(
        self, laws: Sequence[Laws], places: Sequence[Place]
    ) -> tuple[list[int], list[tuple[float, ...]]]:
        """The symbol of every row and its trace. `laws`: by role, one row each."""
        log_p = [self._log_p(each, places) for each in laws]
        if self._restricts and len(log_p) == 2:
            log_p[0] = log_p[0].masked_fill(log_p[1] == -torch.inf, -torch.inf)
        bytes_before = torch.tensor([place.byte for place in places])
        noise = gumbel(keys_tensor(place.noise_key for place in places), bytes_before, SYMBOLS)
        if len(log_p) == 1:
            drawn = single_step(log_p[0], noise, self.mixture, self.mode)
            return drawn.token.tolist(), _rows(drawn.trace)
        tokens_before = torch.tensor([place.token for place in places])
        drawn = step(log_p[0], log_p[1], noise, tokens_before, self.mixture)
        symbols, trace = drawn.token.tolist(), _rows(drawn.trace)
        for row, place in enumerate(places):
            if place.forced is not None:
                symbols[row] = place.forced
                student, teacher = (each[row : row + 1] for each in log_p)
                trace[row] = self._forced_trace(student, teacher, place.forced)
        return symbols, trace

    def _log_p(self, laws: Laws, places: Sequence[Place]) -> Float[Tensor, "rows symbols"]:
        """Of the symbols that are allowed."""
        allowed = np.stack([place.allowed for place in places])
        with np.errstate(divide="ignore"):
            return torch.from_numpy(np.log(laws * allowed))

    def _forced_trace(
        self, student: Float[Tensor, "1 symbols"], teacher: Float[Tensor, "1 symbols"], symbol: int
    ) -> tuple[float, ...]:
        """Of a given symbol, where the teacher alone draws: alpha is 1."""
        solved = solve(make_pair(student, teacher, self._forced), torch.tensor([0]), self._forced)
        return _rows(trace_of(solved, torch.tensor([symbol])))[0]


def _rows(trace: Float[Tensor, "rows fields"]) -> list[tuple[float, ...]]:
    return [tuple(row) for row in trace.tolist()]
