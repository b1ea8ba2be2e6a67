"""Draws docs/theory.svg: the path of q between two laws. `python scripts/draw_theory.py`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

STUDENT = np.array([0.34, 0.27, 0.21, 0.18])
TEACHER = np.array([0.01, 0.01, 0.01, 0.97])
BLUE, ORANGE, GREEN, GREY = "#0072b2", "#d55e00", "#009e73", "#666"
LEFT, TOP, WIDTH, HEIGHT = 60, 40, 380, 250
MOST = 2.3  # nats at the top of the first panel
BARS = 520


def mix(alpha: float) -> tuple[np.ndarray, float]:
    """q, and F."""
    scores = (1 - alpha) * np.log(STUDENT) + alpha * np.log(TEACHER)
    F = float(np.log(np.exp(scores).sum()))
    return np.exp(scores - F), F


def kl(p: np.ndarray, q: np.ndarray) -> float:
    """KL(p||q), nats."""
    return float((p * np.log(p / q)).sum())


def crossing() -> float:
    """The alpha of equal KLs, by bisection."""
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        q, _ = mix(middle)
        low, high = (middle, high) if kl(q, STUDENT) < kl(q, TEACHER) else (low, middle)
    return low


def text(x: float, y: float, words: str, anchor: str = "middle", fill: str = "#222") -> str:
    """A line of text."""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{fill}">{words}</text>'


def line(x1: float, y1: float, x2: float, y2: float, style: str) -> str:
    """A straight line."""
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" {style}/>'


def place(alpha: float, nats: float) -> tuple[float, float]:
    """Where a point of the first panel lies."""
    return LEFT + WIDTH * alpha, TOP + HEIGHT * (1 - nats / MOST)


def curve(values: Sequence[float], alphas: Sequence[float], style: str) -> str:
    """A curve over alpha, within the panel."""
    inside = [(a, v) for a, v in zip(alphas, values, strict=True) if v <= MOST]
    points = " ".join("{:.1f},{:.1f}".format(*place(a, v)) for a, v in inside)
    return f'<polyline points="{points}" fill="none" stroke-width="2.5" {style}/>'


def path_panel() -> list[str]:
    """Both KLs and -F along the path, and where they meet."""
    alphas = [float(a) for a in np.linspace(0, 1, 101)]
    laws = [mix(a) for a in alphas]
    best = crossing()
    x, y = place(best, -mix(best)[1])
    bottom = TOP + HEIGHT
    parts = [text(LEFT + WIDTH / 2, 22, "along the path from student to teacher")]
    for tick in (0, 1, 2):
        parts.append(line(*place(0, tick), *place(1, tick), 'stroke="#ddd"'))
        parts.append(text(LEFT - 8, place(0, tick)[1] + 4, f"{tick:g}", "end"))
    for tick in (0, 0.25, 0.5, 0.75, 1.0):
        parts += [text(place(tick, 0)[0], bottom + 18, f"{tick:g}")]
    parts += [
        text(LEFT + WIDTH / 2, bottom + 38, "α, the weight of the teacher"),
        text(LEFT - 8, TOP - 8, "nats", "end"),
        curve([kl(q, STUDENT) for q, _ in laws], alphas, f'stroke="{BLUE}"'),
        curve([kl(q, TEACHER) for q, _ in laws], alphas, f'stroke="{ORANGE}"'),
        curve([-F for _, F in laws], alphas, f'stroke="{GREY}" stroke-dasharray="6 4"'),
        line(x, y, x, bottom, f'stroke="{GREEN}" stroke-width="1.5"'),
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5.5" fill="{GREEN}"/>',
        text(*place(0.12, 2.1), "KL(q‖teacher)", "start", ORANGE),
        text(*place(0.94, 1.62), "KL(q‖student)", "end", BLUE),
        text(*place(0.13, 0.36), "−F", "middle", GREY),
        text(x + 24, y - 92, f"α* = {best:.2f}", "middle", GREEN),
        text(x + 24, y - 74, f"both {-mix(best)[1]:.2f} nats", "middle", GREEN),
    ]
    return parts


def laws_panel() -> list[str]:
    """The probabilities of the tokens under student, q* and teacher."""
    best = crossing()
    rows = ((STUDENT, BLUE, "student"), (mix(best)[0], GREEN, "q*"), (TEACHER, ORANGE, "teacher"))
    bottom = TOP + HEIGHT
    parts = [text(BARS + 170, 22, "the laws of the next token")]
    parts.append(line(BARS, bottom, BARS + 340, bottom, 'stroke="#888"'))
    for token in range(len(STUDENT)):
        x = BARS + 12 + 84 * token
        for number, (law, color, name) in enumerate(rows):
            height = HEIGHT * law[token]
            left = x + 22 * number
            size = f'width="20" height="{height:.1f}"'
            title = f"<title>{name}: {law[token]:.2f}</title>"
            top = f'x="{left}" y="{bottom - height:.1f}"'
            parts.append(f'<rect {top} {size} fill="{color}">{title}</rect>')
        parts.append(text(x + 32, bottom + 18, "abcd"[token]))
    for number, (_, color, name) in enumerate(rows):
        parts.append(text(BARS + 60 + 110 * number, bottom + 38, name, "middle", color))
    return parts


def figure() -> str:
    """The whole of the file."""
    head = (
        '<svg xmlns="http://www.w3.org/2000/svg" width="880" height="340" viewBox="0 0 880 340" '
        'font-family="sans-serif" font-size="14">\n<rect width="880" height="340" fill="white"/>'
    )
    return "\n".join([head, *path_panel(), *laws_panel(), "</svg>"]) + "\n"


if __name__ == "__main__":
    target = Path(__file__).parents[1] / "docs/theory.svg"
    target.write_text(figure(), "utf-8")
    print(target)
