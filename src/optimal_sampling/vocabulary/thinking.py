"""The markers around a model's reasoning, found by rendering its chat template."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import takewhile
from typing import Any

__all__ = ["KNOWN_BLOCKS", "Block", "thinking_blocks"]

Block = tuple[str, str]
"""The text before a model's reasoning, and the text between its reasoning and its answer."""

KNOWN_BLOCKS: tuple[Block, ...] = (
    ("<think>", "</think>"),
    ("<thinking>", "</thinking>"),
    ("<thought>", "</thought>"),
    ("[THINK]", "[/THINK]"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
    ("<seed:think>", "</seed:think>"),
    ("◁think▷", "◁/think▷"),
    ("<|channel|>analysis<|message|>", "<|channel|>final<|message|>"),
    ("<|channel>thought", "<channel|>"),
    ("<|inner_prefix|>", "<|inner_suffix|>"),
)
"""Blocks of common models, for those whose chat template does not show its own."""

_QUESTION = "b01c7d52"
_REASONING = "5f3a9e06"
_ANSWER = "e94d2b71"
_TAG = re.compile(r"[<\[◁]\|?[^<>\[\]◁▷|\s]+\|?[>\]▷]")
_LONGEST = 80
_USER = {"role": "user", "content": _QUESTION}
_REPLY = {"role": "assistant", "content": _ANSWER}
_THOUGHT = _REPLY | dict.fromkeys(("reasoning_content", "reasoning", "thinking"), _REASONING)


def thinking_blocks(tokenizer: Any) -> tuple[Block, ...]:
    """Blocks of reasoning that a tokenizer's chat template writes or begins.

    A block is taken from an assistant turn that has `reasoning_content`, and from what the template
    puts at the end of a prompt beyond the header of an assistant turn. Empty without a template.
    """
    if not getattr(tokenizer, "chat_template", None):
        return ()
    question = _rendered(tokenizer, [_USER])
    tails = [tail for tail in _assistant_starts(tokenizer, question) if tail]
    header = _common_start(tails)
    found = [block for tail in tails for block in _begun(tail.removeprefix(header))]
    thought = _rendered(tokenizer, [_USER, _THOUGHT], enable_thinking=True, thinking=True)
    before, reasoning, after = _after(question, thought).partition(_REASONING)
    closing, answer, _ = after.partition(_ANSWER)
    if reasoning and answer:
        found.append((before.removeprefix(header).strip(), closing.strip()))
    return tuple(dict.fromkeys(block for block in found if _is_block(block)))


def _assistant_starts(tokenizer: Any, question: str) -> Iterator[str]:
    """The text that follows a question: ends of prompts, and the start of finished turns."""
    switches: tuple[dict[str, bool], ...] = (
        {},
        {"enable_thinking": True, "thinking": True},
        {"enable_thinking": False, "thinking": False},
    )
    for switch in switches:
        prompt = _rendered(tokenizer, [_USER], add_generation_prompt=True, **switch)
        yield _after(question, prompt)
    for turns in ([_USER, _REPLY], [_USER, _THOUGHT], [_USER, _REPLY, _USER]):
        yield _after(question, _rendered(tokenizer, turns)).partition(_ANSWER)[0]


def _common_start(texts: list[str]) -> str:
    columns = zip(*texts, strict=False)
    alike = takewhile(lambda column: len(set(column)) == 1, columns)
    return "".join(column[0] for column in alike)


def _after(start: str, text: str) -> str:
    """The text after `start`; empty where it does not begin with it."""
    return text.removeprefix(start) if text.startswith(start) else ""


def _rendered(tokenizer: Any, turns: list[dict[str, str]], **options: bool) -> str:
    """The rendered turns; empty where the template refuses them."""
    options = {"add_generation_prompt": False, **options}
    try:
        return str(tokenizer.apply_chat_template(turns, tokenize=False, **options))
    except Exception:  # a chat template is a program of the model's author
        return ""


def _begun(tail: str) -> list[Block]:
    """Blocks whose opening marker is in a text."""
    if _ANSWER in tail or _REASONING in tail:
        return []
    return [(tag, _closing(tag)) for tag in _TAG.findall(tail)]


def _closing(tag: str) -> str:
    """The closing marker that belongs to an opening one; empty where there is none."""
    for opens, closes in (("START", "END"), ("start", "end"), ("BEGIN", "END"), ("begin", "end")):
        if opens in tag:
            return tag.replace(opens, closes)
    is_plain = "|" not in tag and "/" not in tag
    return f"{tag[0]}/{tag[1:]}" if is_plain else ""


def _is_block(block: Block) -> bool:
    opening, closing = block
    return bool(opening and closing) and max(map(len, block)) <= _LONGEST
