"""Rows of JSON files: one object per line (JSONL), or a list of objects; also compressed."""

from __future__ import annotations

import bz2
import codecs
import gzip
import io
import json
import lzma
import re
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from optimal_sampling.errors import DatasetError

__all__ = ["JSON_SUFFIXES", "is_json", "read_json"]

JSON_SUFFIXES = (".jsonl", ".ndjson", ".json")
_BOM = b"\xef\xbb\xbf"
_CHUNK = 1 << 16  # bytes of a list read at a time


def _open_zstd(path: Path, mode: str) -> io.BufferedReader:
    import pyarrow  # takes a second

    return io.BufferedReader(pyarrow.input_stream(path, compression="zstd"))


_OPENERS: dict[str, Callable[[Path, str], Any]] = {
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
    ".zst": _open_zstd,
}
"""How files of each compression are opened, by the end of their names."""

_UNREADABLE = (
    OSError,
    EOFError,
    UnicodeDecodeError,
    zlib.error,
    lzma.LZMAError,
)


def is_json(name: str) -> bool:
    """Whether a file has the name of a JSON file, compressed or not."""
    stem = name.lower()
    for suffix in _OPENERS:
        stem = stem.removesuffix(suffix)
    return stem.endswith(JSON_SUFFIXES)


def read_json(path: Path, chunk: int = _CHUNK) -> Iterator[dict[str, Any]]:
    """The rows of a file, one in memory at a time. Raises DatasetError.

    A file that begins with `[` is a list of objects, whatever its name, and is read `chunk`
    bytes at a time; others have one object per line.
    """
    opener = _OPENERS.get(path.suffix.lower(), open)
    try:
        with opener(path, "rb") as file:
            is_list = _first_byte(file) == b"["
        with opener(path, "rb") as file:
            yield from _list_rows(path, file, chunk) if is_list else _line_rows(path, file)
    except _UNREADABLE as error:
        reason = getattr(error, "strerror", None) or error
        raise DatasetError(f"cannot read dataset {path}: {reason}") from error


def _first_byte(file: BinaryIO) -> bytes:
    """The first byte that is neither a space nor part of a byte order mark; none at the end."""
    byte = file.read(1)
    while byte and (byte.isspace() or byte in _BOM):
        byte = file.read(1)
    return byte


def _line_rows(path: Path, file: BinaryIO) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(file, start=1):
        if number == 1:
            line = line.removeprefix(_BOM)
        if line.strip():
            yield _parsed_line(path, number, line)


def _parsed_line(path: Path, number: int, line: bytes) -> dict[str, Any]:
    place = f"dataset {path} is not JSON at line {number}"
    try:
        row = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise DatasetError(f"{place}, byte {error.start + 1}: not UTF-8") from None
    except json.JSONDecodeError as error:
        message = f"{place}, column {error.pos + 1}: {error.msg}"
        if line.strip() == b"{":
            message += "; an object over several lines? Give a list, or one object per line (JSONL)"
        raise DatasetError(message) from None
    except (RecursionError, ValueError) as error:
        _refuse(place, error)
    return _object(row, f"dataset {path}, line {number}, column 1")


def _list_rows(path: Path, file: BinaryIO, chunk: int) -> Iterator[dict[str, Any]]:
    """The objects of a list, each parsed as soon as it has been read whole."""
    to_text = codecs.getincrementaldecoder("utf-8-sig")()
    text, line, index, is_whole = "", 1, 0, False
    while not (is_whole and _LIST_END.fullmatch(text)):
        place, item = f"dataset {path} is not JSON at line", f"item {index} of the list"
        try:
            row, end = _next_item(text, _COMMA if index else _LIST_START)
        except json.JSONDecodeError as error:
            if is_whole or not _may_be_cut(text, error):
                raise DatasetError(
                    f"{place} {line + error.lineno - 1}, {item}: {error.msg}"
                ) from None
            data = file.read(max(chunk, len(text)))
            text += to_text.decode(data, final=not data)
            is_whole = not data
        except (RecursionError, ValueError) as error:
            _refuse(f"{place} {line}, {item}", error)
        else:
            yield _object(row, f"dataset {path}, {item}")
            line += text.count("\n", 0, end)
            text, index = text[end:], index + 1


_LIST_START, _COMMA = re.compile(r"\s*\[\s*"), re.compile(r"\s*,\s*")
_LIST_END = re.compile(r"\s*(\[\s*)?\]\s*")


def _next_item(text: str, before: re.Pattern[str]) -> tuple[Any, int]:
    """The value after a bracket or comma, and where it ends. Raises JSONDecodeError."""
    start = before.match(text)
    if start is None:
        raise json.JSONDecodeError("Expecting ','", text, len(text) - len(text.lstrip()))
    return json.JSONDecoder().raw_decode(text, start.end())


def _may_be_cut(text: str, error: json.JSONDecodeError) -> bool:
    """Whether a text only stops too early: it is wrong at its end, or from a quote on."""
    return error.pos > len(text.rstrip()) - 16 or error.msg.startswith("Unterminated")


def _refuse(place: str, error: Exception) -> NoReturn:
    """Raise DatasetError for JSON that Python cannot hold, such as a number of 5000 digits."""
    reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)
    raise DatasetError(f"{place}: {reason}") from None


def _object(value: Any, place: str) -> dict[str, Any]:
    if isinstance(value, dict):
        return value
    names = {
        list: "an array",
        str: "a string",
        bool: "a boolean",
        int: "a number",
        float: "a number",
    }
    kind = names.get(type(value), "null")
    raise DatasetError(f"{place}: expected an object {{...}}, found {kind}")
