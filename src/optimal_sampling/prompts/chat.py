"""How one model is shown a conversation: rendered by its chat template, or as plain text.

With a chat template: [system, earlier turns, user turn], tokenised without a second BOS.
As plain text: the texts of the same turns joined by blank lines, without the names of the roles,
tokenised with the tokenizer's defaults. No prompt is ever cut.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from optimal_sampling.config import PromptConfig
from optimal_sampling.errors import ConfigError, PromptError
from optimal_sampling.prompts.rows import Conversation
from optimal_sampling.vocabulary.shared import THINKING_BLOCKS

__all__ = ["PROBE", "ChatFormat", "Role", "ThinkingState"]

Role = Literal["student", "teacher"]
ThinkingState = Literal["none", "open", "closed"]
"""What the end of a prompt says: no thinking block, one that is open, one that is closed."""

PROBE = "9d5ed678fe57bcca"
"""A text that no template contains, to find where a template puts the user turn."""


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

    @property
    def uses_template(self) -> bool:
        """Whether prompts are rendered by the chat template."""
        return self.config.chat_template and bool(getattr(self.tokenizer, "chat_template", None))

    def text(self, conversation: Conversation, user_turn: str) -> str:
        """The prompt as text. Raises PromptError where the chat template refuses it."""
        turns = self._turns(conversation, user_turn)
        if not self.uses_template:
            return "\n\n".join(turn["content"] for turn in turns)
        try:
            return self._render(turns)
        except Exception as error:  # a chat template is a program of the model's author
            reason = f"the {self.role}'s chat template refuses this conversation: {error}"
            raise PromptError(reason) from error

    def ids(self, text: str) -> tuple[int, ...]:
        """Ids of a whole prompt. A BOS in the text is not added again; an EOS is never added.

        Raises PromptError for a lone surrogate, an empty prompt, an id that the model lacks.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            reason = f"the {self.role}'s prompt holds half a character (a lone surrogate): {error}"
            raise PromptError(reason) from error
        defaults = not self.uses_template
        encoded = self.tokenizer(text, add_special_tokens=defaults, verbose=False)
        ids = list(encoded["input_ids"])
        if defaults:
            ids = self._without_extra_ends(ids, text)
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

    def thinking_state(self, user_turn: str) -> ThinkingState:
        """State of the thinking block at the end of a prompt; `user_turn` contains PROBE.

        Of a chat template only what opens the answer counts, of plain text what follows PROBE.
        Raises ConfigError where the chat template refuses the turn.
        """
        if not self.uses_template:
            return _thinking_state(user_turn.rpartition(PROBE)[2])
        turns = self._turns(Conversation(problem=PROBE), user_turn)
        try:
            prompt = self._render(turns)
            question = self._render(turns, add_generation_prompt=False)
        except Exception as error:
            cause = " or the system prompt" if self.system_prompt else ""
            reason = f"the {self.role}'s chat template refuses the user turn{cause}: {error}"
            raise ConfigError(reason) from error
        if prompt.startswith(question):
            return _thinking_state(prompt.removeprefix(question))
        return _thinking_state(prompt.rpartition(PROBE)[2])

    def _turns(self, conversation: Conversation, user_turn: str) -> list[dict[str, str]]:
        system = conversation.system if self.system_prompt is None else self.system_prompt
        turns = [("system", system)] if system else []
        turns += [*conversation.history, ("user", user_turn)]
        return [{"role": role, "content": text} for role, text in turns]

    def _render(self, turns: list[dict[str, str]], **options: bool) -> str:
        options = {"add_generation_prompt": True, **self._thinking_flags(), **options}
        return str(self.tokenizer.apply_chat_template(turns, tokenize=False, **options))

    def _thinking_flags(self) -> dict[str, bool]:
        """Templates call the switch by either name."""
        if self.config.thinking == "default":
            return {}
        return dict.fromkeys(("enable_thinking", "thinking"), self.config.thinking == "on")

    def _ignores_thinking(self) -> bool:
        turns = [{"role": "user", "content": PROBE}]
        with_thinking = self._render(turns, enable_thinking=True, thinking=True)
        return with_thinking == self._render(turns, enable_thinking=False, thinking=False)

    def _without_extra_ends(self, ids: list[int], text: str) -> list[int]:
        """Ids without a BOS added to that of the text and without an added EOS."""
        bos, eos = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        if bos is not None and ids[:2] == [bos, bos]:
            ids = ids[1:]
        adds_eos = eos is not None and ids[-1:] == [eos]
        if adds_eos and not text.endswith(self.tokenizer.eos_token):
            ids = ids[:-1]
        return ids


def _thinking_state(text: str) -> ThinkingState:
    """`open` where the last opening marker of a thinking block is not closed."""
    state: ThinkingState = "none"
    for opening, closing in THINKING_BLOCKS:
        if text.rfind(opening) > text.rfind(closing):
            return "open"
        if closing in text:
            state = "closed"
    return state
