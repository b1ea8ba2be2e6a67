r"""Whether an answer means the same as a reference: rules of our own, then math-verify.

The first rule that knows both forms decides. What math-verify 0.9 gets wrong comes before it:
integers with separators, choices (`\text{(C)}` it reads as nothing), words, number bases, ratios
and units.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from fractions import Fraction
from functools import lru_cache
from typing import Any

__all__ = [
    "Unparseable",
    "is_same",
    "is_same_text",
    "load_math_verify",
    "plain",
    "why_unusable",
]

_LONGEST = 300  # characters of a number that is read here
_NO_ANSWER = "\N{REPLACEMENT CHARACTER}"  # equal to no reference


class Unparseable(ValueError):
    """A reference that is no mathematics and no short text."""


_FONTS = re.compile(
    r"\\(?:textbf|textrm|textit|textnormal|textup|mathrm|mathbf|mathit|mathsf|mbox|operatorname)"
    r"\s*\{"
)
_NOTHING = re.compile(
    r"(?<!\\)\\[!,;:> ]|~"
    r"|\\(?:left|right|[bB]igg?[lr]?|displaystyle|textstyle|q?quad|nonumber)(?![A-Za-z])"
    r"|\\phantom\{[^{}]*\}|\\phantom\s*-?"
)
_DELIMITED = re.compile(r"\\\((.*)\\\)|\\\[(.*)\\\]|\$+(.*?)\$+", re.DOTALL)
_DEGREES = re.compile(r"\^\s*\{?\s*\\circ\s*\}?|\\degree|°")
_LOOSE_FRACTION = re.compile(r"\\frac\s*(\\?[A-Za-z]+|\d)\s*(\\[A-Za-z]+|\d|(?<=\s)[A-Za-z])")
_INTRODUCED = re.compile(r"^\s*\\text\s*\{[^{}]*(?:\bis|[:=])\s*\}(?=.)")
_REPEATING = re.compile(r"(\d*)\.(\d*)\\overline\s*\{(\d+)\}")


def _repeating(match: re.Match[str]) -> str:
    r"""`0.1\overline{6}` as a fraction: (16 - 1) / (100 - 10)."""
    whole, before, again = match.groups()
    if len(match[0]) > _LONGEST:
        return match[0]
    above = int(f"{whole}{before}{again}") - int(f"{whole}{before}" or 0)
    below = (10 ** len(again) - 1) * 10 ** len(before)
    return rf"\frac{{{above}}}{{{below}}}"


_REPLACED: tuple[tuple[re.Pattern[str], str | Callable[[re.Match[str]], str]], ...] = (
    (re.compile(r",\\!|\{,\}|\\thinspace"), ""),  # between thousands
    (_FONTS, r"\\text{"),
    (_NOTHING, " "),
    (_INTRODUCED, ""),  # "The answer is"
    (_REPEATING, _repeating),
    (re.compile(r"\\(?:varnothing|O)(?![A-Za-z])|\\\{\s*\\\}"), r"\\emptyset"),
    (re.compile(r"\\[dtc]frac"), r"\\frac"),
    (_LOOSE_FRACTION, r"\\frac{\1}{\2}"),
    (re.compile(r"(?<=\d)i(?![A-Za-z])"), " i"),  # which math-verify reads as imaginary
    (re.compile(r"\\?%"), "%"),
    (re.compile(r"\\?\$"), ""),
    (re.compile(r"[−–]"), "-"),
    (re.compile(r"\\(?:le|ge)q?slant(?![A-Za-z])"), lambda match: match[0].replace("slant", "")),
    (re.compile(r"\\text\{\s*,?\s*(?:and|or)\s*\}|(?<=[\d\s}])\s+(?:and|or)\s+(?=[-\d\\])"), ","),
    (re.compile(r",\s*,"), ","),
    (re.compile(r"^\s*(?:\\(?:approx|therefore|simeq)|≈)(?![A-Za-z])"), ""),
    (re.compile(r"\s+"), " "),
)


def plain(text: str) -> str:
    """An answer without what changes its looks alone: delimiters, spaces, fonts, a full stop."""
    text = text.strip()
    while match := _DELIMITED.fullmatch(text):
        text = next(group for group in match.groups() if group is not None).strip()
    for pattern, replacement in _REPLACED:
        text = pattern.sub(replacement, text)
    return text.strip().rstrip(".,;\\ ")


def load_math_verify() -> None:
    """Import math-verify, which takes a second."""
    import math_verify  # noqa: F401


@lru_cache(maxsize=65_536)
def why_unusable(reference: str) -> str | None:
    """Why no answer can be compared with a reference, whatever the answer; None where one can."""
    if _integer(plain(reference)) or _rational(plain(reference)) is not None:
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
_TEXT = re.compile(r"\\text\s*\{([^{}]*)\}")


def _bare(text: str) -> str:
    r"""Without the commands of `\text{...}` around its parts."""
    return re.sub(r"\s+", " ", _TEXT.sub(r"\1", text)).strip().rstrip(".,: ")


def _choice(text: str) -> tuple[str | None, str]:
    """The letter of a choice, and the text beside it: `(C) 12` -> C, 12."""
    bare = _bare(text)
    if match := _CHOICE.fullmatch(bare):
        return (match[1] or match[2]).upper(), ""
    if match := _WITH_CHOICE.fullmatch(bare):
        return match[1] or match[2], plain(match[3])
    return None, text


def _choices(answer: str, reference: str) -> bool | None:
    """One of them is the letter of a choice, alone or before its text."""
    (letter, rest), (wanted, wanted_rest) = _choice(answer), _choice(reference)
    if wanted is None and letter is None:
        return None
    if wanted is not None and letter is None and len(_bare(answer)) == 1:
        letter = _bare(answer).upper()
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
    wanted = _bare(reference)
    is_text = "\\text" in reference or len(wanted) > 3
    if not _WORDS.fullmatch(wanted) or not is_text or wanted.lower() in _FUNCTIONS:
        return None
    if len(wanted.split()) > _MOST_WORDS:
        raise Unparseable(f"the reference answer {wanted!r:.200} is a text, not an answer")
    wanted_parts, parts = _parts(wanted), _parts(_bare(answer))
    if all(len(part) == 1 for part in wanted_parts):
        return sorted(wanted_parts) == sorted(parts)
    return wanted_parts == parts


def _parts(words: str) -> list[str]:
    return [part.strip() for part in re.split(r",|\band\b", words.casefold()) if part.strip()]


# --- numbers -----------------------------------------------------------------------------------

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
    if not text or len(text) > _LONGEST:
        return None
    if _DECIMAL.fullmatch(text) and text[-1].isdigit():
        return Fraction(text.replace(",", ""))
    match = _FRACTION.fullmatch(text)
    if match is None:
        return None
    above, below = int(match[2] or match[4]), int(match[3] or match[5])
    return Fraction(above, below) * (-1 if match[1] == "-" else 1) if below else None


def _integers(answer: str, reference: str) -> bool | None:
    """The reference is an integer, the answer a number."""
    wanted = _integer(reference)
    if wanted is None:
        return None
    found = _integer(answer)
    if found is not None:
        return found == wanted
    value = _rational(answer)
    return None if value is None else value == _rational(reference)


def _percentages(answer: str, reference: str) -> bool | None:
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
    match = _BASE.fullmatch(_bare(text))
    if match is None:
        return None
    name = match[2]
    base = int(name) if name.isdigit() else _BASE_NAMES.get(name, 0)
    digits = re.sub(r"[ ,]", "", match[1]).upper()
    is_valid = 2 <= base <= 36 and all(int(each, 36) < base for each in digits.lstrip("-"))
    return (digits, base) if is_valid else None


def _bases(answer: str, reference: str) -> bool | None:
    """One of them is a number in a base, which may be missing in the other."""
    found, wanted = _in_base(answer), _in_base(reference)
    if found and wanted:
        return found == wanted
    based, other = (found, reference) if found else (wanted, answer)
    if based is None:
        return None
    return re.sub(r"[ ,]", "", _bare(other)).upper() == based[0]


_RATIO = re.compile(r"\d+(?:\s?:\s?\d+)+(?:\s?[ap]\.?\s?m)?", re.IGNORECASE)


def _ratios(answer: str, reference: str) -> bool | None:
    """The reference is a ratio or a time of day: `3:4`, `8:34 p.m.`"""
    wanted = _bare(reference)
    if not _RATIO.fullmatch(wanted):
        return None
    found = re.sub(r"\\colon|\\ratio", ":", _bare(answer))
    if match := _FRACTION.fullmatch(found):
        found = f"{match[2] or match[4]}:{match[3] or match[5]}"
    return re.sub(r"[ .]", "", found).lower() == re.sub(r"[ .]", "", wanted).lower()


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
    _integers,
    _percentages,
    _choices,
    _bases,
    _words,
    _ratios,
    _assignments,
    _units,
)


def _math_verify(answer: str, reference: str) -> bool:
    import math_verify

    wanted = _parsed(reference)
    if not wanted:
        raise Unparseable(f"the reference answer {reference!r:.200} is no mathematics")
    if _BRACKETED.fullmatch(reference) and "," in answer and not re.match(r"\\?[(\[{]", answer):
        answer = f"{reference[0]}{answer}{reference[-1]}"  # an ordered pair without its brackets
    found = _parsed(answer)
    if not found or _differ_exactly(wanted[0], found[0]):
        return False
    # Limits of time are the pool's: those of math-verify need the main thread.
    same = math_verify.verify(wanted, found, timeout_seconds=None, allow_set_relation_comp=True)
    return bool(same)


def _differ_exactly(first: Any, second: Any) -> bool:
    """Whether both are rational numbers and not equal; math-verify rounds tiny ones to zero."""
    values = [each.doit() for each in (first, second) if hasattr(each, "doit")]
    is_rational = [getattr(value, "is_Rational", False) for value in values]
    return len(values) == 2 and all(is_rational) and bool(values[0] != values[1])


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
