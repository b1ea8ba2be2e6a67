"""Coloured text for a terminal. Control characters are shown, not obeyed."""

from __future__ import annotations

import unicodedata

from rich.color import Color
from rich.color_triplet import ColorTriplet
from rich.style import Style
from rich.text import Text

from optimal_sampling.spans.coloured import METRICS, Colour, SpannedText, colour_of

__all__ = ["rich_text", "scale_text", "visible"]

_GROUND = (24, 24, 27)  # what the colours are laid over; the text on them is white
_DARKER = 1.6  # a terminal's background is laid under white text without any page around it


def rich_text(text: SpannedText, metric: str = "alpha") -> Text:
    """The pieces, each on the colour of a metric."""
    result = Text()
    for place, piece in enumerate(text.pieces):
        colour = colour_of(metric, text.values(place))
        style = Style(bgcolor=_over_ground(colour), color="white") if colour else Style()
        result.append(visible(piece.text), style)
    return result


def scale_text(metric: str, steps: int = 24) -> Text:
    """The scale of a metric, with the numbers at its ends."""
    scale = METRICS[metric]
    result = Text(f"{scale.low:g} ", Style(dim=True))
    for step in range(steps):
        value = scale.low + (scale.high - scale.low) * step / (steps - 1)
        colour = colour_of(metric, {metric: value})
        result.append(" ", Style(bgcolor=_over_ground(colour)) if colour else Style())
    ends = ", blue: student's, orange: teacher's" if scale.is_diverging else ""
    return result.append(f" {scale.high:g}{ends}", Style(dim=True))


def visible(text: str) -> str:
    """Line breaks and tabs as they are, other control and direction characters as pictures."""
    return "".join(map(_shown, text))


def _shown(character: str) -> str:
    if character in "\n\t" or unicodedata.category(character) not in ("Cc", "Cf", "Cs"):
        return character
    code = ord(character)
    if code < 0x20:
        return chr(0x2400 + code)
    if character in "\u200d\u200c":  # joins emoji and letters
        return character
    return f"<{code:04X}>"


def _over_ground(colour: Colour) -> Color:
    *rgb, opacity = colour
    share = min(1.0, opacity * _DARKER)
    mixed = (round(low + (high - low) * share) for low, high in zip(_GROUND, rgb, strict=True))
    return Color.from_triplet(ColorTriplet(*mixed))
