"""A row of a dataset -> its conversation, and `{column}` in the text of a user turn.

A problem is a text, or the last user turn of a conversation in chat form (a column `messages`, or
TRL's conversational `prompt`). TRL's `privileged_context` is shown to the teacher only.

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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from optimal_sampling.errors import PromptError

__all__ = ["PROMPT_COLUMNS", "Conversation", "conversation_of", "fill", "names_in", "value_text"]

PROMPT_COLUMNS = ("problem", "question", "prompt", "messages")
"""Columns of the problem where none is named; the first that the row has."""

_FIELD = re.compile(
    r"""
      \{\{\{ (?P<braced>  [A-Za-z_][A-Za-z0-9_]*)    \}\}\}
    | \{\{   (?P<literal> ([A-Za-z_][A-Za-z0-9_]*)?) \}\}
    | \{     (?P<name>    [A-Za-z_][A-Za-z0-9_]*)    \}
    """,
    re.VERBOSE,
)


@dataclass(frozen=True, slots=True)
class Conversation:
    """What a row says, whatever its form."""

    problem: str
    """The last user turn."""
    history: tuple[tuple[str, str], ...] = ()
    """Earlier turns, as (role, text), without the system prompt."""
    system: str | None = None
    """The row's own system prompt."""
    privileged: str | None = None
    """Text for the teacher's user turn only."""


def conversation_of(row: Mapping[str, Any], prompt_column: str | None = None) -> Conversation:
    """The conversation of a row. Without `prompt_column`, the first of PROMPT_COLUMNS in the row.

    Assistant turns after the last user turn are the answer, not the prompt, and are left out.
    Raises PromptError where the problem is missing, null, empty or of no known form.
    """
    column = _column(row, prompt_column)
    privileged = _text_or_turns(row.get("privileged_context"), "privileged_context")
    value = row[column]
    if _is_sequence(value):
        return _from_turns(_turns(value, column), column, privileged)
    text = value_text(value)
    if text is None:
        raise PromptError(f"column {column!r} is null")
    if not text.strip():
        raise PromptError(f"column {column!r} is empty")
    return Conversation(problem=text, privileged=privileged)


def _column(row: Mapping[str, Any], prompt_column: str | None) -> str:
    wanted = PROMPT_COLUMNS if prompt_column is None else (prompt_column,)
    found = next((name for name in wanted if name in row), None)
    if found is not None:
        return found
    has = ", ".join(map(str, row)) or "nothing"
    if prompt_column is None:
        raise PromptError(
            f"the row has none of the columns {', '.join(PROMPT_COLUMNS)}; it has: {has}"
        )
    raise PromptError(f"the row has no column {prompt_column!r}; it has: {has}")


def _from_turns(turns: list[tuple[str, str]], column: str, privileged: str | None) -> Conversation:
    users = [place for place, (role, _) in enumerate(turns) if role == "user"]
    if not users:
        raise PromptError(f"column {column!r} holds no user turn")
    history, (_, problem) = turns[: users[-1]], turns[users[-1]]
    if not problem.strip():
        raise PromptError(f"the last user turn of column {column!r} is empty")
    system = None
    if history and history[0][0] in ("system", "developer"):
        _, system = history.pop(0)
    return Conversation(
        problem=problem, history=tuple(history), system=system, privileged=privileged
    )


def _turns(messages: Sequence[Any], column: str) -> list[tuple[str, str]]:
    turns = []
    for place, message in enumerate(messages):
        role = message.get("role") if isinstance(message, Mapping) else None
        if not isinstance(role, str) or "content" not in message:
            raise PromptError(
                f"column {column!r}: turn {place} is no object with `role` and `content`"
            )
        turns.append((role, _content(message["content"], column, place)))
    return turns


def _content(content: object, column: str, place: int) -> str:
    """Text of a turn. Parts are joined where all of them are text."""
    if isinstance(content, str):
        return content
    if content is None:
        return ""
    if isinstance(content, Sequence):
        texts = [part.get("text") if isinstance(part, Mapping) else part for part in content]
        if all(isinstance(text, str) for text in texts):
            return "".join(map(str, texts))
    raise PromptError(f"column {column!r}: turn {place} holds something that is not text")


def _text_or_turns(value: Any, column: str) -> str | None:
    """A text, or the texts of turns joined by blank lines; None where null or empty."""
    if _is_sequence(value):
        text: str | None = "\n\n".join(content for _, content in _turns(value, column))
    else:
        text = value_text(value)
    return text if text and text.strip() else None


def _is_sequence(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, (str, bytes))


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
