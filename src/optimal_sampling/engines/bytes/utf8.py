"""Which bytes may follow, so that a text is valid UTF-8 wherever a character ends."""

from __future__ import annotations

__all__ = ["BETWEEN", "State", "after", "can_follow", "state_of", "whole_characters"]

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
"""Ranges of the bytes that are missing from a character."""
BETWEEN: State = ()
"""The state between characters, where a text may end."""


def after(state: State, byte: int) -> State | None:
    """The state one byte later; None where the byte breaks the text."""
    if state:
        low, high = state[0]
        return state[1:] if low <= byte <= high else None
    return next((rest for (low, high), rest in _LEADS if low <= byte <= high), None)


def can_follow(state: State, written: bytes) -> bool:
    """Whether a text in this state stays valid with these bytes."""
    for byte in written:
        following = after(state, byte)
        if following is None:
            return False
        state = following
    return True


def state_of(text: bytes) -> State:
    """The state at the end of a valid text. Its last three bytes are enough."""
    tail = text[-3:]
    for place in reversed(range(len(tail))):
        if tail[place] >= 0xC0:  # the first byte of the last character
            state: State = BETWEEN
            for byte in tail[place:]:
                state = after(state, byte) or BETWEEN
            return state
    return BETWEEN


def whole_characters(text: bytes) -> bytes:
    """The text without an incomplete character at its end."""
    return text.decode(errors="ignore").encode()
