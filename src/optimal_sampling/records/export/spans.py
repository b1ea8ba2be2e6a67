"""The longest run of words that two texts share."""

from __future__ import annotations

import re
from collections import defaultdict

__all__ = ["longest_common_span", "words"]

_SEED = 4  # words that a span has at least
_WORD = re.compile(r"\w+|[^\w\s]")


def words(text: str) -> list[str]:
    """Words, numbers and single signs, in lower case."""
    return _WORD.findall(text.lower())


def longest_common_span(text: list[str], other: list[str]) -> int:
    """Length in words of the longest run that both have; 0 where it has fewer than 4 words."""
    places: dict[tuple[str, ...], list[int]] = defaultdict(list)
    for start in range(len(other) - _SEED + 1):
        places[tuple(other[start : start + _SEED])].append(start)
    longest = 0
    for start in range(len(text) - _SEED + 1):
        for place in places.get(tuple(text[start : start + _SEED]), ()):
            begins = start == 0 or place == 0 or text[start - 1] != other[place - 1]
            if begins:
                longest = max(longest, _length(text, start, other, place))
    return longest


def _length(text: list[str], start: int, other: list[str], place: int) -> int:
    """Number of equal words from two places on."""
    length = _SEED
    most = min(len(text) - start, len(other) - place)
    while length < most and text[start + length] == other[place + length]:
        length += 1
    return length
