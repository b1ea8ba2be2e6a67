"""The dataset to train on, and what is checked in it before training starts."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pyarrow.types import is_large_list, is_large_string, is_list, is_null, is_string

from optimal_sampling.config import expand_user
from optimal_sampling.errors import (
    ConfigError,
    DatasetError,
    OptimalSamplingError,
    TokenizerMismatchError,
)
from optimal_sampling.records.export.tokens import vocabulary_hash
from optimal_sampling.train.options import SftOptions
from optimal_sampling.vocabulary import ModelTokens

__all__ = [
    "Scan",
    "check_cuts",
    "check_ends",
    "check_loss",
    "check_prompts",
    "check_vocabulary",
    "load_split",
    "scan",
    "shown",
]

_IGNORED = -100  # label of a token without loss
_LAST = 3  # a template may write a line break after the end token
_READERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}
_KEPT = ("prompt", "completion", "tools", "chat_template_kwargs")
_TOKENS = ("input_ids", "labels")
_REFUSED = (
    ("messages", "TRL would train on the prompts too"),
    ("completion_mask", "TRL uses the mask only where it is told to"),
    ("privileged_context", "these are prompts without completions, for TRL's distillation"),
    ("text", "a text does not say where its prompt ends"),
)
"""Columns that alone are no data to train completions on, and why."""


def load_split(options: SftOptions, split: str) -> Any:
    """A split with the columns that are trained on. Raises DatasetError."""
    name = options.dataset_name
    dataset = _read(name, options.dataset_config)
    if split not in dataset:
        raise DatasetError(f"dataset {name} has no split {split!r}; it has {', '.join(dataset)}")
    rows = dataset[split]
    if not len(rows):
        raise DatasetError(f"split {split!r} of dataset {name} is empty")
    return _trained_columns(rows, name, options.completion_only_loss)


def _read(name: str, subset: str | None) -> Any:
    from datasets import load_dataset, load_dataset_builder

    path = expand_user(name)
    try:
        if path.is_file():
            if path.suffix not in _READERS:
                raise DatasetError(f"{path} is neither JSONL nor Parquet, by its name")
            return load_dataset(_READERS[path.suffix], data_files=str(path))
        if path.is_dir():
            # By folder, datasets' cache tells folders apart by their last name alone, and gives
            # the rows of another one, or those from before an overwrite; by file it does not.
            found = load_dataset_builder(str(path), subset)
            files = {split: list(paths) for split, paths in found.config.data_files.items()}
            return load_dataset(found.info.builder_name, data_files=files)
        return load_dataset(name, subset)
    except OptimalSamplingError:
        raise
    except Exception as error:  # of the hub, the network, the disk or a parser: any class
        reason = " ".join(str(error.__cause__ or error).split()) or type(error).__name__
        raise DatasetError(f"cannot load dataset {name}: {reason}") from error


def _trained_columns(rows: Any, name: str, completion_only: bool) -> Any:
    columns = rows.column_names
    if {*_TOKENS} <= {*columns}:
        return rows.select_columns([*_TOKENS])
    if {"prompt", "completion"} <= {*columns}:
        kept = rows.select_columns([column for column in _KEPT if column in columns])
        _check_forms(kept, name)
        return _without_nulls(kept, name)
    if not completion_only:
        return rows
    why = next((f" ({why})" for column, why in _REFUSED if column in columns), "")
    raise DatasetError(
        f"dataset {name} has the columns {', '.join(columns)}{why}; loss on the completions needs "
        "`prompt` and `completion`, or `input_ids` and `labels`, as `optimal-sampling export` "
        "writes them with --format text or tokens"
    )


def _check_forms(rows: Any, name: str) -> None:
    """Raises DatasetError unless prompts and completions are both texts, or both messages."""
    types = {column: rows.data.schema.field(column).type for column in ("prompt", "completion")}
    texts = [_is_text(each) for each in types.values()]
    lists = [is_list(each) or is_large_list(each) for each in types.values()]
    if not all(texts) and not all(lists):
        found = " and ".join(f"`{column}` of {str(each)[:60]}" for column, each in types.items())
        raise DatasetError(
            f"dataset {name} has {found}: both have to be texts, or both lists of messages"
        )


def _is_text(kind: Any) -> bool:
    return bool(is_string(kind) or is_large_string(kind) or is_null(kind))


def _without_nulls(rows: Any, name: str) -> Any:
    for column in ("prompt", "completion"):
        empty = rows.data.column(column).null_count
        if empty:
            raise DatasetError(f"column {column} of dataset {name} is null in {empty} rows")
    return rows


def check_vocabulary(name: str, rows: Any, tokens: ModelTokens) -> None:
    """Raises TokenizerMismatchError where the rows of a local export are of another tokenizer.

    Ids and texts with markers are written for one tokenizer; lists of messages are for any.
    """
    path = expand_user(name) / "export.json"
    if not path.is_file() or isinstance(rows[0].get("prompt"), list):
        return
    exported = json.loads(path.read_text("utf-8"))
    if exported.get("vocabulary") not in (None, vocabulary_hash(tokens.tokenizer.get_vocab())):
        raise TokenizerMismatchError(
            f"dataset {name} was exported for {exported.get('model')}, whose tokens have other ids "
            f"than those of {tokens.name}: export it again with --model {tokens.name}, or with "
            "--messages, which the trainer renders itself"
        )


@dataclass(frozen=True)
class Scan:
    """What the tokens of a dataset are, an entry per example."""

    lengths: NDArray[np.int64]
    trained: NDArray[np.int64]
    """Tokens with loss."""
    ends: NDArray[np.int64]
    """The last of the trained tokens that ends a text, -1 where none of the last three does."""
    outside: int
    """Examples with a token that is not in the vocabulary."""
    strange: int
    """Examples whose labels are other tokens than their input, or of another number."""
    blank: int
    """Examples of whose completion nothing comes before its end."""
    digest: str
    """Hash of all tokens and labels."""


def scan(dataset: Any, end_ids: frozenset[int], vocabulary: int) -> Scan:
    """Reads `input_ids` and `labels` of a prepared dataset; ids lie below `vocabulary`."""
    digest = hashlib.blake2b(digest_size=8)
    table: list[tuple[int, int, int]] = []
    strange = outside = blank = 0
    for row in dataset.with_format("numpy", columns=[*_TOKENS]):
        ids, labels = (np.asarray(row[name], dtype=np.int64) for name in _TOKENS)
        for values in (ids, labels):
            digest.update(len(values).to_bytes(8, "little") + values.tobytes())
        kept = labels[labels != _IGNORED]
        is_same = len(ids) == len(labels) and np.array_equal(kept, ids[labels != _IGNORED])
        strange += not is_same
        outside += bool(((ids < 0) | (ids >= vocabulary)).any())
        blank += bool(len(kept)) and int(kept[0]) in end_ids
        found = [int(token) for token in kept[-_LAST:] if int(token) in end_ids]
        table.append((len(ids), len(kept), found[-1] if found else -1))
    lengths, trained, ends = np.array(table, dtype=np.int64).T
    return Scan(lengths, trained, ends, outside, strange, blank, digest.hexdigest())


def check_cuts(found: Scan, options: SftOptions, context: int | None) -> list[str]:
    """Notes on the lengths. Raises ConfigError where an example would be cut unasked."""
    lengths = found.lengths
    note = f"{len(lengths)} examples, {lengths.sum()} tokens, longest {lengths.max()}"
    limit = min(options.max_length or context or lengths.max(), context or lengths.max())
    longer = np.sort(lengths[lengths > limit])[::-1]
    if not len(longer):
        return [note]
    named = ", ".join(str(length) for length in longer[:5])
    more = f" and {len(longer) - 5} more" if len(longer) > 5 else ""
    whose = "--max_length" if options.max_length == limit else "the model's context"
    what = f"{len(longer)} of {len(lengths)} examples are longer than {whose} of {limit} tokens"
    if options.allow_cut and options.max_length == limit:
        return [note, f"{what}, and are cut (--allow_cut): {named}{more}"]
    raise ConfigError(
        f"{what} and would be cut, without their end: {named}{more}. Raise --max_length, leave "
        f"such examples out of the dataset, or cut them with --max_length and --allow_cut"
    )


def check_loss(found: Scan, completion_only: bool) -> list[str]:
    """A note on the tokens with loss. Raises DatasetError where it is not on completions only."""
    total, count = int(found.lengths.sum()), len(found.lengths)
    if found.outside:
        raise DatasetError(
            f"{found.outside} of {count} examples hold ids that are no tokens of the model: they "
            "were made for another tokenizer"
        )
    if found.strange:
        raise DatasetError(
            f"the labels of {found.strange} of {count} examples are not their own tokens: "
            "labels are input_ids, or -100 for a token without loss"
        )
    whole = int((found.trained == found.lengths).sum())
    if completion_only and whole:
        raise DatasetError(
            f"{whole} of {count} examples have loss on every token, so on their prompts too; set "
            "the labels of the prompts to -100, or say --no-completion_only_loss"
        )
    empty = int((found.trained == 0).sum())
    if empty:
        raise DatasetError(f"{empty} of {count} examples have no token with loss")
    trained = int(found.trained.sum())
    notes = [f"loss on {trained} of {total} tokens ({trained / total:.0%})"]
    if found.blank:
        notes.append(
            f"{found.blank} of {count} examples have an empty completion, which teaches the model "
            "to answer nothing"
        )
    return notes


def check_ends(found: Scan, tokens: ModelTokens, eos_ids: Set[int]) -> list[str]:
    """Notes on how examples end.

    `eos_ids`: ids at which the saved model will stop. Raises DatasetError where no example ends
    with an end token, or where the model would not stop at the one that they end with.
    """
    count, ended = len(found.ends), int((found.ends >= 0).sum())
    if not ended:
        names = ", ".join(repr(tokens.id_map[index]) for index in sorted(tokens.end_ids))
        raise DatasetError(
            f"no example ends with an end token ({names}): the model would learn never to stop. "
            "End the completions with one, or choose theirs with --eos_token"
        )
    unknown = {int(index) for index in found.ends if index >= 0} - {*eos_ids}
    if unknown:
        name = tokens.id_map[min(unknown)]
        raise DatasetError(
            f"examples end with {name!r}, at which the saved model would not stop, because its "
            f"configs do not name it: say --eos_token '{name}'"
        )
    if ended == count:
        return [f"all examples end with {tokens.id_map[int(found.ends[0])]!r}"]
    return [
        f"{count - ended} of {count} examples do not end with an end token: texts that were cut "
        "short teach the model not to stop"
    ]


def check_prompts(rows: Sequence[dict[str, Any]], tokenizer: Any) -> list[str]:
    """A note where messages are rendered otherwise for training than for generation.

    The loss then starts before the text that generation starts from ends.
    """
    missing = [text for row in rows if (text := _left_out(row, tokenizer))]
    if not missing:
        return []
    return [
        f"the chat template renders {len(missing)} of the first {len(rows)} prompts otherwise for "
        f"training than for generation, where they go on with {missing[0]!r}: train on "
        "`export --format tokens`, which is exact"
    ]


def _left_out(row: dict[str, Any], tokenizer: Any) -> str:
    """The end of the prompt for generation that is not in the prompt that is trained."""
    if not isinstance(row.get("prompt"), list):
        return ""
    ids = tokenizer.apply_chat_template(
        row["prompt"],
        tools=row.get("tools"),
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        **(row.get("chat_template_kwargs") or {}),
    )["input_ids"]
    masked = next((i for i, label in enumerate(row["labels"]) if label != _IGNORED), len(ids))
    return str(tokenizer.decode(ids[masked:]))


def shown(row: dict[str, Any], decode: Callable[[list[int]], str]) -> list[str]:
    """An example as it is trained, in parts with and without loss."""
    parts: list[tuple[bool, list[int]]] = []
    for token, label in zip(row["input_ids"], row["labels"], strict=True):
        has_loss = label != _IGNORED
        if not parts or parts[-1][0] != has_loss:
            parts.append((has_loss, []))
        parts[-1][1].append(token)
    names = {True: "loss   ", False: "no loss"}
    return [f"  {names[has_loss]} | {decode(ids)!r}" for has_loss, ids in parts]
