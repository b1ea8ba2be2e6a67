"""The token ids that two models mean the same by.

Sameness is decided by the tokenizers' id maps, never by `config.vocab_size`: models pad their rows of logits to round
numbers. Let `size` be one more than the largest id that both tokenizers give the same token. Then

- every id below `size` has to agree, or the two vocabularies are different ones: TokenizerMismatchError;
- ids from `size` on may only be *added* tokens (markers that one of the models was given later). They are cut: neither
  model can draw them, though each model's own prompt may hold them. A note says which;
- a cut id must not be the token by which one of the models ends its texts, as its answers would never end.

Tokenizers with equal ids may still split text differently (other merges, other normaliser). That is no error, as
completions travel as ids and each prompt is read by its model's own tokenizer; a note says so.

Mixing across different tokenizers would attach here: a `Vocabulary` that carries, per model, a map from its rows of
logits to shared ids, where today every engine cuts rows at `size`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from optimal_sampling.errors import TokenizerMismatchError
from optimal_sampling.vocabulary.tokens import ModelTokens, load_tokens

__all__ = ["Vocabulary"]

_SHOWN = 5
_THINK_MARKERS = frozenset(
    {"<think>", "</think>", "<thinking>", "</thinking>", "[THINK]", "[/THINK]"}
)
_PROBES = (
    "The quick brown fox jumps over the lazy dog; then nothing else happened, and they were friends again.",
    "What is 12345 + 6.78?  Two  spaces, a\ttab,\n\na blank line.",
    "don't DON'T camelCase snake_case f(x) = \\frac{a}{b}^{2}; x_1 != y",
    "naïve café, e\u0301, ﬁ, 你好，世界, Привет, 1,000,000 \u2014 \U0001f642",
)


@dataclass(frozen=True)
class Vocabulary:
    """What two models share: ids `0 .. size-1`, where a text ends, and how ids become text.

    Engines cut both models' rows of logits at `size`. A prompt's ids belong to its own model and may lie beyond.
    """

    size: int
    """Number of ids that both models share."""
    stop_ids: frozenset[int]
    """Ids below `size` at which either model ends a text."""
    pad_id: int = 0
    """Filler of ragged batches; never read as a token."""
    student_tokenizer: Any = field(default=None, repr=False, compare=False)
    teacher_tokenizer: Any = field(default=None, repr=False, compare=False)
    student_context: int | None = None
    """Most tokens, prompt and completion together, that the student can read; None: unknown."""
    teacher_context: int | None = None
    student_rows: int | None = None
    """Rows of the student's embedding: a prompt's ids have to lie below; None: unknown."""
    teacher_rows: int | None = None
    notes: tuple[str, ...] = ()
    """What a user should know of how the two vocabularies meet."""

    @classmethod
    def load(cls, student: str, teacher: str, trust_remote_code: bool = False) -> Vocabulary:
        """Read both models' tokenizers and configs by name.

        Raises ModelError, MissingDependencyError (see `load_tokens`) and TokenizerMismatchError.
        """
        student_tokens = load_tokens(student, trust_remote_code)
        same = student == teacher
        return cls.share(
            student_tokens, student_tokens if same else load_tokens(teacher, trust_remote_code)
        )

    @classmethod
    def share(cls, student: ModelTokens, teacher: ModelTokens) -> Vocabulary:
        """Find what two models share. Raises TokenizerMismatchError where their ids do not mean the same."""
        size, notes = _shared_size(student, teacher)
        for model, role in ((student, "student"), (teacher, "teacher")):
            notes += _check_end_is_shared(model, role, size)
        notes += _splitting_note(student.tokenizer, teacher.tokenizer)
        stop_ids = frozenset(index for index in student.end_ids | teacher.end_ids if index < size)
        return cls(
            size=size,
            stop_ids=stop_ids,
            pad_id=_pad_id((student.tokenizer, teacher.tokenizer), stop_ids, size),
            student_tokenizer=student.tokenizer,
            teacher_tokenizer=teacher.tokenizer,
            student_context=student.context,
            teacher_context=teacher.context,
            student_rows=student.rows,
            teacher_rows=teacher.rows,
            notes=tuple(dict.fromkeys(notes)),
        )

    def decode(self, ids: Sequence[int]) -> str:
        """Text of a completion, without its final stop token and without special tokens.

        Markers of thinking stay even where a tokenizer calls them special: they part the reasoning from the answer.
        Bytes that are no UTF-8 become U+FFFD.
        """
        kept = list(ids)
        if kept and kept[-1] in self.stop_ids:
            kept.pop()
        kept = [index for index in kept if index not in self._silent_ids]
        return str(
            self.student_tokenizer.decode(
                kept, skip_special_tokens=False, clean_up_tokenization_spaces=False
            )
        )

    @cached_property
    def _silent_ids(self) -> frozenset[int]:
        tokenizer = self.student_tokenizer
        added = getattr(tokenizer, "added_tokens_decoder", {})
        special = {index for index, token in added.items() if getattr(token, "special", False)}
        special |= set(tokenizer.all_special_ids)
        spoken = {index for index, token in added.items() if str(token) in _THINK_MARKERS}
        return frozenset(special - spoken)


def _shared_size(student: ModelTokens, teacher: ModelTokens) -> tuple[int, list[str]]:
    student_map, teacher_map = student.id_map, teacher.id_map
    size = 1 + max(
        (index for index, token in student_map.items() if teacher_map.get(index) == token),
        default=-1,
    )
    differing = sorted(
        index
        for index in student_map.keys() | teacher_map.keys()
        if index < size and student_map.get(index) != teacher_map.get(index)
    )
    if differing or not size:
        shown = differing or sorted(student_map.keys() | teacher_map.keys())
        raise TokenizerMismatchError(_mismatch_message(student, teacher, shown))
    rows = min(model.rows or size for model in (student, teacher))
    size = min(size, rows)
    notes = []
    for model, ids in ((student, student_map), (teacher, teacher_map)):
        notes += _cut_note(model, ids, size, student, teacher)
    return size, notes


def _cut_note(
    model: ModelTokens,
    id_map: Mapping[int, str],
    size: int,
    student: ModelTokens,
    teacher: ModelTokens,
) -> list[str]:
    """Added tokens beyond the shared ids are cut and named; ordinary ones mean that the tokenizers are different."""
    cut = sorted(index for index in id_map if index >= size)
    if not cut:
        return []
    words = [index for index in cut if index not in model.added_ids]
    if words and model.rows == size:
        raise TokenizerMismatchError(
            f"the tokenizer of {model.name!r} has {len(id_map)} ids, but the model has only {size} rows of logits: "
            "is this the tokenizer of another model?"
        )
    if words:
        raise TokenizerMismatchError(_mismatch_message(student, teacher, words))
    names = _listed([f"{index} {id_map[index]!r}" for index in cut])
    return [f"only {model.name!r} knows these added tokens, so they are never drawn: {names}"]


def _mismatch_message(student: ModelTokens, teacher: ModelTokens, ids: Sequence[int]) -> str:
    student_map, teacher_map = student.id_map, teacher.id_map
    lines = [
        f"  id {index}: student {student_map.get(index, 'nothing')!r}, teacher {teacher_map.get(index, 'nothing')!r}"
        for index in ids[:_SHOWN]
    ]
    return (
        f"student {student.name!r} and teacher {teacher.name!r} have different tokenizers: "
        f"{len(ids)} token ids do not mean the same\n"
        + "\n".join(lines)
        + ("\n  ..." if len(ids) > _SHOWN else "")
        + "\nTake two models of one family, whose tokenizers have the same ids."
    )


def _check_end_is_shared(model: ModelTokens, role: str, size: int) -> list[str]:
    """A model whose end token is cut would never end its texts."""
    lost = sorted(index for index in model.end_ids if index >= size)
    main = model.tokenizer.eos_token_id
    if lost and (main in lost or len(lost) == len(model.end_ids)):
        index = main if main in lost else lost[0]
        token = model.id_map.get(index, "no token at all")
        raise TokenizerMismatchError(
            f"{role} {model.name!r} ends its texts with {token!r} (id {index}), which the other model does not know, "
            "so its texts would never end. Take two models of one family whose tokenizers have the same end tokens."
        )
    if not lost:
        return []
    return [
        f"end tokens of {role} {model.name!r} that the other model does not know are left out: ids {_listed(lost)}"
    ]


def _pad_id(tokenizers: Sequence[Any], stop_ids: frozenset[int], size: int) -> int:
    """A padding token that one of the models names, else an end token."""
    named = [tokenizer.pad_token_id for tokenizer in tokenizers]
    usable = [
        index for index in (*named, *sorted(stop_ids)) if index is not None and 0 <= index < size
    ]
    return usable[0] if usable else 0


def _splitting_note(student: Any, teacher: Any) -> list[str]:
    def split(tokenizer: Any, text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    if student is teacher or all(split(student, text) == split(teacher, text) for text in _PROBES):
        return []
    return [
        "the two tokenizers have the same ids but split text differently; "
        "each model's prompt is read by its own tokenizer, and completions travel as ids"
    ]


def _listed(items: Sequence[object]) -> str:
    return ", ".join(map(str, items[:_SHOWN])) + (
        f" and {len(items) - _SHOWN} more" if len(items) > _SHOWN else ""
    )
