"""How one model is shown a conversation: rendered by its chat template, or as plain text.

With a chat template: the messages and tools as they are, tokenised without a second BOS.
As plain text: the texts of the messages joined by blank lines, without the names of the roles,
tokenised with the tokenizer's defaults. No prompt is ever cut.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import date, datetime, time
from functools import lru_cache
from typing import Any, Literal, get_args

from optimal_sampling.config import PromptConfig
from optimal_sampling.errors import ConfigError, PromptError
from optimal_sampling.prompts.probe import (
    PROBE,
    REASONING_FIELDS,
    Message,
    Probe,
    Tools,
    part_name,
)
from optimal_sampling.prompts.rows import Conversation, user_turn
from optimal_sampling.vocabulary.thinking import KNOWN_BLOCKS, Block

__all__ = ["SEAM", "ChatFormat", "Role", "ThinkingState"]

Role = Literal["student", "teacher"]
ThinkingState = Literal["none", "open", "closed"]
"""What the end of a prompt says: no thinking block, one that is open, one that is closed."""

Form = Literal["as is", "blank", "parts"]
FORMS: tuple[Form, ...] = get_args(Form)
"""Contents as text, with an empty text where a message has none, as a list of parts."""

_SWITCH = re.compile(r"/\w+")

SEAM = "5be01d93c7a2f648"
"""A text within a control token of a row, where it is cut to be encoded as ordinary text."""

_USER_TURN = [{"role": "user", "content": PROBE}]
_DIRECTIVES = (
    "a A b B c C d -d D e f F g G h H -H I -I j -j m -m M -M n p r R S -S t T u U V w W x X y Y z Z"
)
# Takes the place of `strftime_now` in chat templates. `+` keeps a line break after the tag.
_STRFTIME = (
    "{% macro strftime_now(format) %}{% filter replace('\ue000', '%') %}"
    "{% for piece in format.replace('%%', '\ue000').split('%') %}"
    "{% if loop.first %}{{ piece }}"
    "{% elif piece[:2] in date_parts %}{{ date_parts[piece[:2]] ~ piece[2:] }}"
    "{% else %}{{ date_parts[piece[:1]] ~ piece[1:] }}{% endif %}"
    "{% endfor %}{% endfilter %}{% endmacro +%}"
)


@dataclass(frozen=True)
class ChatFormat:
    """Chat template, system prompt and tokenizer of one model."""

    role: Role
    config: PromptConfig
    tokenizer: Any
    rows: int | None
    """Rows of the model's embedding: ids of a prompt lie below; None: unknown."""
    system_prompt: str | None
    """Replaces the system prompt of a row; None: that of the row stays."""
    day: date
    """The date that chat templates print, at midnight."""
    _forms: dict[object, tuple[Form, str]] = field(default_factory=dict, repr=False, compare=False)
    """By shape of conversation: the form of its contents, and what is wrong even then."""

    @property
    def uses_template(self) -> bool:
        """Whether prompts are rendered by the chat template."""
        return self.config.chat_template and bool(self._template)

    @property
    def prints_date(self) -> bool:
        """Whether prompts depend on `day`."""
        return self.uses_template and "strftime_now" in self._template

    @property
    def _template(self) -> str:
        """Source of the chat template, or of all of them; empty where there is none."""
        return str(getattr(self.tokenizer, "chat_template", None) or "")

    def text(self, conversation: Conversation, turn: str) -> str:
        """The prompt as text, with `turn` as the last user turn.

        Raises PromptError where the chat template refuses the conversation or leaves a part out.
        """
        messages, place = self._messages(conversation, turn)
        if not self.uses_template:
            return self._plain_text(messages, conversation.tools)
        form, lost = self._form(messages, conversation.tools, place)
        if lost:
            raise PromptError(f"the {self.role}'s {lost}")
        text = self._render(messages, conversation.tools, form)
        for index, message in enumerate(messages):
            if not _is_shown(message, text, exactly=index == place):
                part = part_name(index, message["role"], place)
                raise PromptError(f"the {self.role}'s chat template changes {part}")
        return text

    def ids(self, text: str) -> tuple[int, ...]:
        """Ids of a whole prompt. A BOS in the text is not added again; an EOS is never added.

        The pieces between SEAMs of literal control tokens are encoded on their own. Raises
        PromptError for a lone surrogate, an empty prompt, an id that the model lacks.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            reason = f"the {self.role}'s prompt holds half a character (a lone surrogate): {error}"
            raise PromptError(reason) from error
        first, *others = text.split(SEAM) if self.config.literal_control_tokens else [text]
        ids = self._encoded(first, defaults=not self.uses_template)
        if not self.uses_template:
            ids = self._without_extra_ends(ids, first)
        for piece in others:
            ids += self._encoded_further(piece)
        if not ids:
            raise PromptError(f"the {self.role}'s prompt is empty")
        largest = max(ids)
        if self.rows is not None and largest >= self.rows:
            raise PromptError(
                f"the {self.role}'s prompt holds token id {largest}, "
                f"but the model knows {self.rows} ids"
            )
        return tuple(ids)

    def notes(self) -> list[str]:
        """Options that have no effect on this model."""
        if self.config.chat_template and not self.uses_template:
            return [f"the {self.role}'s tokenizer has no chat template: its prompts are plain text"]
        if self.uses_template and self._thinking_flags() and self._ignores_thinking():
            return [
                f"the {self.role}'s chat template knows no thinking mode: "
                f"thinking={self.config.thinking} changes nothing"
            ]
        return []

    def thinking_state(self, turn: str, blocks: Sequence[Block]) -> ThinkingState:
        """State of the thinking block at the end of a prompt; the user turn contains PROBE.

        Of a chat template only what opens the answer counts, of plain text what follows PROBE.
        Raises ConfigError where the chat template refuses the turn, leaves out a part of it or of
        the system prompt, or renders one conversation in two ways.
        """
        if not self.uses_template:
            return _thinking_state(turn.rpartition(PROBE)[2], blocks)
        conversation = user_turn(PROBE)
        try:
            prompt = self.text(conversation, turn)
            messages, place = self._messages(conversation, turn)
            form, _ = self._form(messages, None, place)
            question = self._render(messages, None, form, add_generation_prompt=False)
            again = self.text(conversation, turn)
        except PromptError as error:
            advice = "; write it into the user turn" if "the system prompt" in str(error) else ""
            raise ConfigError(f"{error}{advice}") from error
        if prompt != again:
            raise ConfigError(
                f"the {self.role}'s chat template renders the same conversation in different ways"
            )
        if prompt.startswith(question):
            return _thinking_state(prompt.removeprefix(question), blocks)
        return _thinking_state(prompt.rpartition(PROBE)[2], blocks)

    def control_tokens(self, blocks: Iterable[Block]) -> set[str]:
        """Texts that the tokenizer reads as control tokens.

        These are its special tokens, and the added tokens that its chat template writes or that
        are markers of reasoning. Other added tokens are words.
        """
        written = "\n".join((self._template, *(marker for block in blocks for marker in block)))
        added = getattr(self.tokenizer, "added_tokens_decoder", {}).values()
        tokens = {x.content for x in added if x.special or x.content in written}
        return {token for token in tokens if len(token.strip()) > 1}

    def _messages(self, conversation: Conversation, turn: str) -> tuple[list[Message], int]:
        """The messages with another user turn and system prompt, and the place of the user turn."""
        messages: list[Message] = list(conversation.messages)
        place = conversation.place
        messages[place] = {**messages[place], "content": turn}
        if self.system_prompt is None:
            return messages, place
        replaced = messages[0]["role"] in ("system", "developer")
        role = messages[0]["role"] if replaced else "system"
        system = [{"role": role, "content": self.system_prompt}] if self.system_prompt else []
        return [*system, *messages[replaced:]], place - replaced + len(system)

    def _plain_text(self, messages: list[Message], tools: Tools | None) -> str:
        fields = {name for each in messages for name in each if each[name]}
        shown_by_templates = sorted(fields & {"tool_calls", *REASONING_FIELDS})
        for part in [*(["tools"] if tools else []), *shown_by_templates]:
            raise PromptError(f"the {self.role}'s prompts are plain text, which has no {part}")
        return "\n\n".join(each["content"] for each in messages if each.get("content"))

    def _form(self, messages: list[Message], tools: Tools | None, place: int) -> tuple[Form, str]:
        """The form that the template wants, and what is left out of such messages even then.

        Raises PromptError where it refuses them in every form.
        """
        shape = place, bool(tools), tuple(map(_shape, messages))
        if shape not in self._forms:
            self._forms[shape] = self._best_form(Probe(messages, tools, place))
        return self._forms[shape]

    def _best_form(self, probe: Probe) -> tuple[Form, str]:
        found: list[tuple[int, Form, str]] = []
        refusals: list[PromptError] = []
        for form in FORMS:
            try:
                text = self._render(probe.messages, probe.tools, form)
                # A tokenizer that drops characters is found by decoding.
                read = self.tokenizer.decode(self.ids(text)).replace(" ", "")
            except PromptError as error:
                refusals.append(error)
                continue
            left_out, lost = probe.missing(text), probe.missing(read)
            if not lost:
                return form, ""
            culprit = "chat template leaves out" if left_out else "tokenizer loses"
            found.append((len(lost), form, f"{culprit} {', '.join(left_out or lost)}"))
        if not found:
            raise refusals[0]
        _, form, reason = min(found, key=lambda each: each[0])
        return form, reason

    def _render(
        self, messages: Sequence[Message], tools: Tools | None, form: Form, **options: Any
    ) -> str:
        """The messages by the chat template. Raises PromptError where it refuses them."""
        options = {"add_generation_prompt": True, **self._thinking_flags(), **options}
        if tools:
            options["tools"] = list(tools)
        shown = [_in_form(each, form) for each in messages]
        try:
            if self.prints_date:
                template = self.tokenizer.get_chat_template(None, options.get("tools"))
                options["chat_template"] = _STRFTIME + template
                options["date_parts"] = _date_parts(self.day)
            return str(self.tokenizer.apply_chat_template(shown, tokenize=False, **options))
        except Exception as error:  # a chat template is a program of the model's author
            what = " or its system prompt" if messages[0]["role"] == "system" else ""
            reason = f"the {self.role}'s chat template refuses this conversation{what}: {error}"
            raise PromptError(reason) from error

    def _thinking_flags(self) -> dict[str, bool]:
        """Templates call the switch by either name."""
        if self.config.thinking == "default":
            return {}
        return dict.fromkeys(("enable_thinking", "thinking"), self.config.thinking == "on")

    def _ignores_thinking(self) -> bool:
        form, _ = self._form([*_USER_TURN], None, 0)
        on, off = (
            self._render(_USER_TURN, None, form, enable_thinking=flag, thinking=flag)
            for flag in (True, False)
        )
        return on == off

    def _encoded(self, text: str, *, defaults: bool) -> list[int]:
        encoded = self.tokenizer(text, add_special_tokens=defaults, verbose=False)
        return list(encoded["input_ids"])

    def _encoded_further(self, text: str) -> list[int]:
        """Ids of a text within another: without the space that some tokenizers put first."""
        line_break = self._encoded("\n", defaults=False)
        ids = self._encoded(f"\n{text}", defaults=False)
        if ids[: len(line_break)] == line_break:
            return ids[len(line_break) :]
        return self._encoded(text, defaults=False)

    def _without_extra_ends(self, ids: list[int], text: str) -> list[int]:
        """Ids without a BOS added to that of the text and without an added EOS."""
        bos, eos = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        if bos is not None and ids[:2] == [bos, bos]:
            ids = ids[1:]
        adds_eos = eos is not None and ids[-1:] == [eos]
        if adds_eos and not text.endswith(self.tokenizer.eos_token):
            ids = ids[:-1]
        return ids


def _thinking_state(text: str, blocks: Sequence[Block]) -> ThinkingState:
    """`open` where the last opening marker of a thinking block is not closed."""
    state: ThinkingState = "none"
    for opening, closing in blocks:
        if text.rfind(opening) > text.rfind(closing):
            return "open"
        if closing in text:
            state = "closed"
    return state


def _is_shown(message: Message, text: str, *, exactly: bool) -> bool:
    """Whether the content of a message is in a prompt, but for space around it.

    Unless `exactly`, a template may take out a switch such as `/no_think`. Of an answer the last
    line counts: its reasoning may be left out. Results of tools are often written in another form.
    """
    content = (message.get("content") or "").strip()
    if exactly or content in text:
        return content in text
    if message["role"] == "tool":
        return True
    if message["role"] == "assistant":
        for _, closing in KNOWN_BLOCKS:
            content = content.rpartition(closing)[2]
        content = content.rstrip().rpartition("\n")[2]
    return all(piece.strip() in text for piece in _SWITCH.split(content))


def _shape(message: Message) -> tuple[object, ...]:
    """What a chat template may look at in a message, but for its texts."""
    fields = sorted(name for name, value in message.items() if value)
    return message["role"], tuple(fields)


def _in_form(message: Message, form: Form) -> Message:
    """The message with its content in the form; `as is` has no content where there is none."""
    content = message.get("content", "" if form == "blank" else None)
    if content is None:
        return message
    return {
        **message,
        "content": [{"type": "text", "text": content}] if form == "parts" else content,
    }


@lru_cache(maxsize=8)
def _date_parts(day: date) -> dict[str, str]:
    midnight = datetime.combine(day, time())
    return {name: midnight.strftime(f"%{name}") for name in _DIRECTIVES.split()}
