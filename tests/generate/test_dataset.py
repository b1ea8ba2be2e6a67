"""Where rows come from, and what is said about those that cannot be read."""

from __future__ import annotations

import json
import sys
import types

import pyarrow
import pyarrow.parquet
import pytest

from optimal_sampling.config import DataConfig, RunConfig
from optimal_sampling.errors import DatasetError, MissingDependencyError
from optimal_sampling.generate.dataset import open_dataset

ROWS = [{"problem": f"What is {n}?", "answer": str(n)} for n in range(10)]


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read(dataset, **options):
    return list(open_dataset(DataConfig(dataset=str(dataset), **options), seed=0))


def test_a_folder_named_tilde_is_no_home(tmp_path, monkeypatch):
    """Guards: `./~/rows.jsonl` looked for in the home folder, where the output folder is not."""
    (tmp_path / "~").mkdir()
    write_jsonl(tmp_path / "~" / "rows.jsonl", ROWS)
    monkeypatch.chdir(tmp_path)
    assert len(read("./~/rows.jsonl")) == len(ROWS)
    assert RunConfig(output_dir="./~/run").output_dir == str(tmp_path / "~" / "run")


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
            "no column text; it has: problem, answer. Call the one with the prompt",
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
    with pytest.raises(DatasetError, match=r"ending of no known kind: JSONL, .* or Parquet"):
        read(tmp_path / "rows.csv")
    with pytest.raises(DatasetError, match="a folder without files of the kinds JSONL"):
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


class HubTable:
    """The parts of `datasets.Dataset` that are used."""

    def __init__(self, rows):
        self.table = pyarrow.Table.from_pylist(rows)
        self.column_names = self.table.column_names

    def __len__(self):
        return len(self.table)

    def with_format(self, kind):
        assert kind == "arrow"
        return self

    def iter(self, batch_size):
        return map(pyarrow.Table.from_batches, ([each] for each in self.table.to_batches(3)))


