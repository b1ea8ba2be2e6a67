"""A row of a dataset -> the prompt of the student and the prompt of the teacher.

A system prompt of the config replaces that of the row. The row's `privileged_context` follows the
teacher's user turn after a blank line, unless the teacher's template has {privileged_context}.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from optimal_sampling.config import PromptConfig
from optimal_sampling.errors import ConfigError, PromptError
from optimal_sampling.prompts.chat import PROBE, ChatFormat, Role
from optimal_sampling.prompts.rows import (
    Conversation,
    conversation_of,
    fill,
    names_in,
    value_text,
)
from optimal_sampling.vocabulary.shared import Vocabulary

__all__ = ["PromptRenderer", "RenderedPrompt"]


@dataclass(frozen=True, slots=True)
class RenderedPrompt:
    """The prompts of one row, for both models."""

    student_text: str
    teacher_text: str
    student_ids: tuple[int, ...]
    teacher_ids: tuple[int, ...]


class PromptRenderer:
    """Renders rows for the two models of a vocabulary.

    `prompt_column` and `answer_column` are as in DataConfig. In a template, {problem} is the row's
    problem whatever its column, {answer} the answer column. `columns` are those of the dataset:
    where given, templates are checked against them at once instead of at the first row, and a row
    that lacks one of them fails alone.

    Raises ConfigError where a template names an unknown column, where a chat template refuses the
    system prompt, or where one prompt ends inside an open <think> block and the other does not:
    one model would reason where the other already answers. (One prompt with a *closed* block and
    one without any is only noted.)
    """

    notes: tuple[str, ...]
    """How prompts are rendered, where that is not what the options say."""

    def __init__(
        self,
        prompt_config: PromptConfig,
        vocabulary: Vocabulary,
        *,
        prompt_column: str | None = None,
        answer_column: str | None = None,
        columns: Iterable[str] | None = None,
    ) -> None:
        self._config = config = prompt_config
        self._prompt_column = prompt_column
        self._answer_column = answer_column
        self._columns = None if columns is None else self._names({*columns})
        self._student = ChatFormat(
            role="student",
            config=config,
            tokenizer=vocabulary.student_tokenizer,
            rows=vocabulary.student_rows,
            system_prompt=config.student_system_prompt,
        )
        self._teacher = ChatFormat(
            role="teacher",
            config=config,
            tokenizer=vocabulary.teacher_tokenizer,
            rows=vocabulary.teacher_rows,
            system_prompt=config.teacher_system_prompt,
        )
        self._check_columns()
        thinking = self._check_thinking()
        self.notes = (*self._student.notes(), *self._teacher.notes(), *thinking)

    def render(self, row: Mapping[str, Any]) -> RenderedPrompt:
        """The two prompts of a row.

        Raises PromptError where the row makes no prompt, ConfigError for an unknown column.
        """
        conversation = conversation_of(row, self._prompt_column)
        text_of = partial(self._value, self._values(row, conversation))
        student_turn = fill(self._config.student_template, text_of)
        teacher_turn = fill(self._config.teacher_template, text_of)
        privileged = conversation.privileged
        if privileged and "privileged_context" not in names_in(self._config.teacher_template):
            teacher_turn = f"{teacher_turn}\n\n{privileged}"
        return self._render(conversation, student_turn, teacher_turn)

    def render_texts(self, student_turn: str, teacher_turn: str | None = None) -> RenderedPrompt:
        """The two prompts of given user turns; no `{column}` is replaced.

        With `chat_template=False` and no system prompt the texts are the prompts.
        Raises PromptError where one of them is empty.
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
            student_text=student_text,
            teacher_text=teacher_text,
            student_ids=self._student.ids(student_text),
            teacher_ids=self._teacher.ids(teacher_text),
        )

    def _names(self, columns: set[str]) -> set[str]:
        """Names that a template may use, given the columns of the dataset."""
        return columns | {"problem"} | ({"answer"} if self._answer_column else set())

    def _values(self, row: Mapping[str, Any], conversation: Conversation) -> dict[str, Any]:
        values = {**row, "problem": conversation.problem}
        if self._answer_column is not None:
            values["answer"] = row.get(self._answer_column)
        return values

    def _value(self, values: Mapping[str, Any], name: str) -> str:
        if name not in values and self._columns is None:
            raise ConfigError(_unknown_column(name, values))
        if name not in values:  # the dataset has this column: only this row lacks it
            raise PromptError(f"the row has no column {name!r}, which the template asks for")
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
        """Notes on thinking blocks that differ. Raises ConfigError where only one is open."""
        student_turn = fill(self._config.student_template, lambda _: PROBE)
        teacher_turn = fill(self._config.teacher_template, lambda _: PROBE)
        student = self._student.thinking_state(student_turn)
        teacher = self._teacher.thinking_state(teacher_turn)
        if student == teacher:
            return []
        if student == "open":
            raise ConfigError(_one_open_block("student", "teacher"))
        if teacher == "open":
            raise ConfigError(_one_open_block("teacher", "student"))
        closed = "student" if student == "closed" else "teacher"
        return [
            f"only the {closed}'s prompt ends with a closed <think> block; "
            "the other model may still begin one"
        ]


def _one_open_block(inside: Role, outside: Role) -> str:
    return (
        f"the {inside}'s prompt ends inside an open <think> block and the {outside}'s does not, "
        "so one would reason where the other answers. Set thinking to on or off, use models whose "
        "templates agree, or write both prompts as plain text (chat_template=False)."
    )


def _unknown_column(name: str, known: Iterable[str]) -> str:
    columns = ", ".join(sorted(map(str, known)))
    return (
        f"a prompt template asks for {{{name}}}, but the rows have: {columns}. "
        f"For the text {{{name}}} itself write {{{{{name}}}}}."
    )
