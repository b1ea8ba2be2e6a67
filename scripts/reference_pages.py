"""Writes docs/cli.md and docs/api.md from the options classes and the docstrings.

`python scripts/reference_pages.py` writes both; a test compares them with the code.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import itertools
import re
import textwrap
from collections.abc import Iterator
from dataclasses import MISSING, Field, fields, is_dataclass
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args, get_origin, get_type_hints
from unittest import mock

import tyro

from optimal_sampling import cli
from optimal_sampling.bench.subcommands import SUBCOMMANDS
from optimal_sampling.config import ENGINES, EngineOptions

DOCS = Path(__file__).parents[1] / "docs"

MODULES = {
    "optimal_sampling": "The package",
    "optimal_sampling.records": "Records",
    "optimal_sampling.errors": "Errors",
}
"""Modules of the API reference, whose `__all__` is listed whole."""

NOTE = "<!-- Written by scripts/reference_pages.py from the code. -->"
_TYPES = {int: "INT", float: "FLOAT", str: "TEXT"}


class _Asked(Exception):
    """What a command asks tyro for."""


def options_of(command: str, *arguments: str) -> tuple[type, Any]:
    """Class and defaults of a command's options, as the command line itself asks for them."""

    def ask(kind: type, default: Any = None, **_: Any) -> None:
        raise _Asked(kind, kind() if default is None and command != "sft" else default)

    with mock.patch.object(tyro, "cli", ask):
        try:
            cli.COMMANDS[command][1](arguments)
        except _Asked as asked:
            return asked.args[0], asked.args[1]
    raise ValueError(f"the command {command} has no options")


def field_texts(kind: type) -> dict[str, str]:
    """The docstring under each field of a class and of its bases."""
    texts: dict[str, str] = {}
    for base in reversed(kind.__mro__):
        if base is object or base.__module__ == "builtins":
            continue
        body = ast.parse(textwrap.dedent(inspect.getsource(base))).body[0].body
        for entry, after in itertools.pairwise(body):
            is_text = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
            if isinstance(entry, ast.AnnAssign) and is_text:
                texts[entry.target.id] = inspect.cleandoc(after.value.value)
    return texts


# The command line

CLI_HEAD = """Every command and option. `optimal-sampling COMMAND --help` prints the same, with
examples. Underscores and hyphens are the same in option names."""

BENCH_HEAD = """One table each; `optimal-sampling bench` alone is `bench speed`.
[performance.md](performance.md) has their figures."""


def cli_page() -> str:
    """docs/cli.md."""
    parts = [
        "# Command line",
        NOTE,
        CLI_HEAD,
        "\n".join(f"- [`{name}`](#{name}): {text}" for name, (text, _) in cli.COMMANDS.items()),
        "```text\n" + cli.EXIT_CODES + "\n```",
    ]
    for name in cli.COMMANDS:
        parts += [f"## {name}", *_command(name)]
    return "\n\n".join(parts) + "\n"


def _command(name: str) -> Iterator[str]:
    if name == "bench":
        yield BENCH_HEAD
        for each in SUBCOMMANDS.values():
            yield f"### bench {each.name}"
            yield inspect.getdoc(each) or ""
            yield from _tables(each, each())
        return
    kind, default = options_of(name)
    yield inspect.getdoc(kind) or ""
    yield from _tables(kind, default)
    if name == "generate":
        for engine in list(ENGINES.values())[1:]:
            yield f"With `--engine {engine.name}`, in place of the options of `local`:"
            yield _table(engine, engine())
        aliases = ", ".join(f"`--{a}` = `--{b}`" for a, b in cli.ALIASES.items())
        yield f"Other spellings: {aliases}. Accepted without effect: " + ", ".join(
            f"`--{each}`" for each in cli.NO_OPS
        )


def _tables(kind: type, default: Any) -> Iterator[str]:
    """The options of a class, then those of its sections."""
    own = _table(kind, default)
    if own:
        yield own
    for item in fields(kind):
        section = getattr(default, item.name, None)
        if is_dataclass(section) and not isinstance(section, type):
            yield f"**{_first_line(section)}**"
            yield _table(type(section), section)


def _table(kind: type, default: Any) -> str:
    texts = field_texts(kind)
    hints = get_type_hints(kind, include_extras=True)
    rows = []
    for item in fields(kind):
        value = getattr(default, item.name, item.default)
        hint = hints[item.name]
        if is_dataclass(value) or _marked(hint, tyro.conf.Suppress):
            continue
        flag = _flag(item, hint, value)
        rows.append(f"| {flag} | {_default(value)} | {_cell(texts.get(item.name, ''))} |")
    return "\n".join(["| option | default | meaning |", "|---|---|---|", *rows]) if rows else ""


def _flag(item: Field[Any], hint: Any, value: Any) -> str:
    """The option as it is typed."""
    kinds = _kinds(hint)
    if _marked(hint, tyro.conf.Positional):
        return f"`{item.name.upper()}…`"
    given = [getattr(each, "name", None) for each in getattr(hint, "__metadata__", ())]
    name = next((each for each in given if each), item.name).replace("_", "-")
    if kinds == [bool]:
        return f"`--{name}`, `--no-{name}`" if value else f"`--{name}`"
    words = [_word(kind) for kind in kinds if kind is not NoneType]
    return f"`--{name} {_escape('/'.join(dict.fromkeys(words)))}`"


