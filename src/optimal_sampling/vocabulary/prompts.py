"""A row -> the prompt the student reads and the prompt the teacher reads, as text and as ids.

With chat templates, each prompt is [system, earlier turns, user turn] rendered by its model's own template, and
tokenised without a second BOS. As plain text, the texts of the same turns are joined by blank lines, without names of
roles, and tokenised as the tokenizer's defaults have it. No prompt is ever cut.

A system prompt of the config replaces the row's own one. `privileged_context` of a row is appended to the teacher's
user turn after a blank line, unless the teacher's template places it with {privileged_context}.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from optimal_sampling.config import PromptConfig
from optimal_sampling.errors import ConfigError
from optimal_sampling.vocabulary.rows import Conversation, PromptError, conversation_of
from optimal_sampling.vocabulary.shared import Vocabulary
from optimal_sampling.vocabulary.template import fill, names_in, value_text

__all__ = ["PromptRenderer", "RenderedPrompt"]

_THINK_PAIRS = (("<think>", "</think>"), ("<thinking>", "</thinking>"), ("[THINK]", "[/THINK]"))
_PROBE = "9d5ed678fe57bcca"
ThinkState = Literal["none", "open", "closed"]


@dataclass(frozen=True, slots=True)
class RenderedPrompt:
    """Both models' prompts of one row."""

    student_text: str
    teacher_text: str
    student_ids: tuple[int, ...]
    teacher_ids: tuple[int, ...]


class PromptRenderer:
    """Renders rows for the two models of a vocabulary.

    `prompt_column` and `answer_column` are as in DataConfig; {problem} is the row's problem wherever it comes from, and
    {answer} the answer column. `columns`, where given, are the dataset's columns: templates are checked against them
    here instead of at the first row, and a row that lacks one of them fails alone.

    Raises ConfigError where a template names an unknown column, where a chat template refuses the system prompt, or
    where one model is asked to go on inside an open <think> block and the other is not: the mixture of a model that
    reasons with one that already answers is no distribution anybody wants. (One prompt with a *closed* block and one
    with none is only noted.)
    """

    notes: tuple[str, ...]
    """What a user should know of how prompts are rendered here."""

    def __init__(
        self,
        prompt_config: PromptConfig,
        vocabulary: Vocabulary,
        *,
        prompt_column: str | None = None,
        answer_column: str | None = None,
        columns: Iterable[str] | None = None,
    ) -> None:
        self._config = prompt_config
        self._prompt_column = prompt_column
        self._answer_column = answer_column
        self._columns = None if columns is None else self._known({*columns})
        self._student = _Reader(
            "student",
            vocabulary.student_tokenizer,
            prompt_config,
            prompt_config.student_system_prompt,
            vocabulary.student_rows,
        )
        self._teacher = _Reader(
            "teacher",
            vocabulary.teacher_tokenizer,
            prompt_config,
            prompt_config.teacher_system_prompt,
            vocabulary.teacher_rows,
        )
        self._check_columns()
        thinking = self._check_thinking()
        self.notes = (*self._student.notes(), *self._teacher.notes(), *thinking)

    def render(self, row: Mapping[str, Any]) -> RenderedPrompt:
        """The two prompts of a row.

        Raises PromptError where the row makes no prompt, ConfigError where a template names a column that is unknown.
        """
        conversation = conversation_of(row, self._prompt_column)
        text_of = partial(self._value, self._values(row, conversation))
        student_turn = fill(self._config.student_template, text_of)
        teacher_turn = fill(self._config.teacher_template, text_of)
        if conversation.privileged and "privileged_context" not in names_in(
            self._config.teacher_template
        ):
            teacher_turn = f"{teacher_turn}\n\n{conversation.privileged}"
        return self._render(conversation, student_turn, teacher_turn)

    def render_texts(self, student_turn: str, teacher_turn: str | None = None) -> RenderedPrompt:
        """The two prompts of user turns that are already written; no template of ours is filled.

        With `chat_template=False` and no system prompt the texts are the prompts. Raises PromptError where one of them
        is empty.
        """
        teacher_turn = student_turn if teacher_turn is None else teacher_turn
        for role, turn in (("student", student_turn), ("teacher", teacher_turn)):
            if not turn.strip():
                raise PromptError(f"the {role}'s prompt is empty")
        return self._render(Conversation(problem=student_turn), student_turn, teacher_turn)

    def _render(
        self, conversation: Conversation, student_turn: str, teacher_turn: str
    ) -> RenderedPrompt:
        student_text = self._student.text(conversation, student_turn)
        teacher_text = self._teacher.text(conversation, teacher_turn)
        return RenderedPrompt(
            student_text,
            teacher_text,
            self._student.ids(student_text),
            self._teacher.ids(teacher_text),
        )

    def _known(self, columns: set[str]) -> set[str]:
        """Names a template may use, given the dataset's columns."""
        return columns | {"problem"} | ({"answer"} if self._answer_column else set())

    def _values(self, row: Mapping[str, Any], conversation: Conversation) -> dict[str, Any]:
        values = {**row, "problem": conversation.problem}
        if self._answer_column is not None:
            values["answer"] = row.get(self._answer_column)
        return values

    def _value(self, values: Mapping[str, Any], name: str) -> str:
        if name not in values:
            if (
                self._columns is not None
            ):  # the template was checked; it is this row that differs from the others
                raise PromptError(f"the row has no column {name!r}, which the template asks for")
            raise ConfigError(_unknown_column(name, values))
        if name == "privileged_context":
            return conversation_of(values, "problem").privileged or ""
        text = value_text(values[name])
        if text is None:
            raise PromptError(f"column {name!r} is null, and the template asks for it")
        return text

    def _check_columns(self) -> None:
        if self._columns is None:
            return
        for template in (self._config.student_template, self._config.teacher_template):
            for name in sorted(names_in(template) - self._columns):
                raise ConfigError(_unknown_column(name, self._columns))

    def _check_thinking(self) -> list[str]:
        student, teacher = (
            reader.think_state(fill(template, lambda _: _PROBE))
            for reader, template in (
                (self._student, self._config.student_template),
                (self._teacher, self._config.teacher_template),
            )
        )
        if student == teacher:
            return []
        if "open" in (student, teacher):
            inside, outside = (
                ("student", "teacher") if student == "open" else ("teacher", "student")
            )
            raise ConfigError(
                f"the {inside}'s prompt ends inside an open <think> block and the {outside}'s does not, so one would "
                "reason where the other answers. Set thinking to on or off, use models whose templates agree, or write "
                "both prompts as plain text (chat_template=False)."
            )
        closed = "student" if student == "closed" else "teacher"
        return [
            f"only the {closed}'s prompt ends with a closed <think> block; the other model may still begin one"
        ]


