"""A record -> a row of the exported dataset, in each of its forms."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from optimal_sampling.prompts.rows import value_text
from optimal_sampling.records.export.conversations import Conversations
from optimal_sampling.records.export.options import ExportOptions
from optimal_sampling.records.export.reading import Entry, Run
from optimal_sampling.records.export.soft_targets import soft_columns, soft_schema
from optimal_sampling.records.export.tokens import Message, StudentTokens, raw_text
from optimal_sampling.records.schema import Record
from optimal_sampling.vocabulary.thinking import KNOWN_BLOCKS

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = ["IGNORED", "Form", "Row", "form_of"]

IGNORED = -100
"""Label of a token without loss."""


@dataclass
class Row:
    """A row, and what is known of its tokens."""

    columns: dict[str, Any]
    prompt_ids: list[int] = field(default_factory=list)
    completion_ids: list[int] = field(default_factory=list)
    text: str = ""
    """The completion."""
    hint: str = ""
    """What only the teacher was shown."""
    survives: bool = True
    """Whether the trainer makes the same ids of the row's texts."""


class Form:
    """One form of rows: `schema` and `row`."""

    def __init__(
        self, options: ExportOptions, tokens: StudentTokens, runs: list[Run], first: Record
    ) -> None:
        """`first`: one of the records."""
        self.options = options
        self.tokens = tokens
        self.runs = runs
        self.conversations = [Conversations(run) for run in runs]
        self.first = first

    def schema(self) -> pa.Schema:
        """Names and types of the columns."""
        raise NotImplementedError

    def row(self, entry: Entry, record: Record) -> Row | str:
        """The row of a record, or why it has none."""
        raise NotImplementedError


class RowMaker(Form):
    """Rows with completions, as text, as messages or as ids."""

    def schema(self) -> pa.Schema:
        """`id` and `sample_index` are those of the record."""
        import pyarrow as pa

        text = pa.list_(_message_type()) if self.options.messages else pa.string()
        columns: dict[str, pa.DataType] = {"prompt": text, "completion": text}
        if self.options.format == "tokens":
            columns = dict.fromkeys(("input_ids", "labels"), pa.list_(pa.int32()))
        if self.options.soft_targets != "none":
            columns |= soft_schema(self.options.soft_layout)
        if self.options.messages and any(each.template_options for each in self.conversations):
            columns["chat_template_kwargs"] = pa.struct({"enable_thinking": pa.bool_()})
        return pa.schema(columns | {"id": pa.string(), "sample_index": pa.int32()})

    def row(self, entry: Entry, record: Record) -> Row | str:
        """As in Form."""
        prompt_ids = self.tokens.prompt_ids(record, self.runs[entry.run])
        if prompt_ids is None:
            return "prompt ids cannot be made again from the text"
        completion = self._completion(entry, record, prompt_ids)
        if completion is None:
            return f"no solution in the column {self.options.solution_column!r}"
        hint = self.conversations[entry.run].hint(record["row"])
        text, ids = completion
        made = Row({}, prompt_ids, ids, text, hint)
        if self.options.format == "tokens":
            made.columns = {
                "input_ids": prompt_ids + ids,
                "labels": [IGNORED] * len(prompt_ids) + ids,
            }
            if self.options.soft_targets != "none":
                made.columns |= soft_columns(
                    record, self.options.soft_targets, self.options.soft_layout, prompt_ids
                )
        elif self.options.messages:
            self._add_messages(made, entry, record)
        else:
            prompt = self.tokens.prompt_text(record["student_prompt"])
            made.columns = {"prompt": prompt, "completion": text}
            made.survives = self.tokens.text_survives(prompt, text, prompt_ids, ids)
        made.columns |= {"id": record["id"], "sample_index": record["sample_index"]}
        return made

    def _completion(
        self, entry: Entry, record: Record, prompt_ids: list[int]
    ) -> tuple[str, list[int]] | None:
        """Text without and ids with the end token; None where the row has no solution."""
        if self.options.kind != "warmstart":
            self.tokens.check(entry, record)
            return raw_text(record), record["completion_ids"]
        column = self.options.solution_column
        text = value_text(record["row"].get(column), column)
        if not text or text.isspace():
            return None
        return text, self.tokens.continued(record["student_prompt"], prompt_ids, text)

    def _add_messages(self, made: Row, entry: Entry, record: Record) -> None:
        conversations = self.conversations[entry.run]
        options = conversations.template_options
        prompt = conversations.student(record["row"])
        content = _opened_block(record["student_prompt"]) + made.text
        completion: list[Message] = [{"role": "assistant", "content": content}]
        made.columns = {"prompt": prompt, "completion": completion}
        if any(each.template_options for each in self.conversations):
            made.columns["chat_template_kwargs"] = options or None
        made.survives = self.tokens.messages_survive(
            prompt, completion, options, made.prompt_ids, made.completion_ids
        )


class PromptMaker(Form):
    """Rows without completions: `prompt`, and `privileged_context` where the teacher was shown more
    than the student.
    """

    def schema(self) -> pa.Schema:
        """Prompts are messages where the runs used chat templates, else texts."""
        import pyarrow as pa

        prompt = pa.list_(_message_type()) if self._is_chat else pa.string()
        columns: dict[str, pa.DataType] = {"prompt": prompt}
        if self._has_privileged:
            columns["privileged_context"] = pa.string()
        return pa.schema(columns | {"id": pa.string()})

    @property
    def _is_chat(self) -> bool:
        return all(run.compared.get("chat_template", True) for run in self.runs)

    @property
    def _has_privileged(self) -> bool:
        """Whether the teacher's turns differ from the student's."""
        names = ("teacher_template", "student_template")
        differ = any(len({run.compared.get(name) for name in names}) > 1 for run in self.runs)
        return differ or "privileged_context" in self.first["row"]

    def row(self, entry: Entry, record: Record) -> Row | str:
        """As in Form."""
        conversations = self.conversations[entry.run]
        messages = conversations.student(record["row"])
        prompt: Any = messages if self._is_chat else record["student_prompt"]
        columns = {"prompt": prompt, "id": record["id"]}
        if self._has_privileged:
            columns["privileged_context"] = conversations.privileged(record["row"])
        return Row(columns)


def form_of(options: ExportOptions, tokens: StudentTokens, runs: list[Run], first: Record) -> Form:
    """The form that the options ask for."""
    kind = PromptMaker if options.format == "prompts" else RowMaker
    return kind(options, tokens, runs, first)


def _message_type() -> pa.DataType:
    import pyarrow as pa

    return pa.struct({"role": pa.string(), "content": pa.string()})


def _opened_block(prompt: str) -> str:
    """The thinking block that the end of a prompt has opened: a message holds the whole turn."""
    for opening, closing in KNOWN_BLOCKS:
        place = prompt.rfind(opening)
        if place > prompt.rfind(closing) and not prompt[place:].removeprefix(opening).strip():
            return prompt[place:]
    return ""
