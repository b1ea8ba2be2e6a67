"""The token ids that mean the same to two models.

The tokenizers' id maps are compared, never `config.vocab_size`: models pad their rows of logits to
round numbers. Let `size` be one more than the largest id that both tokenizers give the same token.

- Every id below `size` has to agree; otherwise TokenizerMismatchError.
- Ids from `size` on may only be *added* tokens (markers that one of the models was given later).
  They are cut: neither model can draw them, though each model's own prompt may hold them.
  A note names them.
- A cut id must not be the end token of one of the models, whose texts would then never end.

Tokenizers with equal ids may split text differently (other merges, another normaliser). That is no
error: completions stay ids, and each prompt is tokenised by its model's own tokenizer. A note says
so.

Two models whose ids do not agree share no tokens but the bytes that these write. Their `Vocabulary`
is the student's, with the bytes of both models' tokens; engines/bytes/ mixes such a pair.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

from optimal_sampling.errors import TokenizerMismatchError
from optimal_sampling.types import Granularity, Mode
from optimal_sampling.vocabulary.thinking import KNOWN_BLOCKS, Block, thinking_blocks
from optimal_sampling.vocabulary.token_bytes import TokenBytes, token_bytes
from optimal_sampling.vocabulary.tokens import ModelTokens, load_tokens

__all__ = ["Vocabulary"]

_SHOWN = 5
_PROBES = (
    "The quick brown fox jumps over the lazy dog; then nothing else happened, "
    "and they were friends again.",
    "What is 12345 + 6.78?  Two  spaces, a\ttab,\n\na blank line.",
    "don't DON'T camelCase snake_case f(x) = \\frac{a}{b}^{2}; x_1 != y",
    "naïve café, e\u0301, ﬁ, 你好，世界, Привет, 1,000,000 \u2014 \U0001f642",
)


@dataclass(frozen=True)
class Vocabulary:
    """Shared ids `0 .. size-1` of two models, their stop ids, and the text of ids.

    Engines cut both models' rows of logits at `size`. Ids of a prompt belong to its own model and
    may lie beyond.
    """

    size: int
    """Number of shared ids."""
    stop_ids: frozenset[int]
    """Ids below `size` at which either model ends a text."""
    pad_id: int = 0
    """Filler of ragged batches; never read as a token."""
    student_tokenizer: Any = field(default=None, repr=False, compare=False)
    teacher_tokenizer: Any = field(default=None, repr=False, compare=False)
    student_context: int | None = None
    """Most tokens of prompt and completion together that the student can read; None: unknown."""
    teacher_context: int | None = None
    student_rows: int | None = None
    """Rows of the student's embedding: a prompt's ids have to lie below; None: unknown."""
    teacher_rows: int | None = None
    bytes_by_role: Mapping[str, TokenBytes] = field(default_factory=dict, repr=False)
    """What the tokens of `student` and `teacher` write, where these differ; else empty. The other
    fields are then of the student's ids."""
    notes: tuple[str, ...] = ()
    """Differences between the two tokenizers that the user should know of."""

    @classmethod
    def load(
        cls,
        student: str,
        teacher: str,
        trust_remote_code: bool = False,
        *,
        revisions: tuple[str | None, str | None] = (None, None),
        granularity: Literal["auto", "token", "byte"] = "token",
    ) -> Vocabulary:
        """The vocabulary of two models by name, from their tokenizers and configs.

        `revisions`: of the student and the teacher, where they are of the hub. `granularity`:
        `auto` takes bytes where the tokens differ, `byte` in any case, `token` in none.

        Raises ModelError and MissingDependencyError as `load_tokens` does, TokenizerMismatchError.
        """
        student_tokens = teacher_tokens = load_tokens(student, trust_remote_code, revisions[0])
        if (student, revisions[0]) != (teacher, revisions[1]):
            teacher_tokens = load_tokens(teacher, trust_remote_code, revisions[1])
        if granularity == "byte":
            return cls.of_bytes(student_tokens, teacher_tokens)
        try:
            return cls.share(student_tokens, teacher_tokens)
        except TokenizerMismatchError as mismatch:
            if granularity == "token":
                raise
            return cls.of_bytes(student_tokens, teacher_tokens, str(mismatch).partition("\n")[0])

    @classmethod
    def share(cls, student: ModelTokens, teacher: ModelTokens) -> Vocabulary:
        """The vocabulary that two models share. Raises TokenizerMismatchError."""
        size, notes = _shared_size(student, teacher)
        notes += _check_end_is_shared(student, "student", size)
        notes += _check_end_is_shared(teacher, "teacher", size)
        notes += [*_turn_end_note(student), *_turn_end_note(teacher)]
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

    @classmethod
    def of_bytes(cls, student: ModelTokens, teacher: ModelTokens, why: str = "") -> Vocabulary:
        """The student's ids, and what the tokens of both models write.

        `why`: the reason why they share no ids. Raises TokenizerMismatchError where tokens have
        no bytes.
        """
        tables = {"student": _table(student), "teacher": _table(teacher)}
        why = why.partition(":")[0]
        models = f"{why}; they" if why else "as asked, the two models"
        note = f"{models} are mixed byte by byte (docs/tokenizers.md)"
        stop_ids = tables["student"].end_ids
        size = tables["student"].size
        return cls(
            size=size,
            stop_ids=stop_ids,
            pad_id=_pad_id((student.tokenizer,), stop_ids, size),
            student_tokenizer=student.tokenizer,
            teacher_tokenizer=teacher.tokenizer,
            student_context=student.context,
            teacher_context=teacher.context,
            student_rows=student.rows,
            teacher_rows=teacher.rows,
            bytes_by_role=tables,
            notes=(note, *dict.fromkeys([*_turn_end_note(student), *_turn_end_note(teacher)])),
        )

    @property
    def granularity(self) -> Granularity:
        """What two models with this vocabulary are mixed over."""
        return "byte" if self.bytes_by_role else "token"

    def granularity_of(self, mode: Mode) -> Granularity:
        """What is drawn in a mode: the student alone has only one tokenizer."""
        return self.granularity if mode != "student" else "token"

    def rows_of(self, role: str) -> int:
        """Number of ids that a prompt of `student` or `teacher` may have."""
        named: int | None = getattr(self, f"{role}_rows")
        return named or (self.bytes_by_role[role].size if self.bytes_by_role else self.size)

    @property
    def logit_rows(self) -> int:
        """Number of rows of logits that engines read, of either model."""
        return max([self.size, *(table.size for table in self.bytes_by_role.values())])

    def decode(self, ids: Sequence[int]) -> str:
        """Text of a completion, without its final stop token and without special tokens.

        Markers of thinking blocks stay even where a tokenizer calls them special: they separate the
        reasoning from the answer. A space at the start stays, so that the texts of prompt and
        completion together are the whole text. Bytes that are no UTF-8 become U+FFFD.
        """
        kept = self._without_stop(ids)
        return self._text([index for index in kept if index not in self._omitted_ids])

    def decode_raw(self, ids: Sequence[int]) -> str:
        """Text of a completion with its special tokens, without its final stop token."""
        return self._text(self._without_stop(ids))

    def _without_stop(self, ids: Sequence[int]) -> list[int]:
        ends = bool(ids) and ids[-1] in self.stop_ids
        return list(ids[:-1] if ends else ids)

    def _text(self, ids: list[int]) -> str:
        """Text of ids that follow other text: decoders drop a space at the start of a text."""
        text = self._decoded([*self._letter_ids, *ids])
        letter = self._decoded(self._letter_ids)
        return text.removeprefix(letter) if text.startswith(letter) else self._decoded(ids)

    def _decoded(self, ids: list[int]) -> str:
        decode = self.student_tokenizer.decode
        return str(decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))

    @cached_property
    def _letter_ids(self) -> list[int]:
        return list(self.student_tokenizer("a", add_special_tokens=False)["input_ids"])

    @cached_property
    def thinking_blocks(self) -> tuple[Block, ...]:
        """Opening and closing markers of reasoning: of both chat templates, and known ones."""
        tokenizers = (self.student_tokenizer, self.teacher_tokenizer)
        own = [block for tokenizer in tokenizers for block in thinking_blocks(tokenizer)]
        return tuple(dict.fromkeys((*own, *KNOWN_BLOCKS)))

    @cached_property
    def _omitted_ids(self) -> frozenset[int]:
        """Special tokens that are not part of a marker of thinking blocks."""
        tokenizer = self.student_tokenizer
        added = getattr(tokenizer, "added_tokens_decoder", {})
        special = {index for index, token in added.items() if getattr(token, "special", False)}
        special |= set(tokenizer.all_special_ids)
        markers = "\n".join(marker for block in self.thinking_blocks for marker in block)
        thinking = {index for index, token in added.items() if str(token) in markers}
        return frozenset(special - thinking)