class _Reader:
    """One model's way of reading a prompt."""

    def __init__(
        self,
        role: str,
        tokenizer: Any,
        config: PromptConfig,
        system_prompt: str | None,
        rows: int | None,
    ) -> None:
        self.role = role
        self.tokenizer = tokenizer
        self.rows = rows
        self.system_prompt = system_prompt
        self.asked_for_chat = config.chat_template
        self.chat = config.chat_template and bool(getattr(tokenizer, "chat_template", None))
        self.thinking = config.thinking
        self.flags: dict[str, bool] = {}
        if config.thinking != "default":  # templates call the switch by either name
            self.flags = dict.fromkeys(("enable_thinking", "thinking"), config.thinking == "on")

    def text(self, conversation: Conversation, user_turn: str) -> str:
        turns = self._turns(conversation, user_turn)
        if not self.chat:
            return "\n\n".join(turn["content"] for turn in turns)
        try:
            return self._chat_text(turns)
        except Exception as error:  # a chat template is a program of the model's author
            raise PromptError(
                f"the {self.role}'s chat template refuses this conversation: {error}"
            ) from error

    def ids(self, text: str) -> tuple[int, ...]:
        """Ids of a whole prompt. A BOS that the text spells out is not added again; an EOS is never added."""
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise PromptError(
                f"the {self.role}'s prompt holds half a character (a lone surrogate): {error}"
            ) from error
        ids = list(
            self.tokenizer(text, add_special_tokens=not self.chat, verbose=False)["input_ids"]
        )
        bos, eos = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        if not self.chat and bos is not None and ids[:2] == [bos, bos]:
            ids = ids[1:]
        if (
            not self.chat
            and eos is not None
            and ids[-1:] == [eos]
            and not text.endswith(self.tokenizer.eos_token)
        ):
            ids = ids[:-1]
        if not ids:
            raise PromptError(f"the {self.role}'s prompt is empty")
        if self.rows is not None and max(ids) >= self.rows:
            raise PromptError(
                f"the {self.role}'s prompt holds token id {max(ids)}, but the model knows {self.rows} ids"
            )
        return tuple(ids)

    def notes(self) -> list[str]:
        if self.asked_for_chat and not self.chat:
            return [f"the {self.role}'s tokenizer has no chat template: its prompts are plain text"]
        if self.chat and self.flags and self._ignores_thinking():
            return [
                f"the {self.role}'s chat template knows no thinking mode: thinking={self.thinking} changes nothing"
            ]
        return []

    def think_state(self, user_turn: str) -> ThinkState:
        """What a prompt's end says about thinking. Chat templates: only what opens the answer is looked at."""
        if not self.chat:
            return _think_state(user_turn.rpartition(_PROBE)[2])
        turns = self._turns(Conversation(problem=_PROBE), user_turn)
        try:
            whole, asked = (
                self._chat_text(turns),
                self._chat_text(turns, add_generation_prompt=False),
            )
        except Exception as error:
            cause = " or the system prompt" if self.system_prompt else ""
            raise ConfigError(
                f"the {self.role}'s chat template refuses the user turn{cause}: {error}"
            ) from error
        return _think_state(
            whole.removeprefix(asked) if whole.startswith(asked) else whole.rpartition(_PROBE)[2]
        )

    def _turns(self, conversation: Conversation, user_turn: str) -> list[dict[str, str]]:
        system = self.system_prompt if self.system_prompt is not None else conversation.system
        turns = [{"role": "system", "content": system}] if system else []
        turns += [{"role": role, "content": text} for role, text in conversation.history]
        return [*turns, {"role": "user", "content": user_turn}]

    def _chat_text(
        self, turns: list[dict[str, str]], add_generation_prompt: bool = True, **flags: bool
    ) -> str:
        rendered = self.tokenizer.apply_chat_template(
            turns,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            **{**self.flags, **flags},
        )
        return str(rendered)

    def _ignores_thinking(self) -> bool:
        turns = [{"role": "user", "content": _PROBE}]
        on, off = (
            self._chat_text(turns, enable_thinking=flag, thinking=flag) for flag in (True, False)
        )
        return on == off


def _think_state(text: str) -> ThinkState:
    """`open` where the last opening marker of a thinking block is not closed."""
    state: ThinkState = "none"
    for opening, closing in _THINK_PAIRS:
        if text.rfind(opening) > text.rfind(closing):
            return "open"
        if closing in text:
            state = "closed"
    return state


def _unknown_column(name: str, known: Iterable[str]) -> str:
    return (
        f"a prompt template asks for {{{name}}}, but the rows have: {', '.join(sorted(map(str, known)))}. "
        f"For the text {{{name}}} itself write {{{{{name}}}}}."
    )
