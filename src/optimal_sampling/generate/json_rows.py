"""Rows of JSON files: one object per line (JSONL), or a list of objects; also compressed."""

from __future__ import annotations

import bz2
import codecs
import gzip
import io
import json
import lzma
import zlib
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

import pyarrow

from optimal_sampling.errors import DatasetError

__all__ = ["JSON_SUFFIXES", "is_json", "read_json"]

JSON_SUFFIXES = (".jsonl", ".ndjson", ".json")
_BOM = b"\xef\xbb\xbf"
_CHUNK = 1 << 16  # bytes of a list read at a time


def _open_zstd(path: Path, mode: str) -> io.BufferedReader:
    return io.BufferedReader(pyarrow.input_stream(path, compression="zstd"))


_OPENERS: dict[str, Callable[[Path, str], Any]] = {
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
    ".zst": _open_zstd,
}
"""How files of each compression are opened, by the end of their names."""


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
    except (OSError, EOFError, zlib.error, lzma.LZMAError, pyarrow.ArrowException) as error:
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
    decode = json.JSONDecoder().raw_decode
    text = _Text(path, file, chunk)
    text.skip("[")
    for index in count():
        if text.next() == "]":
            break
        if index:
            text.skip(",")
        text.next()
        yield _object(text.take(decode), f"dataset {path}, item {index} of the list")
    text.skip("]")
    if text.next():
        text.fail("text after the list")


class _Text:
    """The text of a file, of which a part is in memory, and a place in it."""

    def __init__(self, path: Path, file: BinaryIO, chunk: int) -> None:
        self._path = path
        self._chunk = chunk
        self._file = file
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self._buffer = ""
        self._place = 0
        self._line = 1
        """Number of the line in which the buffer starts."""
        self._column = 0
        """Characters of that line before the buffer."""

    def next(self) -> str:
        """The next character that is no space; empty at the end of the file."""
        while True:
            rest = self._buffer[self._place : self._place + 1]
            if rest and not rest.isspace():
                return rest
            if rest:
                self._place += 1
            elif not self._read(self._chunk):
                return ""

    def skip(self, character: str) -> None:
        """Go past the next character that is no space. Raises DatasetError for another one."""
        if self.next() != character:
            self.fail(f"Expecting '{character}'")
        self._place += 1

    def take(self, decode: Callable[[str, int], tuple[Any, int]]) -> Any:
        """The value that starts here, and go past it. Raises DatasetError."""
        while True:
            try:
                value, self._place = decode(self._buffer, self._place)
            except json.JSONDecodeError as error:
                # A text that stops early is wrong at its end, or from the start of a string on.
                is_cut = error.pos > len(self._buffer) - 16 or error.msg.startswith("Unterminated")
                offset = error.pos - self._place
                rest = len(self._buffer) - self._place
                if not is_cut or not self._read(max(self._chunk, rest)):
                    self._place += offset
                    self.fail(error.msg)
            except (RecursionError, ValueError) as error:
                _refuse(f"dataset {self._path} is not JSON at line {self._line_here()}", error)
            else:
                return value

    def fail(self, reason: str) -> NoReturn:
        """Raise DatasetError for the text at this place."""
        place = f"line {self._line_here()}, column {self._column_here() + 1}"
        raise DatasetError(f"dataset {self._path} is not JSON at {place}: {reason}")

    def _line_here(self) -> int:
        return self._line + self._buffer.count("\n", 0, self._place)

    def _column_here(self) -> int:
        newline = self._buffer.rfind("\n", 0, self._place)
        return self._place - newline - 1 if newline >= 0 else self._column + self._place

    def _read(self, size: int) -> bool:
        """Read on, and drop what lies before the place; False at the end of the file."""
        data = self._file.read(size)
        try:
            more = self._decoder.decode(data, final=not data)
        except UnicodeDecodeError:
            self._place = len(self._buffer)
            self.fail("not UTF-8 soon after this place")
        self._line, self._column = self._line_here(), self._column_here()
        self._buffer = self._buffer[self._place :] + more
        self._place = 0
        return bool(data)


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
