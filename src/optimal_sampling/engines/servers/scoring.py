"""Which way of scoring a draft takes the least time, by what was tried at the start. No HTTP."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from optimal_sampling.engines.servers.model import Scoring

__all__ = ["ScoringTime", "ScoringTimes"]

_CLEARLY = 0.85
"""Share of the time of `prompts` below which another way is taken."""
_MOST_TOP_K = 64
"""Longest lists for which the ways are compared; they were tried with at most 20 tokens."""


@dataclass(frozen=True, slots=True)
class ScoringTime:
    """Seconds of one way: start + per_token * (tokens of the text) + per_list * lists."""

    start: float
    per_token: float
    per_list: float

    @classmethod
    def fitted(cls, tried: Mapping[tuple[int, int], float]) -> ScoringTime:
        """Least squares over seconds by (tokens, lists). No coefficient is negative."""
        sizes = np.array([*tried], dtype=np.float64)
        seconds = np.array([*tried.values()])
        centre = sizes.mean(0)
        slopes, *_ = np.linalg.lstsq(sizes - centre, seconds - seconds.mean(), rcond=None)
        slopes = np.maximum(slopes, 0.0)
        start = max(0.0, float(seconds.mean() - slopes @ centre))
        return cls(start, float(slopes[0]), float(slopes[1]))

    def __call__(self, tokens: int, lists: int) -> float:
        """Seconds of a request."""
        return self.start + self.per_token * tokens + self.per_list * lists


@dataclass(frozen=True)
class ScoringTimes:
    """Seconds of each way that a server offers, and the longest text that was tried."""

    ways: Mapping[Scoring, ScoringTime]
    longest: int

    def general(self) -> Scoring | None:
        """The way for texts of any length: `prompts`, as the others score the whole text anew."""
        return "prompts" if "prompts" in self.ways else self._fastest(self.longest, 4)

    def best(self, tokens: int, lists: int, top_k: int) -> Scoring | None:
        """The way for a text of so many tokens and so many lists at its end, of length `top_k`."""
        general = self.general()
        if general != "prompts" or tokens > self.longest or top_k > _MOST_TOP_K:
            return general
        fastest = self._fastest(tokens, lists)
        assert fastest is not None
        is_clear = self.ways[fastest](tokens, lists) < _CLEARLY * self.ways[general](tokens, lists)
        return fastest if is_clear else general

    def _fastest(self, tokens: int, lists: int) -> Scoring | None:
        return min(self.ways, key=lambda way: self.ways[way](tokens, lists), default=None)