def _table(model: ModelTokens) -> TokenBytes:
    """What the model's tokens write. Raises TokenizerMismatchError."""
    words = sorted(model.id_map.keys() - model.added_ids)
    if model.rows is not None and words and words[-1] >= model.rows:
        raise TokenizerMismatchError(_too_many_ids(model))
    markers = {marker for block in thinking_blocks(model.tokenizer) for marker in block}
    known = {marker for block in KNOWN_BLOCKS for marker in block}
    table = token_bytes(model.tokenizer, model.end_ids, markers | known)
    if not table.end_ids:
        raise TokenizerMismatchError(
            f"no config of {model.name!r} names a token that ends its texts, so that they would "
            "never end; give its generation_config.json an eos_token_id"
        )
    return table.cut(model.rows)


def _too_many_ids(model: ModelTokens) -> str:
    return (
        f"the tokenizer of {model.name!r} has {len(model.id_map)} ids, but the model has only "
        f"{model.rows} rows of logits: is this the tokenizer of another model?"
    )


def _shared_size(student: ModelTokens, teacher: ModelTokens) -> tuple[int, list[str]]:
    """Number of shared ids, and notes on tokens that are cut."""
    student_map, teacher_map = student.id_map, teacher.id_map
    known = sorted(student_map.keys() | teacher_map.keys())
    equal = {index for index in known if student_map.get(index) == teacher_map.get(index)}
    size = 1 + max(equal, default=-1)
    differing = [index for index in known if index < size and index not in equal]
    if differing or not equal:
        raise TokenizerMismatchError(_mismatch_message(student, teacher, differing or known))
    size = min(size, student.rows or size, teacher.rows or size)
    notes = []
    for model in (student, teacher):
        words = _cut_words(model, size)
        if words:
            raise TokenizerMismatchError(_mismatch_message(student, teacher, words))
        notes += _cut_note(model, size)
    return size, notes


