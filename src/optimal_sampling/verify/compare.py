r"""Whether an answer means the same as a reference: rules of our own, then math-verify.

The first rule that knows both forms decides. What math-verify 0.9 gets wrong comes before it:
integers with separators, choices (`\text{(C)}` it reads as nothing), words, number bases, ratios
and units.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import lru_cache
from typing import Any

from optimal_sampling.verify.normalise import bare, plain
from optimal_sampling.verify.numbers import bases, integers, is_number, percentages, ratios

__all__ = ["Unparseable", "is_same", "is_same_text", "load_math_verify", "why_unusable"]

_NO_ANSWER = "\N{REPLACEMENT CHARACTER}"  # equal to no reference


class Unparseable(ValueError):
    """A reference that is no mathematics and no short text."""


def load_math_verify() -> None:
    """Import math-verify, which takes a second."""
    import math_verify  # noqa: F401


@lru_cache(maxsize=65_536)
def why_unusable(reference: str) -> str | None:
    """Why no answer can be compared with a reference, whatever the answer; None where one can."""
    if is_number(plain(reference)):
        return None
    try:
        is_same(_NO_ANSWER, reference)
    except Unparseable as error:
        return str(error)
    return None


def is_same_text(answer: str, reference: str) -> bool:
    """Whether two answers are the same characters, but for their looks."""
    return _equal_texts(plain(answer), plain(reference)) is True


def is_same(answer: str, reference: str) -> bool:
    """Whether two answers mean the same. Raises Unparseable."""
    answer, reference = plain(answer), plain(reference)
    if not reference:
        raise Unparseable("the reference answer is empty")
    for rule in _RULES:
        decided = rule(answer, reference)
        if decided is not None:
            return decided
    return _math_verify(answer, reference)


Rule = Callable[[str, str], bool | None]
"""Answer and reference, both plain -> whether they are the same; None: not the rule's forms."""


def _equal_texts(answer: str, reference: str) -> bool | None:
    """The same characters, without spaces."""
    return True if answer.replace(" ", "") == reference.replace(" ", "") else None


# --- choices and words -------------------------------------------------------------------------

_CHOICE = re.compile(r"\(([A-Za-z])\)|([A-Z])\)?")
_WITH_CHOICE = re.compile(r"(?:\(([A-Z])\)|([A-Z])[).:])\s*(.+)", re.DOTALL)


def _choice(text: str) -> tuple[str | None, str]:
    """The letter of a choice, and the text beside it: `(C) 12` -> C, 12."""
    letters = bare(text)
    if match := _CHOICE.fullmatch(letters):
        return (match[1] or match[2]).upper(), ""
    if match := _WITH_CHOICE.fullmatch(letters):
        return match[1] or match[2], plain(match[3])
    return None, text


def _choices(answer: str, reference: str) -> bool | None:
    """One of them is the letter of a choice, alone or before its text."""
    (letter, rest), (wanted, wanted_rest) = _choice(answer), _choice(reference)
    if wanted is None and letter is None:
        return None
    if wanted is not None and letter is None and len(bare(answer)) == 1:
        letter = bare(answer).upper()
    if wanted is not None and letter is not None:
        return letter == wanted
    if rest and wanted_rest:  # a letter on one side alone, beside the same text
        return is_same(rest, wanted_rest)
    return False


_WORDS = re.compile(r"[A-Za-z][A-Za-z'’-]+(?:[ ,]+[A-Za-z0-9'’-]+)*|[A-Z](?:\s*,\s*[A-Z])+")
_MOST_WORDS = 6  # of a reference that an answer can repeat
_FUNCTIONS = {"sin", "cos", "tan", "log", "ln", "pi", "exp", "sqrt", "infty", "max", "min"}


def _words(answer: str, reference: str) -> bool | None:
    r"""The reference is one or several words, `\text{Friday}`, or letters, `A, B`."""
    wanted = bare(reference)
    is_text = "\\text" in reference or len(wanted) > 3
    if not _WORDS.fullmatch(wanted) or not is_text or wanted.lower() in _FUNCTIONS:
        return None
    if len(wanted.split()) > _MOST_WORDS:
        raise Unparseable(_is_text(wanted))
    wanted_parts, parts = _parts(wanted), _parts(bare(answer))
    if all(len(part) == 1 for part in wanted_parts):
        return sorted(wanted_parts) == sorted(parts)
    return wanted_parts == parts


def _is_text(reference: str) -> str:
    return f"the reference answer {reference!r:.200} is a text, not an answer"


def _parts(words: str) -> list[str]:
    return [part.strip() for part in re.split(r",|\band\b", words.casefold()) if part.strip()]


# --- units -------------------------------------------------------------------------------------

_UNITS = {
    name: names.split()[0]
    for names in (
        "mm millimeter millimetre",
        "cm centimeter centimetre",
        "m meter metre",
        "km kilometer kilometre",
        "inch in inche",
        "foot ft feet",
        "yard yd",
        "mile mi",
        "second s sec",
        "minute min",
        "hour h hr",
        "day",
        "week",
        "month",
        "year yr",
        "gram g",
        "kilogram kg",
        "pound lb",
        "ounce oz",
        "dollar usd",
        "euro eur",
        "cent",
        "degree deg",
        "radian rad",
    )
    for name in names.split()
}
"""Spellings of a unit, without a plural s -> one of them."""
_DEGREES = re.compile(r"\^\s*\{?\s*\\circ\s*\}?|\\degree|°")
_TEXT_UNIT = re.compile(r"(.*[\d}).!a-z])\s*\\text\s*\{([^{}]*)\}\s*(?:\^\s*\{?([23])\}?)?")
_WORD_UNIT = re.compile(
    r"([-+]?[\d.,/ ]*\d)\s*([A-Za-z]{2,}[A-Za-z ./]*|(?<= )[mgsh])(?:\^?\{?([23])\}?)?"
)


