"""Counts over all tokens of a run that take the same memory for any number of records."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from jaxtyping import Float, Int

from optimal_sampling.records.schema import Record

__all__ = ["Profiles"]

_POSITIONS = 128  # intervals of positions
_BINS = 60  # bars of a histogram
_FINE = 10  # bins of the quantiles per bar: a median of clamped alphas is their bound
_QUANTILES = (0.1, 0.25, 0.5, 0.75, 0.9)
_DIFFER = 1e-3  # nats: above, KL to one of the models says that they differ
_EDGES = {
    "alpha": np.linspace(0, 1, _BINS * _FINE + 1),
    "alpha_differ": np.linspace(0, 1, _BINS * _FINE + 1),
    "vetoed": np.linspace(0, 1, _BINS * _FINE + 1),
    "kl_student": np.concatenate([[0], np.geomspace(1e-5, 20, _BINS * _FINE)]),
    "kl_teacher": np.concatenate([[0], np.geomspace(1e-5, 20, _BINS * _FINE)]),
}
"""Bins of each column. KL: logarithmic, the first of them from 0."""

Values = Float[np.ndarray, " tokens"]


@dataclass
class Profiles:
    """One column of the diagnostics along the position, for each name in `_EDGES`."""

    columns: dict[str, _Column] = field(default_factory=dict)
    unit: Literal["token", "byte"] = "token"
    """What positions count."""

    def add(self, record: Record) -> None:
        """Count the tokens of a good record, or its bytes where it has those."""
        if "byte_alpha" in record:
            self.unit = "byte"
        found = _values(record)
        for name, values in found.items():
            if name not in self.columns:
                self.columns[name] = _Column(_EDGES[name])
            self.columns[name].add(values)

    def data(self) -> dict[str, Any]:
        """Per column the mean and the quantiles along the position, and a histogram.

        Without an alpha that is 0 or 1 at every token.
        """
        used = {name: column.data() for name, column in self.columns.items() if column.total}
        if used.get("alpha", {}).get("total_mean") in (0.0, 1.0):
            del used["alpha"]
            used.pop("alpha_differ", None)
        return used


def _values(record: Record) -> dict[str, Values]:
    unit = "byte" if "byte_alpha" in record else "token"
    names = ("alpha", "kl_student", "kl_teacher", "vetoed")
    lists = {name: record.get(f"{unit}_{name}") for name in names}
    found = {
        name: np.array(column, dtype=float)
        for name, column in lists.items()
        if isinstance(column, list) and column
    }
    if record.get("mode", "mixture") != "mixture":
        found.pop("alpha", None)  # 0 or 1 by definition
    kls = [found[name] for name in ("kl_student", "kl_teacher") if name in found]
    if "alpha" in found and len(kls) == 2:
        differ = np.fmax(*kls) > _DIFFER
        found["alpha_differ"] = np.where(differ, found["alpha"], np.nan)
    return found


class _Column:
    """Counts [positions, bins] and sums [positions] of one column."""

    def __init__(self, edges: Float[np.ndarray, " bins_and_one"]) -> None:
        self.edges = edges
        self.counts = np.zeros((_POSITIONS, len(edges) - 1), dtype=np.int64)
        self.sums = np.zeros(_POSITIONS)
        self.width = 1
        """Tokens per interval of positions."""

    @property
    def total(self) -> int:
        """Numbers counted."""
        return int(self.counts.sum())

    def add(self, values: Values) -> None:
        """Count the values of one record; NaN is left out."""
        while len(values) > _POSITIONS * self.width:
            self._double()
        places = np.flatnonzero(np.isfinite(values))
        known = values[places]
        rows = places // self.width
        bins = np.searchsorted(self.edges, known, side="right") - 1
        bins = bins.clip(0, self.counts.shape[1] - 1)
        np.add.at(self.counts, (rows, bins), 1)
        np.add.at(self.sums, rows, known)

    def _double(self) -> None:
        """Join every two intervals."""
        half = _POSITIONS // 2
        joined = self.counts.reshape(half, 2, -1).sum(1)
        self.counts = np.concatenate([joined, np.zeros_like(joined)])
        sums = self.sums.reshape(half, 2).sum(1)
        self.sums = np.concatenate([sums, np.zeros(half)])
        self.width *= 2

    def data(self) -> dict[str, Any]:
        """Plain lists."""
        number = self.counts.sum(1)
        used = np.flatnonzero(number)
        last = int(used[-1]) + 1
        with np.errstate(invalid="ignore"):
            mean = self.sums / number
        return {
            "width": self.width,
            "n": number[:last].tolist(),
            "mean": _rounded(mean[:last]),
            "quantiles": [
                _rounded(_quantile(self.counts[:last], self.edges, each)) for each in _QUANTILES
            ],
            "edges": _rounded(self.edges[::_FINE]),
            "histogram": self.counts.sum(0).reshape(_BINS, _FINE).sum(1).tolist(),
            "total_mean": float(self.sums.sum() / number.sum()),
        }


def _quantile(
    counts: Int[np.ndarray, "positions bins"],
    edges: Float[np.ndarray, " bins_and_one"],
    share: float,
) -> Float[np.ndarray, " positions"]:
    """Of each row, linear within a bin; NaN for a row of none."""
    cumulated = counts.cumsum(1)
    total = cumulated[:, -1]
    wanted = share * total
    place = (cumulated < wanted[:, None]).sum(1).clip(0, counts.shape[1] - 1)
    rows = np.arange(len(counts))
    inside = counts[rows, place]
    before = cumulated[rows, place] - inside
    part = np.where(inside > 0, (wanted - before) / np.maximum(inside, 1), 0.0)
    low, high = edges[place], edges[place + 1]
    return np.where(total > 0, low + part * (high - low), np.nan)


def _rounded(values: Sequence[float] | np.ndarray) -> list[float | None]:
    return [float(f"{x:.4g}") if np.isfinite(x) else None for x in values]
