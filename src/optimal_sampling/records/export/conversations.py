"""A row of a run -> the student's messages, and what only the teacher was shown."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from optimal_sampling.errors import DatasetError, PromptError
from optimal_sampling.prompts.rows import Conversation, conversation_of, fill, names_in, value_text
from optimal_sampling.records.export.reading import Run
from optimal_sampling.records.export.tokens import Message

__all__ = ["Conversations"]


class Conversations:
    """The turns of a run's rows, by the templates and system prompts of its options."""

    def __init__(self, run: Run) -> None:
        options = run.compared
        self._prompt_column = options.get("prompt_column")
        self._answer_column = options.get("answer_column")
        self._system = options.get("student_system_prompt")
        self._student = options.get("student_template", "{problem}")
        self._teacher = options.get("teacher_template", "{problem}")
        thinking = options.get("thinking", "default")
        self.template_options: dict[str, bool] = (
            {} if thinking == "default" else {"enable_thinking": thinking == "on"}
        )
        """What the chat template was told about thinking."""

    def student(self, row: Mapping[str, Any]) -> list[Message]:
        """Messages of the student's prompt. Raises DatasetError where they are not only text."""
        conversation = self._conversation(row)
        turn = self._turn(self._student, row, conversation)
        messages: list[dict[str, Any]] = list(conversation.messages)
        messages[conversation.place] = {**messages[conversation.place], "content": turn}
        if self._system is not None:
            replaced = messages[0]["role"] in ("system", "developer")
            system = [{"role": "system", "content": self._system}] if self._system else []
            messages = [*system, *messages[replaced:]]
        if conversation.tools or any(each.keys() != {"role", "content"} for each in messages):
            raise DatasetError(
                "a conversation with tools or reasoning has no form as messages of text: leave out "
                "--messages"
            )
        return messages

    def privileged(self, row: Mapping[str, Any]) -> str:
        """What follows the student's turn in the teacher's, or else what only the teacher saw."""
        conversation = self._conversation(row)
        student = self._turn(self._student, row, conversation)
        teacher = self._turn(self._teacher, row, conversation)
        if conversation.privileged and "privileged_context" not in names_in(self._teacher):
            teacher = f"{teacher}\n\n{conversation.privileged}"
        if teacher.startswith(student):
            return teacher.removeprefix(student).strip()
        return self.hint(row)

    def hint(self, row: Mapping[str, Any]) -> str:
        """The columns that only the teacher was shown, as text."""
        conversation = self._conversation(row)
        names = names_in(self._teacher) - names_in(self._student)
        texts = [self._turn(f"{{{name}}}", row, conversation) for name in sorted(names)]
        if conversation.privileged and "privileged_context" not in names:
            texts.append(conversation.privileged)
        return "\n\n".join(text for text in texts if text)

    def _conversation(self, row: Mapping[str, Any]) -> Conversation:
        try:
            found = conversation_of(row, self._prompt_column)
        except PromptError as error:
            raise DatasetError(f"a row of the records makes no prompt: {error}") from error
        return replace(found, messages=tuple(dict(each) for each in found.messages))

    def _turn(self, template: str, row: Mapping[str, Any], conversation: Conversation) -> str:
        values = {**row, "problem": conversation.problem}
        if self._answer_column is not None:
            values["answer"] = row.get(self._answer_column)
        values["privileged_context"] = conversation.privileged or ""
        return fill(template, lambda name: value_text(values.get(name), name) or "")
