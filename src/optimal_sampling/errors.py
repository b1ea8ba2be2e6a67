"""Errors of this package.

    OptimalSamplingError          exit code 1
    ├── UserError                 exit code 2: something in the call has to change
    │   ├── ConfigError           an option's value, or options that contradict each other
    │   ├── ModelError            a model that is missing, broken or of an unsupported kind
    │   ├── TokenizerMismatchError  two models whose token ids do not mean the same
    │   ├── DatasetError          a dataset that is missing, empty, torn, or lacks a column
    │   ├── PromptError           a row that cannot be rendered; the others go on
    │   ├── RunFolderError        a run folder of another config, in use, or not writable
    │   └── MissingDependencyError  an optional package that the chosen feature needs
    ├── StorageError              the disk refused a write (full, removed, read-only)
    ├── EngineError               an engine could not go on with any request
    └── ServerError               a model's server did not answer a request; the others go on

A single request that fails raises nothing: its `Completion` has `finish_reason="error"` and
`error`.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = [
    "ConfigError",
    "DatasetError",
    "EngineError",
    "MissingDependencyError",
    "ModelError",
    "OptimalSamplingError",
    "PromptError",
    "RunFolderError",
    "ServedModelError",
    "ServerError",
    "StorageError",
    "TokenizerMismatchError",
    "UserError",
    "did_you_mean",
]


class OptimalSamplingError(Exception):
    """Base class. `exit_code` is what the command line returns."""

    exit_code = 1


class UserError(OptimalSamplingError):
    """Something the caller gave has to change; trying again as it is cannot help."""

    exit_code = 2


class ConfigError(UserError, ValueError):
    """An option has a value it cannot have. Also a ValueError, as Python callers expect."""


class ModelError(UserError):
    """A model could not be loaded, or is of a kind that would be sampled wrongly."""


class TokenizerMismatchError(UserError):
    """The two models' token ids do not mean the same."""


class DatasetError(UserError):
    """The dataset cannot be read as asked."""


class PromptError(UserError, ValueError):
    """One row makes no prompt. Its message is the reason that is recorded; the other rows go on."""


class RunFolderError(UserError):
    """The output folder cannot take this run."""


class MissingDependencyError(UserError, ImportError):
    """An optional package is needed. The message holds the pip command."""


class StorageError(OptimalSamplingError):
    """A record could not be written. Everything acknowledged before is safe on disk."""


class EngineError(OptimalSamplingError):
    """The engine cannot go on."""


class ServedModelError(EngineError):
    """No server of a model can be used any more: all refuse requests, or have another model."""


class ServerError(OptimalSamplingError):
    """A model's server did not answer a request, after all retries. No key stands in its text."""

    def __init__(self, message: str, kind: str = "other") -> None:
        super().__init__(message)
        self.kind = kind
        """What went wrong, for counting: `connect`, `timeout`, `status 500`, `malformed` ..."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`; did you mean 'X'?` for the known name nearest to an unknown one, "" if none is near."""
    near = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {near[0]!r}?" if near else ""
