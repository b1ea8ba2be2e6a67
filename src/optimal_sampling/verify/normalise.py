"""The plain form of an answer: what changes its looks alone is left out."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable

__all__ = ["LONGEST", "bare", "plain"]

LONGEST = 300
"""Characters of a number whose value is computed here."""

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
_LOOSE_FRACTION = re.compile(r"\\frac\s*(\\?[A-Za-z]+|\d)\s*(\\[A-Za-z]+|\d|(?<=\s)[A-Za-z])")
_INTRODUCED = re.compile(r"^\s*\\text\s*\{[^{}]*(?:\bis|[:=])\s*\}(?=.)")
_MIXED = re.compile(r"(?<![\d/.])(\d+) ([1-9]\d{0,2}) ?/ ?([1-9]\d{0,2})(?![\d/.])")  # 1 1/2
_SCIENTIFIC = re.compile(r"^([-+]?\d+(?:\.\d+)?)[eE]\+?(-?\d{1,3})$")
_ROOT = re.compile(r"√\s*(?:\(([^()]*)\)|(\d+|\w))")
_SUPERSCRIPT = re.compile("[⁰¹²³⁴-⁹⁺⁻]+")
_SIGNS = {"∞": r"\infty ", "∪": r"\cup ", "∩": r"\cap ", "·": r"\cdot ", "÷": "/", "。": "."}
_REPEATING = re.compile(r"(?<!\d)(\d*)\.(\d*)\\overline\s*\{(\d+)\}")


def _repeating(match: re.Match[str]) -> str:
    r"""`0.1\overline{6}` as a fraction: (16 - 1) / (100 - 10)."""
    whole, before, again = match.groups()
    if len(match[0]) > LONGEST:
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
    (_MIXED, r"\1\\frac{\2}{\3}"),
    (_SCIENTIFIC, r"\1 \\cdot 10^{\2}"),
)


def plain(text: str) -> str:
    """An answer without what changes its looks alone: delimiters, spaces, fonts, a full stop."""
    text = _in_ascii(text).strip()
    while match := _DELIMITED.fullmatch(text):
        text = next(group for group in match.groups() if group is not None).strip()
    for pattern, replacement in _REPLACED:
        text = pattern.sub(replacement, text)
    return text.strip().rstrip(".,;\\ ")


def _in_ascii(text: str) -> str:
    """Full-width forms, digits of any script, superscripts, roots and fractions such as ½."""
    if text.isascii():
        return text
    text = _ROOT.sub(r"\\sqrt{\1\2}", text)
    text = _SUPERSCRIPT.sub(lambda match: f"^{{{unicodedata.normalize('NFKC', match[0])}}}", text)
    return "".join(map(_sign_in_ascii, text))


def _sign_in_ascii(character: str) -> str:
    """A character in ASCII, where it has a form there."""
    if character in _SIGNS:
        return _SIGNS[character]
    kind = unicodedata.decomposition(character).partition(" ")[0]
    compatible = unicodedata.normalize("NFKC", character)
    if kind == "<fraction>":
        above, _, below = compatible.partition("⁄")
        return rf"\frac{{{above}}}{{{below}}}"
    if kind == "<wide>":
        return compatible
    return str(unicodedata.decimal(character, character))


_TEXT = re.compile(r"\\text\s*\{([^{}]*)\}")


def bare(text: str) -> str:
    r"""Without the commands of `\text{...}` around its parts."""
    return re.sub(r"\s+", " ", _TEXT.sub(r"\1", text)).strip().rstrip(".,: ")
