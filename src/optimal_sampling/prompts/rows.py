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

Refused are a column's name in a brace that is not closed, and the `{problem.x}`, `{problem[0]}`,
`{problem!r}`, `{problem:>9}` and `{0}` of `str.format`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from typing import Any

from optimal_sampling.errors import PromptError

__all__ = [
    "PROMPT_COLUMNS",
    "Conversation",
    "conversation_of",
    "fill",
    "literals_in",
    "mistyped",
    "names_in",
    "user_turn",
    "value_text",
]

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
# Braces of LaTeX are those after a command, `^`, `_` or a closing brace.
_MISTYPED = re.compile(
    r"""
      \\[A-Za-z]+\{
    | (?<![\^_{}]) (?P<place> \{ (?P<name> [A-Za-z_][A-Za-z0-9_]*)
        (?: (?: \.\w | \[ | ![rsa] | :(?!\s)) [^{}]* \}? | (?![A-Za-z0-9_]) [^{}]* (?=\{|\Z) ))
    | (?<!\S) (?P<number> \{ [0-9]+ \})
    """,
    re.VERBOSE,
)
_ANSWER_FIELDS = {"content", "tool_calls", "reasoning_content", "reasoning", "thinking"}


@dataclass(frozen=True, slots=True)
class Conversation:
    """The messages of a row, whatever their form there."""

    messages: tuple[dict[str, Any], ...]
    """Messages as the row has them, with contents as text, without an answer at the end."""
    place: int = 0
    """Index of the last user turn."""
    tools: list[dict[str, Any]] | None = None
    """Schemas of the tools that the model may call."""
    privileged: str | None = None
    """Text for the teacher's user turn only."""

    @property
    def problem(self) -> str:
        """Text of the last user turn."""
        return str(self.messages[self.place]["content"])


def user_turn(text: str) -> Conversation:
    """A conversation of one user turn."""
    return Conversation(({"role": "user", "content": text},))


def conversation_of(row: Mapping[str, Any], prompt_column: str | None = None) -> Conversation:
    """The conversation of a row. Without `prompt_column`, the first of PROMPT_COLUMNS in the row.

    Assistant turns at the end are the answer, not the prompt, and are left out.
    Raises PromptError where the problem is missing, null, empty or of no known form.
    """
    column = _column(row, prompt_column)
    messages = _messages(row[column], column)
    conversation = _from_text(row[column], column) if messages is None else _chat(messages, column)
    return replace(
        conversation,
        tools=_tools(row.get("tools"), required=messages is not None),
        privileged=_text_or_turns(row.get("privileged_context"), "privileged_context"),
    )


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


def _from_text(value: Any, column: str) -> Conversation:
    text = value_text(value, column)
    if text is None:
        raise PromptError(f"column {column!r} is null")
    if not text.strip():
        raise PromptError(f"column {column!r} is empty")
    return user_turn(text)


def _chat(messages: list[dict[str, Any]], column: str) -> Conversation:
    while messages and messages[-1]["role"] == "assistant":
        messages.pop()
    users = [place for place, each in enumerate(messages) if each["role"] == "user"]
    if not users:
        raise PromptError(f"column {column!r} holds no user turn")
    if not messages[users[-1]]["content"].strip():
        raise PromptError(f"the last user turn of column {column!r} is empty")
    return Conversation(tuple(messages), users[-1])


def _messages(value: Any, column: str) -> list[dict[str, Any]] | None:
    """The messages of a column, from any of their forms; None where the column is no conversation.

    The forms: a list of messages, one message, an object of lists (`{"role": [...], ...}`), or the
    JSON text of one of them.
    """
    if isinstance(value, str):
        value = _parsed_messages(value, column)
    if isinstance(value, Mapping):
        value = _columnar(value) if _is_sequence(value.get("role")) else [value]
    if not _is_sequence(value):
        return None
    return [_message(each, f"column {column!r}: turn {place}") for place, each in enumerate(value)]


def _parsed_messages(text: str, column: str) -> Any:
    """The value of JSON text that holds messages; None for any other text."""
    if not text.lstrip().startswith(("[", "{")):
        return None
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        if column == "messages":
            raise PromptError(f"column 'messages' is a text, but no JSON: {error}") from error
        return None
    messages = value if isinstance(value, list) else [value]
    return value if messages and all(_has_role(each) for each in messages) else None


def _has_role(message: Any) -> bool:
    return isinstance(message, Mapping) and "role" in message


