"""Conversations whose parts are replaced by markers, to see what a chat template leaves out."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["PROBE", "REASONING_FIELDS", "Message", "Probe", "Tools", "part_name"]

Message = Mapping[str, Any]
Tools = Sequence[Mapping[str, Any]]

PROBE = "9d5ed678fe57bcca"
"""A text that no template contains."""

REASONING_FIELDS = ("reasoning_content", "reasoning", "thinking")
"""The names under which chat templates know the reasoning of a message."""


class Probe:
    """A conversation with a marker in each part that its prompt must show.

    These are the contents, the arguments of tool calls, the names of tools, and the reasoning
    after the last user turn (`place`). Earlier reasoning is left out by many templates on purpose;
    `name` and `tool_call_id` of a message, and the names in tool calls, are not shown by all.
    """

    messages: list[Message]
    tools: Tools | None

    def __init__(self, messages: Sequence[Message], tools: Tools | None, place: int) -> None:
        self._parts: dict[str, str] = {}
        self._place = place
        self.messages = [self._message(index, message) for index, message in enumerate(messages)]
        self.tools = tools and [self._named(tool, "the tools") for tool in tools]

    def missing(self, text: str) -> list[str]:
        """The parts whose markers a text lacks."""
        lost = (part for marker, part in self._parts.items() if marker not in text)
        return list(dict.fromkeys(lost))

    def _marker(self, part: str) -> str:
        marker = f"{PROBE}{len(self._parts):04x}"
        self._parts[marker] = part
        return marker

    def _message(self, index: int, message: Message) -> Message:
        copy = dict(message)
        if message.get("content"):
            copy["content"] = self._marker(part_name(index, message["role"], self._place))
        reasoning = [name for name in REASONING_FIELDS if message.get(name)]
        if reasoning and index > self._place:
            copy |= dict.fromkeys(reasoning, self._marker(f"the reasoning of turn {index}"))
        if message.get("tool_calls"):
            part = f"the tool calls of turn {index}"
            copy["tool_calls"] = [self._call(call, part) for call in message["tool_calls"]]
        return copy

    def _call(self, call: Any, part: str) -> Any:
        """A tool call with a marker in its arguments: some templates show an id, not the name."""
        function = _function(call)
        arguments = function.get("arguments") if isinstance(function, Mapping) else None
        if isinstance(arguments, Mapping):
            marker = self._marker(part)
            return _replaced(call, arguments={**arguments, marker: marker})
        if isinstance(arguments, str) and arguments.rstrip().endswith("}"):
            marker = self._marker(part)
            with_marker = {**_object(arguments), marker: marker}
            return _replaced(call, arguments=json.dumps(with_marker))
        return self._named(call, part)

    def _named(self, holder: Any, part: str) -> Any:
        """A tool or a tool call with a marker as its name."""
        function = _function(holder)
        if not isinstance(function, Mapping) or not function.get("name"):
            return holder
        return _replaced(holder, name=self._marker(part))


def part_name(index: int, role: str, place: int) -> str:
    """What errors call the message at an index, where the last user turn is at `place`."""
    if index == place:
        return "the user turn"
    if role in ("system", "developer"):
        return f"the {role} prompt"
    return f"turn {index} ({role})"


def _function(holder: Any) -> Any:
    return holder.get("function", holder) if isinstance(holder, Mapping) else None


def _replaced(holder: Mapping[str, Any], **values: Any) -> dict[str, Any]:
    """A copy with other values in the object `function`, or in the holder where it has none."""
    if "function" in holder:
        return {**holder, "function": {**holder["function"], **values}}
    return {**holder, **values}


def _object(text: str) -> dict[str, Any]:
    """The object of a JSON text; empty for any other text."""
    try:
        value = json.loads(text)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}
