"""The pages of the documentation: what is made of the code is current."""

from __future__ import annotations

from pathlib import Path

import draw_theory

ROOT = Path(__file__).parents[1]


def test_the_figure_of_the_theory_is_current():
    """Guards: a figure of another pair than the script's, whose numbers it shows."""
    assert (ROOT / "docs/theory.svg").read_text("utf-8") == draw_theory.figure()
