"""`plot_alpha`, the figure of alpha along completions, and what all figures of matplotlib share."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float

from optimal_sampling.errors import ConfigError, MissingDependencyError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["COLORS", "DASHES", "STYLE", "needs_matplotlib", "plot_alpha"]

COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
"""Okabe and Ito's palette, which colour-blind readers can tell apart."""

DASHES = ("-", "--", "-.", ":")
"""Line styles: the next one for every round through the colours."""

STYLE: dict[str, Any] = {
    "font.size": 10,
    "axes.labelsize": 10,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.8,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "lines.linewidth": 1.6,
    "figure.constrained_layout.use": True,
    "pdf.fonttype": 42,  # text in a PDF stays text
}
"""Settings of matplotlib, in force while a figure is drawn."""

MOST_LINES = 6
"""Completions that are drawn one by one; of more, the quantiles."""

Values = Float[np.ndarray, " tokens"]


def needs_matplotlib(what: str) -> None:
    """MissingDependencyError where matplotlib is absent."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise MissingDependencyError(
            f"{what} needs matplotlib: pip install '.[plot]' in the folder of this package"
        ) from error


def plot_alpha(
    outputs: Any,
    labels: Sequence[str] | None = None,
    *,
    ax: Axes | None = None,
    bands: bool | None = None,
) -> Axes:
    """Draw alpha, the weight of the teacher, along the generation; the axes.

    `outputs`: what `OptimalSamplingModel.generate` or `OptimalSamplingV1.generate` returns, or one
    sequence of numbers per completion. Up to 6 completions are lines, named by `labels`; of more
    the median and the ranges of the middle 50% and 80% are drawn. `bands` says which, whatever
    their number. `ax`: where to draw; otherwise in a new figure of pyplot.

    Raises ConfigError where there is no alpha, MissingDependencyError without matplotlib.
    """
    needs_matplotlib("plot_alpha")
    import matplotlib as mpl
    from matplotlib import pyplot as plt

    rows = alphas_of(outputs)
    names = [f"Example {i}" for i in range(len(rows))] if labels is None else list(labels)
    if len(names) != len(rows):
        raise ConfigError(f"{len(names)} labels were given for {len(rows)} completions")
    with mpl.rc_context(STYLE):
        if ax is None:
            _, ax = plt.subplots(figsize=(6.5, 3.4))
        if len(rows) > MOST_LINES if bands is None else bands:
            draw_quantiles(ax, rows)
        else:
            draw_lines(ax, rows, names)
        ax.set(xlabel="Generation Step", ylabel="Alpha (Teacher Weight)", ylim=(-0.03, 1.03))
        ax.legend(loc="best")
    return ax


def alphas_of(outputs: Any) -> list[Values]:
    """alpha of every completion, without padding. Raises ConfigError where there is none."""
    values = getattr(outputs, "alpha_values", None)
    if values is None and hasattr(outputs, "alpha_stats"):
        if not outputs.alpha_stats:
            raise ConfigError("there is no alpha: sample with track_alpha_stats=True, from q*")
        values = [each["alpha"] for each in outputs.alpha_stats["per_request"]]
    rows = [_numbers(row) for row in (outputs if values is None else values)]
    found = [row[np.isfinite(row)] if row.ndim == 1 else row for row in rows]
    if any(row.ndim != 1 for row in rows) or not any(map(len, found)):
        raise ConfigError(
            "there is no alpha in these outputs: give what `generate` returned, of a method that "
            "has an alpha"
        )
    if not all(map(len, found)):
        warnings.warn("completions without an alpha are left out of the lines", stacklevel=3)
    return found


def _numbers(row: Any) -> Values:
    tolist = getattr(row, "tolist", None)
    return np.asarray(tolist() if tolist else row, dtype=float)


def draw_lines(ax: Axes, rows: Iterable[Values], names: Iterable[str]) -> None:
    """One line per completion; a dot for one of a single token."""
    for place, (row, name) in enumerate(zip(rows, names, strict=True)):
        color = COLORS[place % len(COLORS)]
        dash = DASHES[place // len(COLORS) % len(DASHES)]
        marker = "o" if len(row) == 1 else None
        ax.plot(row, dash, color=color, label=name, marker=marker, linewidth=1.3)


def draw_quantiles(ax: Axes, rows: Sequence[Values]) -> None:
    """Median and middle ranges over the completions that have a token at the step."""
    length = max(map(len, rows))
    table = np.full((len(rows), length), np.nan)
    for place, row in enumerate(rows):
        table[place, : len(row)] = row
    steps = np.arange(length)
    low, lower, middle, upper, high = np.nanquantile(table, (0.1, 0.25, 0.5, 0.75, 0.9), axis=0)
    color = COLORS[0]
    for share, below, above, opacity in ((80, low, high, 0.15), (50, lower, upper, 0.3)):
        look: dict[str, Any] = {"color": color, "alpha": opacity, "linewidth": 0}
        ax.fill_between(steps, below, above, label=f"middle {share}%", **look)
    ax.plot(steps, middle, color=color, label=f"median of {len(rows)}")
