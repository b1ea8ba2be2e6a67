"""A row of a dataset -> its conversation: problem, earlier turns, system prompt.

A problem is a text, or the last user turn of a conversation in chat form (a column `messages`, or
TRL's conversational `prompt`). TRL's `privileged_context` is shown to the teacher only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from optimal_sampling.errors import PromptError
from optimal_sampling.prompts.template import value_text

__all__ = ["PROMPT_COLUMNS", "Conversation", "conversation_of"]

PROMPT_COLUMNS = ("problem", "question", "prompt", "messages")
"""Columns of the problem where none is named; the first that the row has."""


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