def _cut_words(model: ModelTokens, size: int) -> list[int]:
    """Ids beyond the shared ones that are no added tokens: another vocabulary."""
    ids = model.id_map.keys()
    words = sorted(index for index in ids - model.added_ids if index >= size)
    if words and model.rows == size:
        raise TokenizerMismatchError(_too_many_ids(model))
    return words


def _cut_note(model: ModelTokens, size: int) -> list[str]:
    cut = [f"{index} {token!r}" for index, token in sorted(model.id_map.items()) if index >= size]
    if not cut:
        return []
    names = _listed(cut)
    return [f"only {model.name!r} knows these added tokens, so they are never drawn: {names}"]


def _mismatch_message(student: ModelTokens, teacher: ModelTokens, ids: Sequence[int]) -> str:
    student_map, teacher_map = student.id_map, teacher.id_map
    lines = [
        f"student {student.name!r} and teacher {teacher.name!r} have different tokenizers: "
        f"{len(ids)} token ids do not mean the same"
    ]
    for index in ids[:_SHOWN]:
        students, teachers = student_map.get(index, "nothing"), teacher_map.get(index, "nothing")
        lines.append(f"  id {index}: student {students!r}, teacher {teachers!r}")
    if len(ids) > _SHOWN:
        lines.append("  ...")
    lines.append("Take two models of one family, whose tokenizers have the same ids, or mix them")
    lines.append("byte by byte: --granularity byte with --engine local (docs/tokenizers.md).")
    return "\n".join(lines)


def _check_end_is_shared(model: ModelTokens, role: str, size: int) -> list[str]:
    """Notes on end tokens that are cut. TokenizerMismatchError where no text would ever end."""
    lost = sorted(index for index in model.end_ids if index >= size)
    main = model.tokenizer.eos_token_id
    if lost and (main in lost or len(lost) == len(model.end_ids)):
        index = main if main in lost else lost[0]
        if index not in model.id_map:
            raise TokenizerMismatchError(
                f"{role} {model.name!r} ends its texts with id {index}, which lies outside its own "
                "vocabulary, so its texts would never end. Correct eos_token_id in its configs."
            )
        raise TokenizerMismatchError(
            f"{role} {model.name!r} ends its texts with {model.id_map[index]!r} (id {index}), "
            "which the other model does not know, so its texts would never end. "
            "Take two models of one family whose tokenizers have the same end tokens."
        )
    own = [index for index in lost if index in model.id_map]
    reasons = {
        "that the other model does not know": own,
        "that lie outside its own vocabulary": sorted({*lost} - {*own}),
    }
    return [
        f"end tokens of {role} {model.name!r} {reason} are left out: ids {_listed(ids)}"
        for reason, ids in reasons.items()
        if ids
    ]


def _turn_end_note(model: ModelTokens) -> list[str]:
    if model.turn_end is None:
        return []
    token = model.id_map.get(model.turn_end, "")
    return [
        f"the chat template of {model.name!r} ends turns with {token!r} (id {model.turn_end}), "
        "which no config calls an end token: it ends completions too"
    ]


def _pad_id(tokenizers: Sequence[Any], stop_ids: frozenset[int], size: int) -> int:
    """A padding token that one of the models names, else an end token."""
    named = [tokenizer.pad_token_id for tokenizer in tokenizers]
    for index in (*named, *sorted(stop_ids)):
        if index is not None and 0 <= index < size:
            return int(index)
    return 0


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
    shown = ", ".join(map(str, items[:_SHOWN]))
    return shown if len(items) <= _SHOWN else f"{shown} and {len(items) - _SHOWN} more"