def _split_unit(text: str) -> tuple[str, str]:
    r"""A quantity and its unit: `10\text{ cm}^2`, `5 hours`, `90^\circ`; "" without one."""
    if _DEGREES.search(text):
        return _DEGREES.sub("", text).strip(), "degree"
    match = _TEXT_UNIT.fullmatch(text) or _WORD_UNIT.fullmatch(text)
    if match is None:
        return text, ""
    unit = match[2].strip().rstrip(".").lower()
    words = re.sub(r"^(?:square|sq\.?|cubic|cu\.?)\s+", "", unit)
    name = _UNITS.get(words) or _UNITS.get(words.removesuffix("s"), "")
    power = match[3] or {"sq": "2", "cu": "3"}.get(unit[:2], "")
    return match[1].strip(), name + power


def _units(answer: str, reference: str) -> bool | None:
    """One of them has a unit. It may be missing in the other, and must not be another one."""
    (found, unit), (wanted, wanted_unit) = _split_unit(answer), _split_unit(reference)
    if (found, wanted) == (answer, reference) or not found or not wanted:
        return None
    if unit and wanted_unit and unit != wanted_unit:
        return False
    return is_same(found, wanted)


# --- everything else ---------------------------------------------------------------------------

_MEMBER = re.compile(r"[A-Za-z]\s?\\in(?![A-Za-z])\s?(.+)", re.DOTALL)
_ASSIGNED = re.compile(r"[A-Za-z](?:_\{?\w+\}?)?(?:\([A-Za-z]\))?\s?=\s?([^=]+)")
_BRACKETED = re.compile(r"[(\[].*,.*[)\]]", re.DOTALL)


def _assignments(answer: str, reference: str) -> bool | None:
    r"""One of them names its variable: `x = 5`, `x \in [0, 1]`."""
    members = [_MEMBER.fullmatch(text) for text in (answer, reference)]
    if any(members):
        sets = [
            match[1] if match else text
            for match, text in zip(members, (answer, reference), strict=True)
        ]
        return is_same(sets[0], sets[1])
    parts = [_ASSIGNED.fullmatch(text) for text in (answer, reference)]
    if bool(parts[0]) == bool(parts[1]) or ("=" in answer and "=" in reference):
        return None
    answer, reference = (
        match[1] if match else text for match, text in zip(parts, (answer, reference), strict=True)
    )
    return is_same(answer, reference)


_RULES: tuple[Rule, ...] = (
    _equal_texts,
    integers,
    percentages,
    _choices,
    bases,
    _words,
    ratios,
    _assignments,
    _units,
)


_PROSE = re.compile(r"(?<![\\A-Za-z{])[A-Za-z]{3,}(?![A-Za-z}])")  # words outside of commands
_MOST_PROSE = 3  # such words of an expression
_ROUNDING = 1e-6  # relative, of a decimal


def _math_verify(answer: str, reference: str) -> bool:
    import math_verify

    if len(_PROSE.findall(reference)) > _MOST_PROSE:
        raise Unparseable(_is_text(reference))
    wanted = _parsed(reference)
    if not wanted:
        raise Unparseable(f"the reference answer {reference!r:.200} is no mathematics")
    if _BRACKETED.fullmatch(reference) and "," in answer and not re.match(r"\\?[(\[{]", answer):
        answer = f"{reference[0]}{answer}{reference[-1]}"  # an ordered pair without its brackets
    found = _parsed(answer)
    if not found or _differ(wanted[0], found[0]):
        return False
    # Limits of time are the pool's: those of math-verify need the main thread.
    same = math_verify.verify(wanted, found, timeout_seconds=None, allow_set_relation_comp=True)
    return bool(same)


def _differ(first: Any, second: Any) -> bool:
    """Whether both are numbers and not equal; math-verify rounds tiny ones to zero."""
    values = [each.doit() for each in (first, second) if hasattr(each, "doit")]
    is_rational = [getattr(value, "is_Rational", False) for value in values]
    is_float = [getattr(value, "is_Float", False) for value in values]
    if len(values) < 2 or not all(map(any, zip(is_rational, is_float, strict=True))):
        return False
    difference = abs(values[0] - values[1])
    if all(is_rational):
        return bool(difference)
    return bool(difference > _ROUNDING * abs(values[0]))


def _parsed(text: str) -> list[Any]:
    """The text as mathematics, in a list; empty where it is none."""
    import math_verify
    from latex2sympy2_extended import NormalizationConfig

    # Its own removal of units takes `b + c` of `a + b + c` for one.
    normal = NormalizationConfig(units=False, malformed_operators=True, nits=True, boxed="none")
    config = math_verify.LatexExtractionConfig(boxed_match_priority=-1, normalization_config=normal)
    parsed: list[Any] = math_verify.parse(
        f"${text}$", [config], fallback_mode="no_fallback", parsing_timeout=None
    )
    return parsed
