"""The tokenizer of a model by name, from its `tokenizer.json` alone: a file, no Transformers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from optimal_sampling import toy_pair
from optimal_sampling.config import expand_user
from optimal_sampling.errors import ModelError
from optimal_sampling.spans.pieces import TokenReader

__all__ = ["reader_of", "run_reader"]

_FILE = "tokenizer.json"


def reader_of(name: str, revision: str | None = None) -> TokenReader:
    """The texts of the tokens of a shipped model, a folder, or a model downloaded before.

    Nothing is downloaded. Raises ModelError.
    """
    from tokenizers import Tokenizer

    path = _tokenizer_file(name, revision)
    try:
        tokenizer = Tokenizer.from_file(str(path))
        letter = tokenizer.encode("a", add_special_tokens=False).ids
    except Exception as error:  # of a file that is damaged or newer: any class
        raise ModelError(f"cannot read {path}: {error}") from error

    def decode(ids: list[int]) -> str:
        return str(tokenizer.decode(ids, skip_special_tokens=False))

    return TokenReader(decode, tuple(letter))


def run_reader(options: Mapping[str, Any]) -> tuple[TokenReader | None, str]:
    """The tokenizer of a run's completions, or None and why there is none.

    `options`: the options of its `config.json`. Completions are of the student's tokens; where the
    models share their tokens and only the teacher's tokenizer is here, of the teacher's.
    """
    problem = ""
    for role in ("student", "teacher"):
        name = options.get(role)
        if not isinstance(name, str):
            continue
        try:
            return reader_of(name, options.get(f"{role}_revision")), ""
        except ModelError as error:
            problem = problem or str(error)
    return None, problem or "the run does not say which models it was made with"


def _tokenizer_file(name: str, revision: str | None) -> Path:
    if name in toy_pair.NAMES:
        return toy_pair.path(name) / _FILE
    folder = expand_user(name)
    try:
        if folder.is_dir():
            return _in_folder(folder)
    except OSError as error:
        raise ModelError(f"cannot read the folder of model {name[:200]!r}: {error}") from error
    return _downloaded(name, revision)


def _in_folder(folder: Path) -> Path:
    path = folder / _FILE
    if not path.is_file():
        raise ModelError(f"{folder} has no {_FILE}, which the texts of its tokens are read from")
    return path


def _downloaded(name: str, revision: str | None) -> Path:
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(name, _FILE, revision=revision)
    except HFValidationError:
        found = None
    if isinstance(found, str):
        return Path(found)
    raise ModelError(
        f"the tokenizer of {name!r} is not on this machine: there is no such folder, and no "
        f"{_FILE} of it was downloaded before"
    )
