"""Rules for integers, fractions, percentages, number bases and ratios."""

from __future__ import annotations

import re
from fractions import Fraction

from optimal_sampling.verify.normalise import LONGEST, bare

__all__ = ["bases", "integers", "is_number", "percentages", "ratios"]

_INTEGER = re.compile(r"([-+]?)\s?(\d{1,3}(?:,\d{3})+|\d+)(?:\.0*)?")
_DECIMAL = re.compile(r"[-+]?(?:\d{1,3}(?:,\d{3})+|\d*)(?:\.\d+)?")
_FRACTION = re.compile(r"([-+]?)(?:\\frac\{(-?\d+)\}\{(-?\d+)\}|(\d+)\s?/\s?(\d+))")


def _integer(text: str) -> str | None:
    """The digits of an integer with their sign: of any length, and never turned into a number."""
    match = _INTEGER.fullmatch(text)
    if match is None:
        return None
    digits = match[2].replace(",", "").lstrip("0") or "0"
    return f"-{digits}" if match[1] == "-" and digits != "0" else digits


def _rational(text: str) -> Fraction | None:
    """The value of an integer, a decimal or a simple fraction."""
    if not text or len(text) > LONGEST:
        return None
    if _DECIMAL.fullmatch(text) and text[-1].isdigit():
        return Fraction(text.replace(",", ""))
    match = _FRACTION.fullmatch(text)
    if match is None:
        return None
    above, below = int(match[2] or match[4]), int(match[3] or match[5])
    return Fraction(above, below) * (-1 if match[1] == "-" else 1) if below else None


def is_number(text: str) -> bool:
    """Whether a plain text is one integer or fraction."""
    return bool(_integer(text)) or _rational(text) is not None


def integers(answer: str, reference: str) -> bool | None:
    """The reference is an integer, the answer a number."""
    wanted = _integer(reference)
    if wanted is None:
        return None
    found = _integer(answer)
    if found is not None:
        return found == wanted
    value = _rational(answer)
    return None if value is None else value == _rational(reference)


def percentages(answer: str, reference: str) -> bool | None:
    """One of them has a percent sign, which may be missing in the other: 50% is 50, and 0.5."""
    if not {answer[-1:], reference[-1:]} & {"%"}:
        return None
    found, wanted = (_rational(text.rstrip("% ")) for text in (answer, reference))
    if found is None or wanted is None:
        return None
    if answer[-1] == reference[-1] or found == wanted:
        return found == wanted
    scaled = (found, wanted / 100) if reference[-1] == "%" else (found / 100, wanted)
    return scaled[0] == scaled[1]


_BASE_NAMES = {"two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7, "eight": 8}
_BASE_NAMES |= {"nine": 9, "ten": 10, "eleven": 11, "twelve": 12, "sixteen": 16}
_BASE = re.compile(
    r"\(?(-?[0-9A-Za-z][0-9A-Za-z, ]*)\)?\s*"
    r"(?:_\s*\{?|\(?\s*base\s*)\s*([0-9]{1,2}|[a-z]+)\s*\}?\)?"
)


def _in_base(text: str) -> tuple[str, int] | None:
    """Digits and base of `1011_2`, `(1011)_{two}`, `1011 base 2`."""
    match = _BASE.fullmatch(bare(text))
    if match is None:
        return None
    name = match[2]
    base = int(name) if name.isdigit() else _BASE_NAMES.get(name, 0)
    digits = re.sub(r"[ ,]", "", match[1]).upper()
    is_valid = 2 <= base <= 36 and all(int(each, 36) < base for each in digits.lstrip("-"))
    return (digits, base) if is_valid else None


def bases(answer: str, reference: str) -> bool | None:
    """One of them is a number in a base, which may be missing in the other."""
    found, wanted = _in_base(answer), _in_base(reference)
    if found and wanted:
        return found == wanted
    based, other = (found, reference) if found else (wanted, answer)
    if based is None:
        return None
    return re.sub(r"[ ,]", "", bare(other)).upper() == based[0]


_RATIO = re.compile(r"\d+(?:\s?:\s?\d+)+(?:\s?[ap]\.?\s?m)?", re.IGNORECASE)


def ratios(answer: str, reference: str) -> bool | None:
    """The reference is a ratio or a time of day: `3:4`, `8:34 p.m.`"""
    wanted = bare(reference)
    if not _RATIO.fullmatch(wanted):
        return None
    found = re.sub(r"\\colon|\\ratio", ":", bare(answer))
    if match := _FRACTION.fullmatch(found):
        found = f"{match[2] or match[4]}:{match[3] or match[5]}"
    return re.sub(r"[ .]", "", found).lower() == re.sub(r"[ .]", "", wanted).lower()
