"""The figure: a dot and an interval per arm, a panel per pair, as SVG."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape

from optimal_sampling.evaluate.statistics import Estimate

__all__ = ["Mark", "Panel", "svg"]

_LEFT, _WIDTH, _ROW, _TOP, _GAP = 260, 300, 22, 46, 30
_COLOURS = ("#1f5fa8", "#c25a12")


@dataclass(frozen=True)
class Mark:
    """One row: its name, and an estimate for each of the metrics."""

    name: str
    estimates: Sequence[Estimate]


@dataclass(frozen=True)
class Panel:
    """The rows of one pair. All panels have the same rows."""

    title: str
    marks: Sequence[Mark]


def svg(panels: Sequence[Panel], metrics: Sequence[str]) -> str:
    """The figure as text. Values are shares, shown in percent."""
    ends = [
        end
        for each in panels
        for mark in each.marks
        for e in mark.estimates
        for end in (e.low, e.high)
    ]
    low, high = _rounded(min(ends), max(ends))
    rows = max(len(each.marks) for each in panels)
    width = _LEFT + len(panels) * (_WIDTH + _GAP)
    height = _TOP + rows * _ROW + 60
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
        'font-family="sans-serif" font-size="12">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
    ]
    for number, mark in enumerate(panels[0].marks):
        lines.append(_text(_LEFT - 12, _y(number) + 4, mark.name, "end"))
    for number, panel in enumerate(panels):
        lines += _panel(panel, _LEFT + number * (_WIDTH + _GAP), rows, (low, high))
    for number, name in enumerate(metrics):
        x = _LEFT + number * 150
        lines.append(_dot(x, height - 14, _COLOURS[number]))
        lines.append(_text(x + 10, height - 10, name))
    return "\n".join([*lines, "</svg>"]) + "\n"


def _panel(panel: Panel, left: float, rows: int, scale: tuple[float, float]) -> Iterator[str]:
    yield _text(left + _WIDTH / 2, 20, panel.title, "middle")
    low, high = scale
    bottom = _TOP + rows * _ROW
    for percent in range(round(100 * low), round(100 * high) + 1, 10):
        x = _x(percent / 100, left, scale)
        yield f'<line x1="{x:.1f}" y1="{_TOP - 8}" x2="{x:.1f}" y2="{bottom}" stroke="#ddd"/>'
        yield _text(x, bottom + 16, f"{percent}%", "middle")
    for number, mark in enumerate(panel.marks):
        for colour, each in zip(_COLOURS, mark.estimates, strict=False):
            start, end = _x(each.low, left, scale), _x(each.high, left, scale)
            y = _y(number)
            yield (
                f'<line x1="{start:.1f}" y1="{y}" x2="{end:.1f}" y2="{y}" '
                f'stroke="{colour}" stroke-width="2"/>'
            )
            yield _dot(_x(each.value, left, scale), y, colour)


def _rounded(low: float, high: float) -> tuple[float, float]:
    """The scale's ends: whole tens of percent."""
    return max(0, int(10 * low)) / 10, min(10, int(10 * high) + 1) / 10


def _x(value: float, left: float, scale: tuple[float, float]) -> float:
    low, high = scale
    share = (value - low) / (high - low)
    return left + _WIDTH * min(max(share, 0.0), 1.0)


def _y(number: int) -> int:
    return _TOP + number * _ROW + _ROW // 2


def _dot(x: float, y: float, colour: str) -> str:
    return f'<circle cx="{x:.1f}" cy="{y}" r="4" fill="{colour}"/>'


def _text(x: float, y: float, text: str, anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y}" text-anchor="{anchor}">{escape(text)}</text>'