def _columnar(value: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Messages of an object of lists, as `datasets` stores a sequence of objects."""
    columns = [list(each) if _is_sequence(each) else [] for each in value.values()]
    return [dict(zip(value, each, strict=True)) for each in zip_longest(*columns)]


def _message(message: Any, place: str) -> dict[str, Any]:
    """A message without its null fields. `place`: where it is, for errors."""
    role = message.get("role") if isinstance(message, Mapping) else None
    if not isinstance(role, str) or not _ANSWER_FIELDS & message.keys():
        raise PromptError(f"{place} is no object with `role` and `content`")
    if role != "assistant" and "content" not in message:
        raise PromptError(f"{place} is no object with `role` and `content`")
    kept = {str(name): value for name, value in message.items() if value is not None}
    if "content" in kept or role != "assistant":
        kept["content"] = _content(kept.get("content", ""), place)
    if isinstance(kept.get("tool_calls"), str):
        kept["tool_calls"] = _parsed(kept["tool_calls"], f"{place}: `tool_calls`")
    return kept


def _content(content: object, place: str) -> str:
    """Text of a turn. Parts are joined where all of them are text."""
    if isinstance(content, Mapping):
        content = [content]
    if isinstance(content, str):
        return content
    if isinstance(content, Sequence):
        texts = [part.get("text") if isinstance(part, Mapping) else part for part in content]
        if all(isinstance(text, str) for text in texts):
            return "".join(map(str, texts))
    raise PromptError(f"{place} holds something that is not text")


def _tools(value: Any, *, required: bool) -> list[dict[str, Any]] | None:
    """Tool schemas of the column `tools`: a list of objects, or the JSON text of one or of each.

    A value of another form is an error in a conversation (`required`), else an ordinary column.
    """
    if not value or value != value:
        return None
    try:
        tools = _parsed(value, "column 'tools'") if isinstance(value, str) else value
        if not _is_sequence(tools):
            raise PromptError("column 'tools' is no list of objects")
        found = [_parsed(x, "column 'tools'") if isinstance(x, str) else x for x in tools]
        if not all(isinstance(tool, Mapping) for tool in found):
            raise PromptError("column 'tools' is no list of objects")
    except PromptError:
        if required:
            raise
        return None
    return found or None


def _parsed(text: str, place: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise PromptError(f"{place} is a text, but no JSON: {error}") from error


def _text_or_turns(value: Any, column: str) -> str | None:
    """A text, or the texts of turns joined by blank lines; None where null or empty."""
    messages = _messages(value, column)
    if messages is None:
        text = value_text(value, column)
    else:
        text = "\n\n".join(each.get("content", "") for each in messages)
    return text if text and text.strip() else None


def _is_sequence(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, (str, bytes, bytearray))


def names_in(template: str) -> frozenset[str]:
    """The columns a template asks for."""
    found = (match["name"] or match["braced"] for match in _FIELD.finditer(template))
    return frozenset(name for name in found if name)


def literals_in(template: str) -> frozenset[str]:
    """The names that a template writes as text in braces: `{{name}}`."""
    return frozenset(match["literal"] for match in _FIELD.finditer(template) if match["literal"])


def mistyped(template: str, known: Container[str]) -> str | None:
    """The first text of a template that is meant as `{column}` and is none; None without one.

    `{0}` counts only in a template that asks for no column.
    """
    numbers = not names_in(template)
    for match in _MISTYPED.finditer(_FIELD.sub("\0", template)):
        if match["number"] and numbers:
            return match["number"]
        if match["name"] and match["name"] in known:
            return match["place"].replace("\0", "...")
    return None


def fill(template: str, text_of: Callable[[str], str]) -> str:
    """Replace every `{name}` by `text_of(name)`, whose exceptions pass through."""

    def replacement(match: re.Match[str]) -> str:
        if match["name"]:
            return text_of(match["name"])
        if match["braced"]:
            return "{" + text_of(match["braced"]) + "}"
        return "{" + match["literal"] + "}"

    return _FIELD.sub(replacement, template)


def value_text(value: object, column: str) -> str | None:
    """A column's value as a prompt shows it; None for null and for the NaN that stands for null.

    Raises PromptError for bytes that are no UTF-8.
    """
    if value is None or value != value:
        return None
    if isinstance(value, str):
        return value
    if isinstance(value, (bytes, bytearray)):
        try:
            return value.decode()
        except UnicodeDecodeError as error:
            raise PromptError(f"column {column!r} holds {len(value)} bytes, no text") from error
    if isinstance(value, (Mapping, list, tuple)):
        return json.dumps(value, ensure_ascii=False, default=_inner_text)
    return str(value)


def _inner_text(value: object) -> str:
    """Text of a value inside a column that JSON does not have. Raises PromptError for bytes."""
    if isinstance(value, bytes):
        raise PromptError(f"a column that a prompt shows holds {len(value)} bytes, no text")
    return str(value)
