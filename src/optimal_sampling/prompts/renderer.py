"""A row of a dataset -> the prompt of the student and the prompt of the teacher.

A system prompt of the config replaces that of the row. The row's `privileged_context` follows the
teacher's user turn after a blank line, unless the teacher's template has {privileged_context}.
`--hint` shows a solution to one of the models in the same way (`hints.py`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import date
from functools import cached_property, partial
from typing import Any

from optimal_sampling.config import PromptConfig
from optimal_sampling.errors import ConfigError, PromptError
from optimal_sampling.prompts.chat import SEAM, ChatFormat, Role
from optimal_sampling.prompts.hints import HINT_COLUMNS, hint_columns
from optimal_sampling.prompts.probe import PROBE
from optimal_sampling.prompts.rows import (
    Conversation,
    conversation_of,
    fill,
    literals_in,
    mistyped,
    names_in,
    user_turn,
    value_text,
)
from optimal_sampling.vocabulary.shared import Vocabulary

__all__ = ["PromptRenderer", "RenderedPrompt"]

_HINT_TITLE = "Reference solution:\n"
"""Before a hint that follows the user turn."""


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
    that lacks one of them fails alone. `day` is the date that chat templates print; None: today.

    Raises ConfigError where a template names an unknown column or writes {{problem}} instead of
    naming one, where a chat template refuses or leaves out the user turn or the system prompt, or
    where one prompt ends inside an open thinking block and the other does not: one model would
    reason where the other already answers. (One prompt with a *closed* block and one without any
    is only noted.)
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
        day: date | None = None,
    ) -> None:
        self._config = prompt_config
        self._prompt_column = prompt_column
        self._answer_column = answer_column
        self._columns = None if columns is None else self._names({*columns})
        self._blocks = vocabulary.thinking_blocks
        self.day = day or date.today()
        self._student = self._format("student", vocabulary)
        self._teacher = self._format("teacher", vocabulary)
        self._check_columns()
        templates = self._check_literals()
        thinking = self._check_thinking()
        self.notes = (*templates, *self._student.notes(), *self._teacher.notes(), *thinking)

    def _format(self, role: Role, vocabulary: Vocabulary) -> ChatFormat:
        return ChatFormat(
            role=role,
            config=self._config,
            tokenizer=getattr(vocabulary, f"{role}_tokenizer"),
            rows=getattr(vocabulary, f"{role}_rows"),
            system_prompt=getattr(self._config, f"{role}_system_prompt"),
            day=self.day,
        )

    @property
    def prints_date(self) -> bool:
        """Whether prompts depend on `day`."""
        return self._student.prints_date or self._teacher.prints_date

    @property
    def needs_following(self) -> bool:
        """Whether the prompts of a row show the solution of the next one."""
        return self._config.hint == "other"

    def render(
        self, row: Mapping[str, Any], following: Mapping[str, Any] | None = None
    ) -> RenderedPrompt:
        """The two prompts of a row. `following` is the row that the hint `other` shows.

        Raises PromptError where the row makes no prompt, ConfigError for an unknown column.
        """
        if self._config.literal_control_tokens:
            row = self._with_seams(row)
            following = None if following is None else self._with_seams(following)
        conversation = conversation_of(row, self._prompt_column)
        values = self._values(row, conversation)
        hint = hint_columns(self._config.hint, row, following, self._answer_column)
        student_turn = self._turn("student", values, hint)
        teacher_turn = self._turn("teacher", values, hint)
        return self._render(conversation, student_turn, teacher_turn)

    def _turn(self, role: Role, values: Mapping[str, Any], hint: Mapping[str, str]) -> str:
        """The user turn of a model: its template filled, and what follows it."""
        template = getattr(self._config, f"{role}_template")
        names = names_in(template)
        if hint and role == self._config.hint_to:
            turn = fill(template, partial(self._value, {**values, **hint}))
            is_shown = not names.isdisjoint(HINT_COLUMNS)
            return turn if is_shown else f"{turn}\n\n{_HINT_TITLE}{hint['hint']}"
        turn = fill(template, partial(self._value, values))
        privileged = values.get("privileged_context") if role == "teacher" else None
        if privileged and "privileged_context" not in names:
            return f"{turn}\n\n{privileged}"
        return turn

    def render_texts(self, student_turn: str, teacher_turn: str | None = None) -> RenderedPrompt:
        """The two prompts of given user turns; no `{column}` is replaced.

        With `chat_template=False` and no system prompt the texts are the prompts.
        Raises PromptError where one of them is empty.
        """
        teacher_turn = student_turn if teacher_turn is None else teacher_turn
        for role, turn in (("student", student_turn), ("teacher", teacher_turn)):
            if not turn.strip():
                raise PromptError(f"the {role}'s prompt is empty")
        return self._render(user_turn(student_turn), student_turn, teacher_turn)

    def row_notes(self, rows: Iterable[Mapping[str, Any]]) -> list[str]:
        """A note on the rows whose texts hold control tokens, unless those are made literal."""
        if self._config.literal_control_tokens:
            return []
        found = [match for row in rows if (match := self._control_token(row))]
        if not found:
            return []
        return [
            f"{len(found)} rows hold texts that are control tokens, such as {found[0]!r}, and act "
            "as such in their prompts; --literal-control-tokens makes them ordinary text"
        ]

    def _render(
        self, conversation: Conversation, student_turn: str, teacher_turn: str
    ) -> RenderedPrompt:
        student_text = self._student.text(conversation, student_turn)
        teacher_text = self._teacher.text(conversation, teacher_turn)
        seam = SEAM if self._config.literal_control_tokens else ""
        return RenderedPrompt(
            student_text=student_text.replace(seam, ""),
            teacher_text=teacher_text.replace(seam, ""),
            student_ids=self._student.ids(student_text),
            teacher_ids=self._teacher.ids(teacher_text),
        )

    @cached_property
    def _control_tokens(self) -> re.Pattern[str]:
        """Matches the control tokens of either model, the longest first."""
        formats = (self._student, self._teacher)
        tokens = {token for each in formats for token in each.control_tokens(self._blocks)}
        longest_first = sorted(tokens, key=len, reverse=True)
        return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")

    def _control_token(self, row: Mapping[str, Any]) -> str | None:
        """The first control token in what prompts show of a row."""
        try:
            conversation = conversation_of(row, self._prompt_column)
        except PromptError:
            return None
        values = self._values(row, conversation)
        names = self._template_names
        if self._config.hint != "none":
            names |= {*HINT_COLUMNS}
        shown = [values.get(name) for name in sorted(names)]
        match = self._control_tokens.search(repr([conversation, shown]))
        return match and match[0]

    def _with_seams(self, value: Any) -> Any:
        """The value with a SEAM after the first character of each control token in its texts."""
        if isinstance(value, str):
            if SEAM in value:
                raise PromptError(f"the row holds the text {SEAM}, which marks control tokens")
            return self._control_tokens.sub(lambda m: f"{m[0][0]}{SEAM}{m[0][1:]}", value)
        if isinstance(value, Mapping):
            return {name: self._with_seams(inner) for name, inner in value.items()}
        if isinstance(value, list | tuple):
            return [self._with_seams(inner) for inner in value]
        return value

    @property
    def _template_names(self) -> frozenset[str]:
        """The columns that the two templates ask for."""
        return names_in(self._config.student_template) | names_in(self._config.teacher_template)

    def _names(self, columns: set[str]) -> set[str]:
        """Names that a template may use, given the columns of the dataset."""
        names = columns | {"problem"} | ({"answer"} if self._answer_column else set())
        return names if self._config.hint == "none" else names | {*HINT_COLUMNS}

    def _values(self, row: Mapping[str, Any], conversation: Conversation) -> dict[str, Any]:
        values = {**row, "problem": conversation.problem}
        if self._answer_column is not None:
            values["answer"] = row.get(self._answer_column)
        if "privileged_context" in row:
            values["privileged_context"] = conversation.privileged or ""
        return values

    def _value(self, values: Mapping[str, Any], name: str) -> str:
        if name not in values and self._columns is None:
            raise ConfigError(_unknown_column(name, values))
        if name not in values:  # the dataset has this column: only this row lacks it
            raise PromptError(f"the row has no column {name!r}, which the template asks for")
        text = value_text(values[name], name)
        if text is None:
            raise PromptError(f"column {name!r} is null, and the template asks for it")
        return text

    def _check_columns(self) -> None:
        other = "student" if self._config.hint_to == "teacher" else "teacher"
        shown = "hint" in names_in(getattr(self._config, f"{other}_template"))
        if shown and self._config.hint != "none":
            raise ConfigError(
                f"the {other}'s template asks for {{hint}}, which is shown to the "
                f"{self._config.hint_to}; give --hint-to {other}, or leave it out"
            )
        if self._columns is None:
            return
        for name in sorted(self._template_names - self._columns):
            raise ConfigError(_unknown_column(name, self._columns))

    def _check_literals(self) -> list[str]:
        """Notes on templates that show no column.

        Raises ConfigError for one that has the name of a column in double braces instead, and for
        a mistyped `{column}`.
        """
        notes = []
        known = self._names(set()) if self._columns is None else self._columns
        for role in ("student", "teacher"):
            template = getattr(self._config, f"{role}_template")
            if place := mistyped(template, known):
                raise ConfigError(
                    f"the {role}'s template has {place!r}, which shows no column: write the name "
                    "of a column alone in braces, such as {problem}; for the text itself write a "
                    "space after the brace"
                )
            if names_in(template):
                continue
            for name in sorted(literals_in(template) & known):
                raise ConfigError(
                    f"the {role}'s template writes the text {{{name}}} into every prompt; "
                    f"for the column write {{{name}}} with single braces"
                )
            notes.append(f"the {role}'s template shows no column: all its user turns are equal")
        return notes

    def _check_thinking(self) -> list[str]:
        """Notes on thinking blocks that differ. Raises ConfigError where only one is open."""
        student_turn = fill(self._config.student_template, lambda _: PROBE)
        teacher_turn = fill(self._config.teacher_template, lambda _: PROBE)
        student = self._student.thinking_state(student_turn, self._blocks)
        teacher = self._teacher.thinking_state(teacher_turn, self._blocks)
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
    if name == "hint":
        return "a prompt template asks for {hint}; say which with --hint right, wrong or other"
    return (
        f"a prompt template asks for {{{name}}}, but the rows have: {columns}. "
        f"For the text {{{name}}} itself write {{{{{name}}}}}."
    )
