"""The token with which a chat template ends the turns of the assistant."""

from __future__ import annotations

from collections.abc import Set
from itertools import cycle
from typing import Any

__all__ = ["turn_end"]

_USER, _REPLY, _NEXT = "5f0c2d71ab", "8e13b96dc4", "27a4d05be9"
"""Texts of turns that no template contains."""


def turn_end(tokenizer: Any, end_ids: Set[int]) -> int | None:
    """The id that ends a turn and is not in `end_ids`; None where the ids that are known do.

    A conversation is rendered, and what follows the assistant's turn is read. Where nothing
    follows a last turn, the token that begins the next one ends it. None too without a template, or
    where a turn ends in plain text.
    """
    if not getattr(tokenizer, "chat_template", None):
        return None
    opening, ends = _around_reply(tokenizer, [_USER, _REPLY])
    while len(ends) > 1 and opening[-1:] == ends[-1:]:
        opening.pop()  # the template begins another turn whether it is asked to or not
        ends.pop()
    within = _around_reply(tokenizer, [_USER, _REPLY, _NEXT])[1]
    # what follows the turn's end in a last turn only ends the conversation
    ends = ends[:1] + [marker for marker in ends[1:] if marker in within] or within[:1]
    return None if not ends or end_ids & set(ends) else ends[-1]


def _around_reply(tokenizer: Any, texts: list[str]) -> tuple[list[int], list[int]]:
    """Markers between the first turn's text and the second's, and between this and the third's."""
    for as_parts in (False, True):  # some templates take text, and some a list of parts
        rendered = _rendered(tokenizer, texts, as_parts)
        before, reply, after = rendered.partition(_REPLY)
        if reply:
            opening = before.rpartition(_USER)[2]
            return _markers(tokenizer, opening), _markers(tokenizer, after.partition(_NEXT)[0])
    return [], []


def _rendered(tokenizer: Any, texts: list[str], as_parts: bool) -> str:
    """The conversation as text, "" where the template refuses it."""
    turns = [
        {"role": role, "content": [{"type": "text", "text": text}] if as_parts else text}
        for role, text in zip(cycle(("user", "assistant")), texts, strict=False)
    ]
    try:
        return str(tokenizer.apply_chat_template(turns, tokenize=False))
    except Exception:  # a chat template is a program of the model's author
        return ""


def _markers(tokenizer: Any, text: str) -> list[int]:
    """Ids of the special and added tokens in a text, in order."""
    known = {*tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()}
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    return [index for index in ids if index in known]
