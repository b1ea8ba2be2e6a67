"""Figures of run folders for papers: SVG, PDF and PNG, drawn by matplotlib without a display."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float

from optimal_sampling.errors import ConfigError
from optimal_sampling.records.store import disk_error, make_folder
from optimal_sampling.report.folders import RunSource, open_folders
from optimal_sampling.report.plot import COLORS, DASHES, STYLE, needs_matplotlib
from optimal_sampling.report.profiles import Profiles

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["FORMATS", "write_figures"]

FORMATS = ("svg", "pdf", "png")
COLUMN, PAGE = 3.4, 6.9
"""Widths of a figure in one column and across a page, inches."""

FEWEST = 10
"""Along the position, curves end where fewer completions go on (where no run has as many: none)."""

_PRINT: dict[str, Any] = {
    "font.size": 8,
    "axes.labelsize": 8,
    "axes.titlesize": 8,
    "legend.fontsize": 7.5,
    "lines.linewidth": 1.3,
    "svg.hashsalt": "figures",  # the same file for the same numbers
}
_NO_DATE = {"svg": {"Date": None}, "pdf": {"CreationDate": None}, "png": {}}

Column = dict[str, Any]
"""One column of `Profiles.data`."""

Values = Float[np.ndarray, " positions"]


@dataclass
class _Run:
    """What is drawn of a run."""

    columns: dict[str, Column]
    lengths: list[int] = field(default_factory=list)
    unit: str = "tokens"
    look: dict[str, Any] = field(default_factory=dict)
    """Colour and line style."""


def write_figures(
    run_folders: Sequence[Path],
    output_dir: Path,
    formats: Sequence[str] = FORMATS,
    note: Callable[[str], None] = warnings.warn,
) -> list[Path]:
    """Write alpha, its histogram, divergences and lengths, with all runs in each; the files.

    Curves along the position end where fewer than FEWEST completions go on. A figure of which no
    run has the numbers is left out, and `note` is told. Raises ConfigError, RunFolderError,
    StorageError, MissingDependencyError.
    """
    needs_matplotlib("--figures")
    import matplotlib as mpl

    sources, _ = open_folders([str(folder) for folder in run_folders])
    if not sources:
        raise ConfigError("figures are of run folders, and none of these is one")
    runs = [_read(source, place) for place, source in enumerate(sources)]
    make_folder(output_dir)
    files: list[Path] = []
    with mpl.rc_context(STYLE | _PRINT):
        for name, draw in _FIGURES.items():
            figure = draw(runs)
            if figure is None:
                note(_missing(name))
                continue
            files += [_save(figure, output_dir / f"{name}.{kind}") for kind in formats]
    return files


def _missing(name: str) -> str:
    return (
        f"no figure {name!r}: no run has the numbers. Records need token lists (not "
        "--no-token-lists), and alpha a method that has one"
    )


def _read(source: RunSource, place: int) -> _Run:
    """The numbers of a run, in memory that hardly depends on its size."""
    profiles = Profiles()
    lengths = []
    for record, _ in source.records():
        if not record["error"]:
            profiles.add(record)
            lengths.append(record["n_completion_tokens"])
    dash = DASHES[place // len(COLORS) % len(DASHES)]
    look = {"color": COLORS[place % len(COLORS)], "linestyle": dash, "label": _plain(source.name)}
    return _Run(profiles.data(), lengths, f"{profiles.unit}s", look)


def _plain(name: str) -> str:
    """A name without a meaning for matplotlib: $ is mathematics, and a leading _ hides a label."""
    return "\u200b" * name.startswith("_") + name.replace("$", r"\$")


def _save(figure: Figure, path: Path) -> Path:
    kind = path.suffix.removeprefix(".")
    part = path.with_name(f".{path.name}.part")
    try:
        with part.open("wb") as file:
            figure.savefig(file, format=kind, dpi=300, metadata=_NO_DATE[kind])
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except OSError as error:
        raise disk_error(path, error) from error
    return path


def _panels(titles: Sequence[str], width: float) -> tuple[Figure, list[Axes]]:
    """A figure of panels side by side."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, 2.3))
    axes = figure.subplots(1, len(titles), sharey=True, squeeze=False)[0]
    for ax, title in zip(axes, titles, strict=True):
        ax.set_title(title)
    return figure, list(axes)


def _along(column: Column) -> tuple[Values, Values]:
    """Positions, and which of them have enough completions."""
    width = column["width"]
    completions = np.array(column["n"]) / width
    positions = (np.arange(len(completions)) + 0.5) * width
    return positions, completions >= min(FEWEST, completions.max())


