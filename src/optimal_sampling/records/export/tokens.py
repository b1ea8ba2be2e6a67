"""Ids of prompts and completions by the tokenizer of the model to be trained, and what TRL makes of
their texts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from hashlib import blake2b
from typing import TYPE_CHECKING, Any

from optimal_sampling.errors import ConfigError, TokenizerMismatchError
from optimal_sampling.records.export.reading import Entry, Run
from optimal_sampling.records.schema import Record

if TYPE_CHECKING:
    from optimal_sampling.vocabulary import Vocabulary

__all__ = ["Message", "StudentTokens", "raw_text", "vocabulary_hash"]

Message = dict[str, str]
"""`role` and `content`."""

_SHOWN = 60  # characters of a text in an error


def raw_text(record: Record) -> str:
    """The completion with its special tokens, without its end token."""
    return record.get("completion_raw", record["completion"])


def vocabulary_hash(ids: Mapping[str, int]) -> str:
    """Hash of the tokens of a tokenizer with their ids: equal where ids mean the same."""
    lines = "\n".join(f"{ids[token]} {token!r}" for token in sorted(ids, key=ids.__getitem__))
    return blake2b(lines.encode(), digest_size=8).hexdigest()


class StudentTokens:
    """The tokenizer of the model to be trained, for the records of a run.

    `end_id` is the token that ends the rows: the most frequent end token of the completions, or
    where they have none that of the tokenizer. Raises ConfigError where there is none at all.
    """

    def __init__(self, model: str, vocabulary: Vocabulary, entries: Iterable[Entry]) -> None:
        self.model = model
        self.tokenizer = vocabulary.student_tokenizer
        self._vocabulary = vocabulary
        self.ends = Counter(entry.end for entry in entries if entry.end is not None)
        """How many completions end with each id."""
        common = self.ends.most_common(1)
        end_id = common[0][0] if common else self.tokenizer.eos_token_id
        if end_id is None:
            raise ConfigError(
                f"the tokenizer of {model!r} has no end token; choose another --model"
            )
        self.end_id = int(end_id)
        self.end_text = str(self.tokenizer.convert_ids_to_tokens(self.end_id))

    @property
    def eos_option(self) -> str | None:
        """Value of TRL's `--eos_token` that is needed for texts; None where it is not."""
        return None if self.end_id == self.tokenizer.eos_token_id else self.end_text

    def check(self, entry: Entry, record: Record) -> None:
        """Raise TokenizerMismatchError where the ids of a record read as another text."""
        ids, drawn = record["completion_ids"], raw_text(record)
        bodies = [ids[:-1], ids] if record["finish_reason"] == "stop" else [ids]
        texts = [self._read(body) for body in bodies]
        if drawn not in texts:
            raise TokenizerMismatchError(
                f"{entry.file}, record {entry.key[0]} sample {entry.key[1]}: its ids read "
                f"{texts[0][:_SHOWN]!r} with the tokenizer of {self.model!r}, and "
                f"{drawn[:_SHOWN]!r} with the one they were drawn with. Train a model with the "
                "tokenizer of the records (--model), or generate with this model as the student"
            )

    def _read(self, ids: Sequence[int]) -> str:
        try:
            return self._vocabulary.decode_raw(ids)
        except Exception as error:  # a tokenizer may raise anything for ids that it lacks
            return f"<{type(error).__name__}: {error}>"

    def prompt_ids(self, record: Record, run: Run) -> list[int] | None:
        """Ids of the student's prompt; None where they are not as many as were recorded."""
        has_template = bool(getattr(self.tokenizer, "chat_template", None))
        uses_template = run.compared.get("chat_template", True) and has_template
        ids = self._ids(record["student_prompt"], defaults=not uses_template)
        if not uses_template:
            ids = self._without_extra_ends(ids, record["student_prompt"])
        return ids if len(ids) == record["n_student_prompt_tokens"] else None

    def continued(self, prompt: str, prompt_ids: list[int], text: str) -> list[int]:
        """Ids of a text that follows a prompt, and the end token."""
        whole = self._ids(prompt + text, defaults=False)
        if whole[: len(prompt_ids)] == prompt_ids:
            return [*whole[len(prompt_ids) :], self.end_id]
        return [*self._ids(text, defaults=False), self.end_id]

    def prompt_text(self, prompt: str) -> str:
        """The prompt as TRL has to get it: without a BOS that the tokenizer adds again."""
        bos, text = self.tokenizer.bos_token_id, self.tokenizer.bos_token
        if bos is not None and self._ids(prompt, defaults=True)[:2] == [bos, bos]:
            return prompt.removeprefix(text)
        return prompt

    def text_survives(
        self, prompt: str, completion: str, prompt_ids: list[int], ids: list[int]
    ) -> bool:
        """Whether TRL makes these ids of two texts, and trains on `ids` and on nothing else."""
        alone = self._ids(prompt, defaults=True)
        whole = self._ids(prompt + completion + self.end_text, defaults=True)
        return self._without_extra_ends(alone, prompt) == prompt_ids and whole == prompt_ids + ids

    def messages_survive(
        self,
        prompt: list[Message],
        completion: list[Message],
        template_options: Mapping[str, bool],
        prompt_ids: list[int],
        ids: list[int],
    ) -> bool:
        """Whether TRL makes these ids of messages. Templates may write more after the end token."""
        alone = self._rendered(prompt, add_generation_prompt=True, **template_options)
        whole = self._rendered([*prompt, *completion], **template_options)
        wanted = prompt_ids + ids
        return alone == prompt_ids and whole[: len(wanted)] == wanted

    def _rendered(self, messages: list[Message], **options: Any) -> list[int]:
        encoded = self.tokenizer.apply_chat_template(
            messages, tokenize=True, return_dict=True, **options
        )
        return list(encoded["input_ids"])

    def _ids(self, text: str, *, defaults: bool) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=defaults, verbose=False)["input_ids"])

    def _without_extra_ends(self, ids: list[int], text: str) -> list[int]:
        """Ids without a second BOS and without an EOS that is not in the text."""
        bos, eos = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        if bos is not None and ids[:2] == [bos, bos]:
            ids = ids[1:]
        if eos is not None and ids[-1:] == [eos] and not text.endswith(self.tokenizer.eos_token):
            ids = ids[:-1]
        return ids
