"""Where rows come from, and what is said about those that cannot be read."""

from __future__ import annotations

import json
import sys
import types

import pyarrow
import pyarrow.parquet
import pytest

from optimal_sampling.config import DataConfig
from optimal_sampling.errors import DatasetError, MissingDependencyError
from optimal_sampling.generate.dataset import open_dataset

ROWS = [{"problem": f"What is {n}?", "answer": str(n)} for n in range(10)]


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read(dataset, **options):
    return list(open_dataset(DataConfig(dataset=str(dataset), **options), seed=0))


def test_jsonl_and_parquet_give_the_same_rows(tmp_path):
    """Guards: a reader that loses the last row, or types a column differently."""
    jsonl = write_jsonl(tmp_path / "rows.jsonl", ROWS)
    parquet = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), parquet)
    assert read(jsonl) == read(parquet) == list(enumerate(ROWS))


def test_a_folder_is_its_files_in_order(tmp_path):
    """Guards: the order of the file system, and counting rows of one file only."""
    write_jsonl(tmp_path / "b.jsonl", ROWS[4:])
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS[:4]), tmp_path / "a.parquet")
    (tmp_path / "README.md").write_text("not data")
    assert read(tmp_path) == list(enumerate(ROWS))
    assert read(tmp_path, num_examples=5) == list(enumerate(ROWS))[:5]


@pytest.mark.parametrize("part", ["0::3", "1::3", "2:5", ":4:2", "0:99"])
def test_num_examples_then_slice(tmp_path, part):
    """Guards: slicing before limiting, which gives shards that overlap or leave rows out."""
    path = write_jsonl(tmp_path / "rows.jsonl", ROWS)
    expected = list(enumerate(ROWS))[:7][slice(*(int(n) if n else None for n in part.split(":")))]
    dataset = open_dataset(DataConfig(dataset=str(path), num_examples=7, data_slice=part), seed=0)
    assert list(dataset) == expected
    assert len(dataset) == len(expected)
    assert list(dataset) == expected  # a second time


def test_synthetic():
    """Guards: problems that depend on how many are asked for, which would make a longer run another
    run.
    """
    assert len(open_dataset(DataConfig(), seed=0)) == 100
    assert read("synthetic", num_examples=5) == read("synthetic", num_examples=9)[:5]
    assert {"problem", "answer", "solution"} <= read("synthetic")[0][1].keys()


@pytest.mark.parametrize(
    ("columns", "chosen"),
    [
        (("answer", "question"), "question"),
        (("prompt", "problem"), "problem"),
        (("messages", "id"), "messages"),
    ],
)
def test_the_prompt_column_is_guessed(tmp_path, columns, chosen):
    """Guards: a guess that depends on the order of the columns."""
    path = write_jsonl(tmp_path / "rows.jsonl", [dict.fromkeys(columns, "x")])
    assert open_dataset(DataConfig(dataset=str(path)), seed=0).prompt_column == chosen


def test_blank_lines_bom_and_windows_line_ends(tmp_path):
    """Guards: refusing what an editor has touched."""
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"problem":"a"}\r\n\r\n{"problem":"b"}\r\n')
    assert [row["problem"] for _, row in read(path)] == ["a", "b"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            b'{"problem": "a"}\n{"problem": b}\n',
            r"rows\.jsonl is not JSON at line 2, column 13: Expecting value",
        ),
        (b'{"problem": "a"}\n{"problem": "b', r"rows\.jsonl is not JSON at line 2, column 13"),
        (
            b'{"problem": "a"}\n\n["b"]\n',
            r"rows\.jsonl, line 3, column 1: expected an object \{\.\.\.\}, found an array",
        ),
        (b'{"problem": "\xff"}\n', r"rows\.jsonl is not JSON at line 1, byte 14: not UTF-8"),
        (b"[" * 100_000, r"rows\.jsonl is not JSON at line 1"),
        (b"", "is empty"),
        (b"\n \n", "is empty"),
        (
            b'{"text": "a", "label": 1}\n',
            "no column problem or question or prompt or messages; it has: text, label",
        ),
    ],
)
def test_bad_jsonl(tmp_path, content, message):
    """Guards: a traceback, or a message that does not say where to look."""
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    with pytest.raises(DatasetError, match=message):
        read(path)


def test_a_bad_line_beyond_what_was_asked_for_is_not_read(tmp_path):
    """Guards: reading a huge file to its end for ten rows of it."""
    path = write_jsonl(tmp_path / "rows.jsonl", ROWS)
    path.write_text(path.read_text() + "oops\n")
    assert len(read(path, num_examples=10)) == 10
    with pytest.raises(DatasetError, match="line 11"):
        read(path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"prompt_column": "text"},
            "no column text; it has: problem, answer. Name the one with the prompt",
        ),
        ({"answer_column": "gold"}, "no column gold; it has: problem, answer"),
        ({"data_slice": "10::2"}, "the data slice 10::2 takes none of the 10 rows"),
    ],
)
def test_bad_options(tmp_path, options, message):
    """Guards: a run of no rows that reports success."""
    path = write_jsonl(tmp_path / "rows.jsonl", ROWS)
    with pytest.raises(DatasetError, match=message):
        read(path, **options)


@pytest.mark.parametrize(
    "name", ["missing.jsonl", "./missing", "a/b/c", "/missing", "~/missing-folder"]
)
def test_a_missing_file(name):
    """Guards: looking a mistyped path up on the hub."""
    with pytest.raises(DatasetError, match="does not exist"):
        read(name)


def test_other_files(tmp_path):
    """Guards: reading a CSV as JSON, a text file as Parquet, an empty folder as no rows."""
    (tmp_path / "rows.csv").write_text("problem\nx\n")
    with pytest.raises(DatasetError, match=r"neither JSONL .* nor Parquet"):
        read(tmp_path / "rows.csv")
    with pytest.raises(DatasetError, match="a folder without JSONL or Parquet"):
        read(tmp_path)
    (tmp_path / "rows.parquet").write_text("PAR1 it is not")
    with pytest.raises(DatasetError, match="as Parquet"):
        read(tmp_path / "rows.parquet")


def test_the_hub_needs_its_extra(monkeypatch):
    """Guards: an ImportError, and a message that hides that a file of that name is missing."""
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(
        MissingDependencyError, match=r"no file or folder 'owner/name'.*pip install 'datasets>=4'"
    ):
        read("owner/name")


def test_the_hub(monkeypatch):
    """Guards: a hub dataset that is read differently from a file. (A stand-in: tests have no
    network.)
    """

    class Table(list):
        column_names = ("problem", "answer")

    def load_dataset(name, split):
        assert split == "train"
        if name != "owner/name":
            raise FileNotFoundError("no such dataset")
        return Table(ROWS)

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    assert read("owner/name", num_examples=3) == list(enumerate(ROWS))[:3]
    with pytest.raises(DatasetError, match=r"cannot load 'owner/other'.*no such dataset"):
        read("owner/other")