DATASET = sys.modules[open_dataset.__module__]
"""The module: as a name, `optimal_sampling.generate` is a function."""
HUB = {
    ("owner/name", None, None): {"train": ROWS, "test": ROWS[:1]},
    ("owner/only-test", None, None): {"test": ROWS[2:]},
    ("owner/two", None, None): {"a": ROWS, "b": ROWS},
    ("owner/subsets", "main", None): {"train": ROWS[3:]},
    ("owner/name", None, "v2"): {"train": ROWS[4:]},
}
"""Splits by name, subset and revision."""


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A stand-in: tests have no network."""

    def splits_of(name, subset, revision):
        if name == "owner/subsets" and subset is None:
            raise ValueError("Config name is missing.\nPlease pick one among: ['main']")
        if (name, subset, revision) not in HUB:
            raise FileNotFoundError("no such dataset")
        return HUB[name, subset, revision]

    monkeypatch.setattr(DATASET, "hub_problem", lambda: "")
    module = types.SimpleNamespace(
        config=types.SimpleNamespace(HF_DATASETS_CACHE=tmp_path),
        get_dataset_split_names=lambda name, subset, revision: [*splits_of(name, subset, revision)],
        load_dataset=lambda name, subset, split, revision: HubTable(
            splits_of(name, subset, revision)[split]
        ),
    )
    monkeypatch.setitem(sys.modules, "datasets", module)


@pytest.mark.parametrize(
    ("name", "options", "rows"),
    [
        ("owner/name", {"num_examples": 3}, ROWS[:3]),
        ("owner/name", {"split": "test"}, ROWS[:1]),
        ("owner/only-test", {}, ROWS[2:]),
        ("owner/subsets", {"subset": "main"}, ROWS[3:]),
        ("owner/name", {"revision": "v2"}, ROWS[4:]),
    ],
)
def test_splits_subsets_and_revisions_of_the_hub(hub, name, options, rows):
    """Guards: a hub dataset that is read differently from a file, or only where it has `train` and
    no subsets (gsm8k has no default subset, MATH-500 has only `test`).
    """
    assert read(name, **options) == list(enumerate(rows))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("owner/other", "cannot load 'owner/other'.*no such dataset"),
        ("owner/two", "has several splits: a, b; choose one with --split"),
        ("owner/subsets", r"Please pick one among: \['main'\] \(choose one with --subset\)"),
    ],
)
def test_what_the_hub_does_not_have(hub, name, message):
    """Guards: a message that does not say which option is missing."""
    with pytest.raises(DatasetError, match=message):
        read(name)


def test_a_hub_out_of_reach_is_said_at_once(hub, monkeypatch, tmp_path):
    """Guards: half a minute of retries for a mistyped path, where no network is; and a dataset that
    was downloaded before, which needs none."""
    monkeypatch.setattr(DATASET, "hub_problem", lambda: "no host h")
    with pytest.raises(DatasetError, match="nothing of that name was downloaded before, and no ho"):
        read("owner/name")
    (tmp_path / "owner___name").mkdir()
    assert read("owner/name") == list(enumerate(ROWS))


SNAPSHOT = {
    "README.md": "",
    ".gitattributes": "",
    "dataset_infos.json": "{}",
    "main/train-00000-of-00002.parquet": ROWS[:2],
    "main/train-00001-of-00002.parquet": ROWS[2:4],
    "main/._train-00000-of-00002.parquet": "resource fork",
    "main/test-00000-of-00001.parquet": ROWS[4:5],
    "socratic/train-00000-of-00001.parquet": ROWS[5:],
    ".cache/huggingface/download/x.parquet": "half a file",
}
SPLIT_BY_NAME = {"math_train.jsonl": ROWS[:3], "math_test.jsonl": ROWS[3:], "dataset_info.json": ""}


def write_folder(folder, files):
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, str):
            path.write_text(content)
        elif name.endswith(".parquet"):
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(content), path)
        else:
            write_jsonl(path, content)


@pytest.mark.parametrize(
    ("files", "options", "rows"),
    [
        (SNAPSHOT, {"subset": "main", "split": "train"}, ROWS[:4]),
        (SNAPSHOT, {"subset": "main", "split": "test"}, ROWS[4:5]),
        (SNAPSHOT, {"subset": "socratic"}, ROWS[5:]),
        (SNAPSHOT, {"subset": "all", "split": "train"}, ROWS[:4] + ROWS[5:]),
        (SPLIT_BY_NAME, {"split": "test"}, ROWS[3:]),
        (SPLIT_BY_NAME, {"split": "all"}, ROWS[3:] + ROWS[:3]),
        ({"data/train-00000-of-00001.parquet": ROWS}, {}, ROWS),
        ({"data/train-00000-of-00001.parquet": ROWS}, {"split": "train"}, ROWS),
        ({"train_sft-00000-of-00001.parquet": ROWS, "x.jsonl": ROWS[:1]}, {}, ROWS + ROWS[:1]),
        (
            {"a/validation/x.jsonl": ROWS, "a/train/x.jsonl": ROWS[:1]},
            {"split": "validation"},
            ROWS,
        ),
        ({"rows.jsonl": ROWS, "old/rows.jsonl": ROWS}, {}, ROWS),
        ({"test_cases.jsonl": ROWS[:5], "more.jsonl": ROWS[5:]}, {}, ROWS[5:] + ROWS[:5]),
        ({"._a.jsonl": "\x00", "a.jsonl": ROWS, "state.json": "{}"}, {}, ROWS),
        ({"a.jsonl": "", "b.jsonl": ROWS}, {}, ROWS),
    ],
)
def test_the_files_of_a_folder(tmp_path, files, options, rows):
    """Guards: data of a downloaded snapshot that is not found, and other files read as data."""
    write_folder(tmp_path, files)
    assert [row for _, row in read(tmp_path, **options)] == rows


@pytest.mark.parametrize(
    ("files", "options", "message"),
    [
        (SPLIT_BY_NAME, {}, "several splits: test, train; choose one with --split"),
        (SPLIT_BY_NAME, {"split": "dev"}, "no split 'dev'; it has: test, train"),
        (SNAPSHOT, {}, "several subsets: main, socratic; choose one with --subset"),
        (SNAPSHOT, {"subset": "main"}, "several splits: test, train; choose one with --split"),
        (SNAPSHOT, {"subset": "x"}, "no subset 'x'; it has: main, socratic"),
        (SPLIT_BY_NAME, {"revision": "v1"}, "has no revisions; leave --revision out"),
        ({"data.csv": "", "state.json": ""}, {}, "folder without files of the kinds JSONL"),
    ],
)
def test_a_folder_that_does_not_say_what_is_meant(tmp_path, files, options, message):
    """Guards: training on the test split because it lies in the same folder."""
    write_folder(tmp_path, files)
    with pytest.raises(DatasetError, match=message):
        read(tmp_path, **options)


@pytest.mark.parametrize("option", ["split", "subset", "revision"])
def test_options_without_a_meaning_are_refused(tmp_path, option):
    """Guards: `--split test` of one file that silently reads all of it."""
    for dataset in (write_jsonl(tmp_path / "rows.jsonl", ROWS), "synthetic"):
        with pytest.raises(DatasetError, match=f"leave --{option} out"):
            read(dataset, **{option: "test"})


@pytest.mark.parametrize("order", [1, -1])
def test_the_first_row_does_not_decide_the_columns(tmp_path, order):
    """Guards: a first row without a column that makes the whole dataset have none, or one odd row
    that chooses the prompt column for all.
    """
    rows = [{"problem": "odd", "id": 1}, *({"question": f"{n}", "answer": "x"} for n in range(5))]
    path = write_jsonl(tmp_path / "rows.jsonl", rows[::order])
    dataset = open_dataset(DataConfig(dataset=str(path), answer_column="answer"), seed=0)
    assert dataset.prompt_column == "question"
    assert {*dataset.columns} == {"problem", "id", "question", "answer"}
    first = open_dataset(DataConfig(dataset=str(path), num_examples=1), seed=0)
    assert {*first.columns} == {*rows[::order][0]}


def test_rows_with_the_one_that_follows(tmp_path):
    """Guards: a neighbour that depends on the data slice, and a last row without one."""
    path = write_jsonl(tmp_path / "rows.jsonl", ROWS)
    whole = open_dataset(DataConfig(dataset=str(path)), seed=0)
    pairs = {index: (row, following) for index, row, following in whole.with_following()}
    assert pairs == {n: (ROWS[n], ROWS[(n + 1) % 10]) for n in range(10)}
    config = DataConfig(dataset=str(path), num_examples=5, data_slice="1::3")
    part = open_dataset(config, seed=0).with_following()
    assert list(part) == [(n, *pairs[n]) for n in (1, 4)]
    one = write_jsonl(tmp_path / "one.jsonl", ROWS[:1])
    alone = open_dataset(DataConfig(dataset=str(one)), seed=0)
    assert list(alone.with_following()) == [(0, ROWS[0], None)]
