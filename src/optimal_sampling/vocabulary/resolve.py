"""The name of a model, as a user types it -> a folder or a hub id that Transformers can load."""

from __future__ import annotations

import re
from pathlib import Path

from optimal_sampling.errors import ModelError

__all__ = ["resolve_model"]

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")


def resolve_model(name: str) -> str:
    """The folder of a shipped model, an existing folder, or a hub id.

    Only names and folders are checked: a hub id that does not exist is an error when it is loaded.
    Raises ModelError where a folder is meant and is missing, or has no `config.json`.
    """
    from optimal_sampling import toy_pair

    if not name.strip():
        raise ModelError(
            "the name of a model is empty; "
            "give a folder, a hub id, or `toy-teacher` / `toy-student`"
        )
    if name in toy_pair.NAMES:
        return _model_folder(name, Path(toy_pair.path(name)))
    try:
        folder = Path(name).expanduser()
        is_folder, is_file = folder.is_dir(), folder.is_file()
    except (OSError, RuntimeError) as error:  # a name too long for the disk, a user without a home
        raise ModelError(f"{name[:200]!r} is no name of a model: {error}") from error
    if is_folder:
        return _model_folder(name, folder)
    if is_file:
        raise ModelError(f"{name!r} is a file; a model is the folder that holds its config.json")
    if name.startswith((".", "~", "/", "\\")) or not _HUB_ID.fullmatch(name):
        raise ModelError(
            f"there is no model at {name!r}: looked for the folder {folder.absolute()}"
        )
    return name


def _model_folder(name: str, folder: Path) -> str:
    if not (folder / "config.json").is_file():
        raise ModelError(
            f"the folder of model {name!r} is not complete: there is no {folder / 'config.json'}"
        )
    return str(folder)
