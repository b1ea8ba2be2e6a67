"""`{column}` in the text of a user turn.

Problems and answers are full of LaTeX, so `str.format` cannot be used: values are never parsed, and
of a template only `{name}` is, where name is an identifier.

    {problem}        the value of that column
    {{problem}}      the text {problem}
    {{{problem}}}    the value of that column in braces
    {{}}             {}
    anything else    stays as it is: \\boxed{}, x^{2}, \\frac{1}{2}, { problem }
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping

__all__ = ["fill", "names_in", "value_text"]

_FIELD = re.compile(
    r"""
      \{\{\{ (?P<braced>  [A-Za-z_][A-Za-z0-9_]*)    \}\}\}
    | \{\{   (?P<literal> ([A-Za-z_][A-Za-z0-9_]*)?) \}\}
    | \{     (?P<name>    [A-Za-z_][A-Za-z0-9_]*)    \}
    """,
    re.VERBOSE,
)


def names_in(template: str) -> frozenset[str]:
    """The columns a template asks for."""
    found = (match["name"] or match["braced"] for match in _FIELD.finditer(template))
    return frozenset(name for name in found if name)


def fill(template: str, text_of: Callable[[str], str]) -> str:
    """Replace every `{name}` by `text_of(name)`, whose exceptions pass through."""

    def replacement(match: re.Match[str]) -> str:
        if match["name"]:
            return text_of(match["name"])
        if match["braced"]:
            return "{" + text_of(match["braced"]) + "}"
        return "{" + match["literal"] + "}"

    return _FIELD.sub(replacement, template)


def value_text(value: object) -> str | None:
    """A column's value as a prompt shows it; None for null and for the NaN that stands for null."""
    if value is None or value != value:
        return None
    if isinstance(value, str):
        return value
    if isinstance(value, (Mapping, list, tuple)):
        return json.dumps(value, ensure_ascii=False, default=str)
    return str(value)
