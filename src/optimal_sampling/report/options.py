"""Options of `report` and `show`. The command line is derived from them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import tyro

from optimal_sampling.config import Checked

__all__ = ["ReportOptions", "ShowOptions"]

ColourBy = Literal["alpha", "kl_student", "kl_teacher", "vetoed", "log_ratio", "acceptance"]


@dataclass(frozen=True)
class ReportOptions(Checked):
    """One HTML page of run folders and evaluations, with all that it needs inside.

    It changes nothing in the folders, and can be called while a run goes.
    """

    runs: tyro.conf.Positional[tuple[str, ...]] = ()
    """Run folders, and output folders of `evaluate`."""
    output: str = "report.html"
    """The page."""
    samples: int = 200
    """Most samples of each run on the page. Of a larger run, those whose hash of `row_index` and
    `sample_index` is smallest, so that runs of one dataset show the same rows. Counts, means and
    charts are over all records."""
    top: int = 5
    """Most likeliest tokens per distribution and token on the page, where the run kept them
    (`generate --top-tokens`)."""

    figures: str | None = None
    """Folder for figures as SVG, PDF and PNG, all runs in each: alpha along the position and its
    histogram, divergences, lengths (needs the extra `plot`)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_range("samples top", 0)
        self._check_path("output")
        if self.figures is not None:
            self._check_path("figures")


@dataclass(frozen=True)
class ShowOptions(Checked):
    """One sample of a run folder, its tokens coloured."""

    target: tyro.conf.Positional[tuple[str, ...]] = ()
    """The run folder, and which sample: the start of its `id`, or the row's number in the dataset
    (from 0), with `:1` behind it the second sample of the prompt. Unset: the first record."""
    colour_by: ColourBy = "alpha"
    """What the colours show. `vetoed` needs a teacher's support; `log_ratio` (log p_teacher − log
    p_student of the token drawn) and `acceptance` need a run with --top-tokens."""
    tokens: int = 8
    """Most tokens in the table of those at which the models differ most."""
    top: int = 3
    """Most likeliest tokens per distribution in that table."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_range("tokens top", 0)
