"""A small teacher and two small students that ship with the package, and their training problems.

Every command can be tried with them without a download. Importing this loads no torch.
"""

from importlib.resources import files
from pathlib import Path

NAMES = {
    "toy-teacher": "teacher",
    "toy-student": "student",
    "toy-number-student": "number-student",
}
"""Folders of the models. The last one has a tokenizer of its own, with numbers as tokens."""


def path(name: str) -> Path:
    """The folder of a shipped model, by one of NAMES."""
    if name not in NAMES:
        raise KeyError(f"no shipped model is called {name!r}; there are {', '.join(NAMES)}")
    return Path(str(files(__name__))) / NAMES[name]
