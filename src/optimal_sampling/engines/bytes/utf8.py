"""Which bytes may follow, so that a text is valid UTF-8 wherever a character ends."""

from __future__ import annotations

from functools import cache

import numpy as np
from jaxtyping import Bool

from optimal_sampling.engines.bytes.byte_view import END, SYMBOLS

__all__ = ["after", "allowed", "begins_a_text", "whole_characters"]

_Range = tuple[int, int]
_REST: _Range = (0x80, 0xBF)
_LEADS: tuple[tuple[_Range, tuple[_Range, ...]], ...] = (
    ((0x00, 0x7F), ()),
    ((0xC2, 0xDF), (_REST,)),
    ((0xE0, 0xE0), ((0xA0, 0xBF), _REST)),
    ((0xE1, 0xEC), (_REST, _REST)),
    ((0xED, 0xED), ((0x80, 0x9F), _REST)),
    ((0xEE, 0xEF), (_REST, _REST)),
    ((0xF0, 0xF0), ((0x90, 0xBF), _REST, _REST)),
    ((0xF1, 0xF3), (_REST, _REST, _REST)),
    ((0xF4, 0xF4), ((0x80, 0x8F), _REST, _REST)),
)
"""First bytes, and the ranges of the bytes after them (table 3-7 of the Unicode standard)."""

State = tuple[_Range, ...]
"""Ranges of the bytes that are missing from a character; empty between characters."""


def after(state: State, byte: int) -> State:
    """The state one byte later."""
    if state:
        return state[1:]
    return next(rest for (low, high), rest in _LEADS if low <= byte <= high)


@cache
def allowed(state: State) -> Bool[np.ndarray, " symbols"]:
    """The symbols that keep the text valid: `END` only between characters."""
    found = np.zeros(SYMBOLS, dtype=bool)
    for low, high in [state[0]] if state else [lead for lead, _ in _LEADS]:
        found[low : high + 1] = True
    found[END] = not state
    return found


def begins_a_text(written: bytes) -> bool:
    """Whether a valid text can begin with these bytes."""
    state: State = ()
    for byte in written:
        if not allowed(state)[byte]:
            return False
        state = after(state, byte)
    return True


def whole_characters(text: bytes) -> bytes:
    """The text without an incomplete character at its end."""
    return text.decode(errors="ignore").encode()
