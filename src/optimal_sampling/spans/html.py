"""Coloured text as HTML for notebooks: every character escaped, styles inline, no script."""

from __future__ import annotations

import html
from collections.abc import Iterable

from optimal_sampling.spans.coloured import METRICS, Colour, SpannedText, colour_of
from optimal_sampling.spans.terminal import visible

__all__ = ["page_html", "spans_html"]

_TEXT = "white-space:pre-wrap;overflow-wrap:anywhere;font-family:monospace;line-height:1.7"
_MUTED = "opacity:.65;font-size:.9em"


def page_html(title: str, samples: Iterable[tuple[str, SpannedText]], metric: str = "alpha") -> str:
    """Samples below each other, each a line about it and its text."""
    parts = []
    for about, text in samples:
        parts.append(f'<div style="{_MUTED};margin-top:.9em">{_escaped(about)}</div>')
        parts.append(f'<div dir="auto" style="{_TEXT}">{spans_html(text, metric)}</div>')
    legend = f"; {_legend(metric)}" if parts else ""
    return "".join([f'<div style="{_MUTED}">{_escaped(title)}{legend}</div>', *parts])


def spans_html(text: SpannedText, metric: str = "alpha") -> str:
    """One `span` per piece, its diagnostics in the tooltip."""
    spans = [
        _span(piece.text, text.values(place), metric) for place, piece in enumerate(text.pieces)
    ]
    if text.note:
        spans.append(f'<div style="{_MUTED}">not coloured: {_escaped(text.note)}</div>')
    return "".join(spans)


def _span(text: str, values: dict[str, float | None], metric: str) -> str:
    colour = colour_of(metric, values)
    style = f' style="background:{_css(colour)};border-radius:2px"' if colour else ""
    known = [
        f"{METRICS[name].title} {value:.4g}" for name, value in values.items() if value is not None
    ]
    title = f' title="{_escaped(", ".join(known))}"' if known else ""
    return f"<span{style}{title}>{_escaped(text)}</span>"


def _legend(metric: str) -> str:
    shown = METRICS[metric]
    if not shown.is_diverging:
        return f"colour: {_escaped(shown.meaning)}"
    return f"colour: {_escaped(shown.meaning)} (blue: student, orange: teacher)"


def _css(colour: Colour) -> str:
    red, green, blue, opacity = colour
    return f"rgba({red},{green},{blue},{opacity:.2f})"


def _escaped(text: str) -> str:
    """No markup, no control character, no mark of direction, which turns what is beside it, and no
    lone surrogate, which a notebook could not store.
    """
    return html.escape(visible(text))
