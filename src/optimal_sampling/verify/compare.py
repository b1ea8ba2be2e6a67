"""Whether an answer means the same as a reference: rules of our own, then math-verify."""

from __future__ import annotations

__all__ = ["Unparseable", "is_same", "load_math_verify"]


class Unparseable(ValueError):
    """A reference that is no mathematics and no short text."""


def load_math_verify() -> None:
    """Import math-verify, which takes a second."""
    import math_verify  # noqa: F401


def is_same(answer: str, reference: str) -> bool:
    """Whether two answers mean the same. Raises Unparseable."""
    import math_verify

    gold = math_verify.parse(f"${reference}$", parsing_timeout=None)
    found = math_verify.parse(f"${answer}$", parsing_timeout=None)
    return bool(math_verify.verify(gold, found, timeout_seconds=None))
