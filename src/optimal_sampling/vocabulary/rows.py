"""A dataset's row -> the problem to be solved, and what was said before it.

A problem is a text, or a conversation in chat form (`messages`, or TRL's conversational `prompt`) whose last user turn
is the problem. TRL's `privileged_context` is for the teacher alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from optimal_sampling.errors import PromptError
from optimal_sampling.vocabulary.template import value_text

__all__ = ["PROMPT_COLUMNS", "Conversation", "PromptError", "conversation_of", "problem_of"]

PROMPT_COLUMNS = ("problem", "question", "prompt", "messages")
"""Where a problem is looked for when no column is named, in this order."""


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
    """For the teacher's user turn only."""


def problem_of(row: Mapping[str, Any], prompt_column: str | None = None) -> str:
    """The text of a row's problem. Raises PromptError as `conversation_of` does."""
    return conversation_of(row, prompt_column).problem


def conversation_of(row: Mapping[str, Any], prompt_column: str | None = None) -> Conversation:
    """Read a row. `prompt_column=None` takes the first of PROMPT_COLUMNS that the row has.

    Assistant turns after the last user turn are the answer, not the prompt, and are left out.
    Raises PromptError where the problem is missing, null, empty or of no known form.
    """
    column = (
        prompt_column
        if prompt_column is not None
        else next((name for name in PROMPT_COLUMNS if name in row), None)
    )
    if column is None:
        raise PromptError(
            f"the row has none of the columns {', '.join(PROMPT_COLUMNS)}; it has: {_names(row)}"
        )
    if column not in row:
        raise PromptError(f"the row has no column {column!r}; it has: {_names(row)}")
    privileged = _text_or_turns(row.get("privileged_context"), "privileged_context")
    value = row[column]
    if _is_sequence(value):
        return _from_turns(_turns(value, column), column, privileged)
    text = value_text(value)
    if text is None or not text.strip():
        raise PromptError(f"column {column!r} is {'null' if text is None else 'empty'}")
    return Conversation(problem=text, privileged=privileged)


def _from_turns(turns: list[tuple[str, str]], column: str, privileged: str | None) -> Conversation:
    last = max((place for place, (role, _) in enumerate(turns) if role == "user"), default=-1)
    if last < 0:
        raise PromptError(f"column {column!r} holds no user turn")
    if not turns[last][1].strip():
        raise PromptError(f"the last user turn of column {column!r} is empty")
    before = turns[:last]
    system = None
    if before and before[0][0] in ("system", "developer"):
        system = before.pop(0)[1]
    return Conversation(
        problem=turns[last][1], history=tuple(before), system=system, privileged=privileged
    )


def _turns(messages: Sequence[Any], column: str) -> list[tuple[str, str]]:
    turns = []
    for place, message in enumerate(messages):
        if (
            not isinstance(message, Mapping)
            or not isinstance(message.get("role"), str)
            or "content" not in message
        ):
            raise PromptError(
                f"column {column!r}: turn {place} is no object with `role` and `content`"
            )
        turns.append((message["role"], _content(message["content"], column, place)))
    return turns


def _content(content: object, column: str, place: int) -> str:
    """A turn's text; a list of parts is joined where all of them are text."""
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
    """Privileged context is a text, or turns whose texts are joined; null and empty are nothing."""
    if _is_sequence(value):
        text: str | None = "\n\n".join(content for _, content in _turns(value, column))
    else:
        text = value_text(value)
    return text if text and text.strip() else None


def _is_sequence(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, (str, bytes))


def _names(row: Mapping[str, Any]) -> str:
    return ", ".join(map(str, row)) or "nothing"