def _having(runs: Sequence[_Run], name: str) -> list[tuple[_Run, Column]]:
    return [(run, run.columns[name]) for run in runs if name in run.columns]


def _numbers(values: Sequence[float | None]) -> Values:
    return np.array([np.nan if value is None else value for value in values])


def draw_alpha(runs: Sequence[_Run]) -> Figure | None:
    """Median and middle half of alpha along the position; of one run also the middle 80%."""
    found = _having(runs, "alpha")
    if not found:
        return None
    figure, (ax,) = _panels([""], COLUMN)
    for run, column in found:
        positions, enough = _along(column)
        low, lower, middle, upper, high = (
            np.where(enough, _numbers(each), np.nan) for each in column["quantiles"]
        )
        shade: dict[str, Any] = {"color": run.look["color"], "linewidth": 0}
        if len(found) == 1:
            ax.fill_between(positions, low, high, alpha=0.15, label="middle 80%", **shade)
        label = "middle 50%" if len(found) == 1 else None
        ax.fill_between(positions, lower, upper, alpha=0.25, label=label, **shade)
        only = {"label": "median"} if len(found) == 1 else {}
        ax.plot(positions, middle, **run.look | only)
    ax.set(xlabel=_position(runs), ylabel="α, weight of the teacher", ylim=(-0.03, 1.03))
    ax.legend(loc="best")
    return figure


def draw_alpha_histogram(runs: Sequence[_Run]) -> Figure | None:
    """Shares of tokens by alpha: of all, and of those at which the models differ."""
    if not _having(runs, "alpha"):
        return None
    titles = {"alpha": "all tokens", "alpha_differ": "tokens at which the models differ"}
    figure, panels = _panels(list(titles.values()), PAGE)
    for ax, name in zip(panels, titles, strict=True):
        for run, column in _having(runs, name):
            counts = np.array(column["histogram"], dtype=float)
            shares = 100 * counts / counts.sum()
            ax.stairs(shares, column["edges"], linewidth=_nested(run, runs), **run.look)
        ax.set(xlabel="α, weight of the teacher", xlim=(-0.03, 1.03))
    panels[0].set_ylabel("% of tokens")
    _legend(panels[0], runs)
    return figure


def draw_divergences(runs: Sequence[_Run]) -> Figure | None:
    """Mean KL of q to both models along the position."""
    titles = {"kl_student": "KL(q ‖ student)", "kl_teacher": "KL(q ‖ teacher)"}
    if not any(_having(runs, name) for name in titles):
        return None
    figure, panels = _panels(list(titles.values()), PAGE)
    for ax, name in zip(panels, titles, strict=True):
        for run, column in _having(runs, name):
            positions, enough = _along(column)
            mean = np.where(enough, _numbers(column["mean"]), np.nan)
            ax.plot(positions, mean, **run.look)
        ax.set_xlabel(_position(runs))
    panels[0].set_ylabel("nats, mean over tokens")
    panels[0].set_ylim(bottom=0)
    _legend(panels[0], runs)
    return figure


def draw_lengths(runs: Sequence[_Run]) -> Figure | None:
    """Shares of completions by their number of tokens."""
    found = [run for run in runs if run.lengths]
    if not found:
        return None
    figure, (ax,) = _panels([""], COLUMN)
    longest = max(max(run.lengths) for run in found)
    edges = np.linspace(0, longest + 1, min(41, longest + 2))
    for run in found:
        counts, _ = np.histogram(run.lengths, edges)
        shares = 100 * counts / len(run.lengths)
        ax.stairs(shares, edges, linewidth=_nested(run, runs), **run.look)
    ax.set(xlabel="tokens of a completion", ylabel="% of completions")
    _legend(ax, found)
    return figure


def _position(runs: Sequence[_Run]) -> str:
    """Title of the axis of positions."""
    return f"position, {' or '.join(sorted({run.unit for run in runs}))}"


def _nested(run: _Run, runs: Sequence[_Run]) -> float:
    """Width of an outline: wider for earlier runs, so that one below an equal one is seen."""
    return 1.0 + 0.9 * (len(runs) - 1 - runs.index(run)) if len(runs) <= 4 else 1.0


def _legend(ax: Axes, runs: Sequence[_Run]) -> None:
    """The names of the runs, where there are several."""
    if len(runs) > 1:
        ax.legend(loc="best")


_FIGURES: dict[str, Callable[[Sequence[_Run]], Figure | None]] = {
    "alpha": draw_alpha,
    "alpha_histogram": draw_alpha_histogram,
    "divergences": draw_divergences,
    "lengths": draw_lengths,
}
"""By the names of their files."""
