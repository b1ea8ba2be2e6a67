"""The answer in a completion, and the reference answer in a row of a dataset. Text only."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from optimal_sampling.vocabulary.thinking import Block

__all__ = [
    "REFERENCE_FIELDS",
    "Block",
    "answer_text",
    "ends_in_thinking",
    "find_answer",
    "last_box",
    "reference_of",
]

REFERENCE_FIELDS = ("answer", "final_answer", "expected_answer", "ground_truth", "solution")
"""Columns in which a row's reference answer is looked for, the likeliest first."""

_BOX = re.compile(r"\\(?:boxed|fbox)\s*(?=[{\d])")
_HASHES = re.compile(r"####[ \t]*(\S[^\n]*)")
_STATED = re.compile(
    r"(?:^|[\s*_])(?:final\s+answer|answer)(?:\s+is|\s*:|\**\s*:|:\**)[\s:*]*([^\n]+)",
    re.IGNORECASE,
)


def answer_text(completion: str, blocks: Sequence[Block], *, in_thinking: bool = False) -> str:
    """The text after the last closed block of reasoning, without a block that is not closed.

    `blocks`: opening and closing markers. `in_thinking`: the prompt has opened a block.
    """
    ends = [completion.rfind(closing) + len(closing) for _, closing in blocks if closing]
    places = [end for end, (_, closing) in zip(ends, blocks, strict=True) if end >= len(closing)]
    if not places and in_thinking:
        return ""
    text = completion[max(places, default=0) :]
    openings = [text.find(opening) for opening, _ in blocks]
    return text[: min((place for place in openings if place >= 0), default=len(text))]


def ends_in_thinking(prompt: str, blocks: Sequence[Block]) -> bool:
    """Whether a prompt ends with the opening marker of a block of reasoning."""
    return prompt.rstrip().endswith(tuple(opening for opening, _ in blocks))


def find_answer(text: str) -> str | None:
    r"""The content of the last balanced `\boxed{}`; without one, an answer that is stated.

    Stated is what follows `####`, or `answer is` and `answer:` on the same line. A last number
    alone is no answer. None where there is none, or where the box is empty.
    """
    box = last_box(text)
    if box is None:
        box = _stated(text)
    return (box or "").strip() or None


def _stated(text: str) -> str | None:
    for pattern in (_HASHES, _STATED):
        found = pattern.findall(text)
        if found:
            return str(found[-1]).lstrip("* ").rstrip("*. ")
    return None


def last_box(text: str) -> str | None:
    r"""Content of the last `\boxed{...}` or `\fbox{...}` whose braces are balanced.

    Also the digits of `\boxed 5`. Braces that are escaped do not count. None without a box.
    """
    closings = _closings(text)
    for match in reversed(list(_BOX.finditer(text))):
        start = match.end()
        if text[start] != "{":
            return text[start:].split(maxsplit=1)[0]
        if start in closings:
            return text[start + 1 : closings[start]]
    return None


def _closings(text: str) -> dict[int, int]:
    """The place of the closing brace of each opening one that is closed, in one pass."""
    closings, opened = {}, []
    for place, character in _unescaped(text):
        if character == "{":
            opened.append(place)
        elif character == "}" and opened:
            closings[opened.pop()] = place
    return closings


def _unescaped(text: str) -> Iterator[tuple[int, str]]:
    r"""Characters with their places, without those that a backslash escapes (`\{`)."""
    escaped = False
    for place, character in enumerate(text):
        if not escaped:
            yield place, character
        escaped = character == "\\" and not escaped


def reference_of(row: Mapping[str, Any], field: str | None = None) -> str | None:
    r"""The reference answer of a row: of `field`, or of the first of REFERENCE_FIELDS with one.

    Of a worked solution it is what follows the last `####`, or the last box; a solution without
    either has none. None where the row has no reference.
    """
    for name in (field,) if field else REFERENCE_FIELDS:
        found = _reference(row.get(name), is_solution=name == "solution")
        if found is not None:
            return found
    return None


def _reference(value: Any, *, is_solution: bool) -> str | None:
    if isinstance(value, list | tuple) and len(value) == 1:
        value = value[0]
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        return None
    text = str(value).strip()
    hashes = _HASHES.findall(text)
    if hashes:
        return str(hashes[-1]).strip()
    box = last_box(text)
    if box is not None:
        return box.strip() or None
    return None if is_solution else text or None
