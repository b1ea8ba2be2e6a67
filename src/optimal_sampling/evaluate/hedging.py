"""Hedging words: how much of a text doubts or reconsiders itself. A count, not a judgement."""

from __future__ import annotations

import re

__all__ = ["HEDGING_WORDS", "hedging_share"]

HEDGING_WORDS = (
    "actually",
    "alternatively",
    "double-check",
    "hmm",
    "hold on",
    "maybe",
    "might",
    "not sure",
    "perhaps",
    "possibly",
    "probably",
    "recheck",
    "seems",
    "unclear",
    "wait",
)
"""English words and phrases, in lower case; a phrase counts as the number of its words."""

_WORD = re.compile(r"[^\W\d_]+(?:['’-][^\W\d_]+)*")
_HEDGING = re.compile(rf"(?<![\w-])(?:{'|'.join(HEDGING_WORDS)})(?![\w-])")


def hedging_share(text: str) -> float:
    """Share of HEDGING_WORDS among the words of a text; 0 without words."""
    lowered = text.lower()
    words = len(_WORD.findall(lowered))
    hedging = sum(len(_WORD.findall(found)) for found in _HEDGING.findall(lowered))
    return hedging / words if words else 0.0