def _word(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return "/".join(map(str, get_args(kind)))
    if get_origin(kind) is tuple:
        return f"{_word(get_args(kind)[0])} …"
    return "true/false" if kind is bool else _TYPES.get(kind, getattr(kind, "__name__", "TEXT"))


def _kinds(hint: Any) -> list[Any]:
    """The types of a hint, without what is written around them."""
    if hasattr(hint, "__metadata__"):
        return _kinds(hint.__origin__)
    is_union = get_origin(hint) is not None and NoneType in get_args(hint)
    if is_union or type(hint).__name__ in ("UnionType", "_UnionGenericAlias"):
        return [kind for each in get_args(hint) for kind in _kinds(each)]
    return [hint]


def _marked(hint: Any, marker: Any) -> bool:
    wanted = getattr(marker, "__metadata__", None) or (marker,)
    return any(each in getattr(hint, "__metadata__", ()) for each in wanted)


def _default(value: Any) -> str:
    if value is None or value in ("", ()) or value is MISSING:
        return ""
    if isinstance(value, bool):
        return "on" if value else "off"
    shown = " ".join(map(str, value)) if isinstance(value, tuple) else str(value)
    return f"`{_escape(shown)}`"


def _cell(text: str) -> str:
    return _escape(" ".join(text.split()))


def _escape(text: str) -> str:
    return text.replace("|", "\\|")


def _first_line(value: Any) -> str:
    first = (inspect.getdoc(type(value)) or "").partition("\n\n")[0]
    return " ".join(first.split()).rstrip(".").replace("*", "\\*")


# Python


def api_page() -> str:
    """docs/api.md."""
    parts = ["# Python API", NOTE, API_HEAD]
    for module, title in MODULES.items():
        parts += [f"## {title}", f"`{module}`"]
        loaded = importlib.import_module(module)
        for name in sorted(loaded.__all__):
            parts += _entry(name, getattr(loaded, name))
    return "\n\n".join(parts) + "\n"


API_HEAD = """Examples are in the [README](../README.md#from-python) and in `examples/`. Options are
those of the [command line](cli.md), under the same names. An extension of the package (a method, an
engine, a grader) is written as [CONTRIBUTING.md](../CONTRIBUTING.md) says."""


def _entry(name: str, value: Any) -> list[str]:
    if get_origin(value) is Literal:
        return [f"### {name}", "One of " + ", ".join(f"`{each}`" for each in get_args(value)) + "."]
    if not callable(value):
        return [f"### {name}", _plain(value)]
    parts = [f"### {name}"]
    is_error = isinstance(value, type) and issubclass(value, BaseException)
    if not is_error and not _is_options(value) and not _is_dictionary(value):
        parts.append(f"```text\n{_signature(name, value)}\n```")
    parts.append(inspect.getdoc(value) or "")
    if isinstance(value, type) and not is_error:
        parts += _members(value)
    return parts


def _plain(value: Any) -> str:
    return f"A `{type(value).__name__}`."


def _is_options(value: Any) -> bool:
    return is_dataclass(value) and value.__module__ == EngineOptions.__module__


def _is_dictionary(value: Any) -> bool:
    return isinstance(value, type) and issubclass(value, dict)


def _members(kind: type) -> Iterator[str]:
    """Fields and public methods of a class."""
    if _is_options(kind):
        names = ", ".join(f"`{item.name}`" for item in fields(kind))
        yield f"Its sections, as fields: {names}. [cli.md](cli.md#generate) lists their options."
        return
    if is_dataclass(kind):
        texts = field_texts(kind)
        rows = [f"| `{item.name}` | {_cell(texts.get(item.name, ''))} |" for item in fields(kind)]
        yield "\n".join(["| field | meaning |", "|---|---|", *rows])
    for name, method in inspect.getmembers(kind, inspect.isfunction):
        if not name.startswith("_"):
            yield f"**`{kind.__name__}.{name}`**"
            yield f"```text\n{_signature(name, method)}\n```"
            yield inspect.getdoc(method) or ""


def _signature(name: str, value: Any) -> str:
    """The call, one parameter a line where it is long."""
    signature = inspect.signature(value)
    kept = [each for key, each in signature.parameters.items() if key != "self"]
    parameters = list(_with_stars(kept))
    result = signature.return_annotation
    has_result = not isinstance(value, type) and result not in (
        "None",
        None,
        inspect.Signature.empty,
    )
    end = ")" + (f" -> {inspect.formatannotation(result)}" if has_result else "")
    whole = _unquoted(f"{name}({', '.join(parameters)}{end}")
    if len(whole) <= 90:
        return whole
    return _unquoted("\n".join([f"{name}(", *(f"    {each}," for each in parameters), end]))


def _unquoted(text: str) -> str:
    """Annotations without the quotes that a postponed one has."""
    for quote in "'\"":
        inside = rf"{quote}([^{quote}]*){quote}"
        text = re.sub(rf"(: |\*\*kwargs: |-> ){inside}(?= = |,|\)|\n|$)", r"\1\2", text)
    return text.replace("typing.", "")


def _with_stars(parameters: list[inspect.Parameter]) -> Iterator[str]:
    keyword_only = False
    for each in parameters:
        if each.kind is each.KEYWORD_ONLY and not keyword_only:
            keyword_only = True
            yield "*"
        yield str(each)


if __name__ == "__main__":
    for name, page in (("cli.md", cli_page()), ("api.md", api_page())):
        (DOCS / name).write_text(page, "utf-8")
        print(DOCS / name)
