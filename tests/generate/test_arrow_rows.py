"""Parquet files with values that Python, or this machine, cannot read."""

from __future__ import annotations

import datetime
import decimal
import json
import uuid
from dataclasses import replace

import pyarrow
import pyarrow.parquet
import pytest

from optimal_sampling.config import DataConfig, PromptConfig
from optimal_sampling.errors import DatasetError, PromptError
from optimal_sampling.generate import generate
from optimal_sampling.generate.arrow_rows import read_parquet, read_table
from optimal_sampling.generate.dataset import open_dataset
from optimal_sampling.records import load
from optimal_sampling.records.schema import jsonable
from optimal_sampling.types import Unreadable

TEXTS = ["1+1=?", "not \ud800UTF-8", "2+2=?"]
"""The second one is written as bytes that are no UTF-8."""


def bad_text(kind):
    """TEXTS as an array of a type of text, with no check of the bytes."""
    raw = pyarrow.array([text.encode("utf-8", "surrogatepass") for text in TEXTS], pyarrow.binary())
    if pyarrow.types.is_large_string(kind):
        raw = raw.cast(pyarrow.large_binary())
    return pyarrow.Array.from_buffers(kind, len(raw), raw.buffers())


def nested(array):
    """Forms in which a column of text is stored."""
    offsets = pyarrow.array([0, 1, 2, 3], pyarrow.int32())
    message = pyarrow.StructArray.from_arrays(
        [pyarrow.array(["user"] * 3), array], ["role", "content"]
    )
    return {
        "plain": array,
        "dictionary": array.dictionary_encode(),
        "list": pyarrow.ListArray.from_arrays(offsets, array),
        "struct": message,
        "messages": pyarrow.ListArray.from_arrays(offsets, message),
        "map": pyarrow.MapArray.from_arrays(offsets, pyarrow.array(["a", "b", "c"]), array),
    }


def write(path, **columns):
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    return path


def rows_of(path):
    return list(read_parquet(path))


@pytest.mark.parametrize("kind", [pyarrow.string(), pyarrow.large_string()])
@pytest.mark.parametrize("form", ["plain", "dictionary", "list", "struct", "messages", "map"])
def test_one_bad_text_leaves_the_others_as_they_are(tmp_path, kind, form):
    """Guards: invalid UTF-8 in one value that ends the run at the same row for ever."""
    good = pyarrow.array(["1+1=?", "x", "2+2=?"], kind)
    bad_rows = rows_of(write(tmp_path / "bad.parquet", value=nested(bad_text(kind))[form]))
    good_rows = rows_of(write(tmp_path / "good.parquet", value=nested(good)[form]))
    assert [bad_rows[0], bad_rows[2]] == [good_rows[0], good_rows[2]]
    with pytest.raises(PromptError, match="column 'value' is not UTF-8 at byte 5"):
        json.dumps(bad_rows[1], default=str)
    assert "not \\\\xed\\\\xa0\\\\x80UTF-8" in json.dumps(jsonable(bad_rows[1]))


FAR = 2**62
BAD = "no date"
TIMES = {
    "timestamp[ns]": (
        pyarrow.array([1_000, 1, None, 10**18], pyarrow.timestamp("ns")),
        [
            "1970-01-01 00:00:00.000001",
            "1970-01-01 00:00:00.000000001",
            None,
            "2001-09-09 01:46:40",
        ],
    ),
    "timestamp[ns] of a zone": (
        pyarrow.array([1_000, 1], pyarrow.timestamp("ns", "UTC")),
        ["1970-01-01 00:00:00.000001+00:00", "1970-01-01 00:00:00.000000001Z"],
    ),
    "far timestamp[s]": (
        pyarrow.array([0, 400_000_000_000, FAR, -FAR], pyarrow.timestamp("s")),
        ["1970-01-01 00:00:00", "14645-06-30 15:06:40", BAD, BAD],
    ),
    "far timestamp[us]": (pyarrow.array([FAR], pyarrow.timestamp("us")), [BAD]),
    "unknown zone": (pyarrow.array([0], pyarrow.timestamp("s", "Mars/Olympus")), [BAD]),
    "time64[ns]": (
        pyarrow.array([1_000, 1], pyarrow.time64("ns")),
        ["00:00:00.000001", "00:00:00.000000001"],
    ),
    "duration[ns]": (
        pyarrow.array([1_000, 1, FAR], pyarrow.duration("ns")),
        ["0:00:00.000001", "1 ns", f"{FAR} ns"],
    ),
    "far duration[s]": (pyarrow.array([60, FAR], pyarrow.duration("s")), ["0:01:00", f"{FAR} s"]),
    "far date32": (
        pyarrow.array([0, 2**31 - 1], pyarrow.int32()).cast(pyarrow.date32()),
        ["1970-01-01", BAD],
    ),
    "far date64": (pyarrow.array([86_400_000 * 10**8], pyarrow.date64()), [BAD]),
}
"""Arrays, and each value as a prompt shows it."""


@pytest.mark.parametrize("kind", TIMES)
@pytest.mark.parametrize("inside", [False, True])
def test_times_that_python_does_not_have(kind, inside):
    """Guards: nanoseconds and far dates that end the run, or are right only where pandas is."""
    array, texts = TIMES[kind]
    if inside:
        array = pyarrow.StructArray.from_arrays([array], ["inner"])
    rows = list(read_table(pyarrow.table({"value": array})))
    values = [row["value"]["inner"] if inside else row["value"] for row in rows]
    bad = [value for value in values if isinstance(value, Unreadable)]
    assert all(value.reason.startswith("column 'value' holds a ") for value in bad)
    shown = [BAD if value in bad else value and str(value) for value in values]
    assert shown == texts


EXACT = {
    "decimal": (pyarrow.array([decimal.Decimal("1.50")]), decimal.Decimal("1.50")),
    "null": (pyarrow.nulls(1), None),
    "large list": (pyarrow.array([[1]], pyarrow.large_list(pyarrow.int8())), [1]),
    "fixed list": (pyarrow.array([[1, 2]], pyarrow.list_(pyarrow.int8(), 2)), [1, 2]),
    "float16": (pyarrow.array([1.5], pyarrow.float16()), 1.5),
    "uint64": (pyarrow.array([2**64 - 1], pyarrow.uint64()), 2**64 - 1),
    "date": (pyarrow.array([datetime.date(2024, 2, 29)]), datetime.date(2024, 2, 29)),
    "binary": (pyarrow.array([b"\xff"]), b"\xff"),
    "image": (
        pyarrow.array([{"bytes": b"\x89PNG", "path": None}]),
        {"bytes": b"\x89PNG", "path": None},
    ),
    "uuid": (
        pyarrow.array([uuid.UUID(int=5).bytes], pyarrow.uuid()),
        uuid.UUID(int=5),
    ),
    "empty struct": (pyarrow.array([{}], pyarrow.struct([])), {}),
    "map": (
        pyarrow.array([[("a", 1)]], pyarrow.map_(pyarrow.string(), pyarrow.int8())),
        [("a", 1)],
    ),
}


@pytest.mark.parametrize("kind", EXACT)
def test_other_types(kind):
    """Guards: a value that changes its type because another one of its column is bad."""
    array, expected = EXACT[kind]
    bad = pyarrow.array([1], pyarrow.timestamp("ns"))
    table = pyarrow.table(
        {"value": array, "both": pyarrow.StructArray.from_arrays([array, bad], "vt")}
    )
    (row,) = read_table(table)
    assert row["value"] == row["both"]["v"] == expected
    assert type(row["value"]) is type(row["both"]["v"])
    json.dumps(jsonable(row), allow_nan=False)


def test_one_bad_value_is_one_failed_row(tmp_path, fake_engine, job):
    """Guards: a run that ends at the same row for ever, because of a column that nothing uses."""
    path = write(
        tmp_path / "rows.parquet",
        problem=bad_text(pyarrow.string()),
        unused=bad_text(pyarrow.string()).take(pyarrow.array([1, 0, 2])),
        seen=pyarrow.array([FAR, 0, 1], pyarrow.timestamp("us")),
        image=pyarrow.array([b"\xff" * 1_000_000, b"", b"\x89PNG"]),
    )
    config = job(str(path))
    summary = generate(config)
    assert (summary.good, summary.failed) == (2, 1)
    found = {record["row_index"]: record for record in load(config.run.output_dir, failed=True)}
    assert found[1]["error"] == "column 'problem' is not UTF-8 at byte 5"
    assert found[0]["row"]["unused"] == r"not \xed\xa0\x80UTF-8"
    assert "out of range" in found[0]["row"]["seen"]
    assert found[0]["row"]["image"].startswith("<1000000 bytes, blake2b ")
    assert found[2]["row"]["image"].startswith("<4 bytes, blake2b ")
    again = generate(config)
    assert (again.already_good, again.failed, again.generated) == (2, 1, 0)


def test_a_bad_value_that_a_template_asks_for(tmp_path, fake_engine, job):
    """Guards: the reason why a value cannot be read, as a teacher's hint."""
    problems = pyarrow.array(["a", "b", "c"])
    solution = nested(bad_text(pyarrow.string()))["struct"]
    path = write(tmp_path / "rows.parquet", problem=problems, solution=solution)
    prompt = PromptConfig(teacher_template="{problem} {solution}")
    config = replace(job(str(path)), prompt=prompt)
    summary = generate(config)
    assert (summary.good, summary.failed) == (2, 1)
    assert summary.errors == {"column 'solution' is not UTF-8 at byte 5": 1}


def test_an_image_that_a_template_asks_for(tmp_path, fake_engine, job):
    """Guards: a megabyte of `b'...'` as a prompt."""
    images = pyarrow.array([{"bytes": b"\x89PNG\xff", "path": None}, {"bytes": None, "path": "a"}])
    path = write(tmp_path / "rows.parquet", problem=pyarrow.array(["a", "b"]), image=images)
    prompt = PromptConfig(teacher_template="{problem} {image}")
    config = replace(job(str(path)), prompt=prompt)
    summary = generate(config)
    assert (summary.good, summary.failed) == (1, 1)
    assert summary.errors == {"a column that a prompt shows holds 5 bytes, no text": 1}


def damage(path, column):
    """Overwrite the data pages of a column."""
    chunk = pyarrow.parquet.ParquetFile(path).metadata.row_group(0).column(column)
    data = bytearray(path.read_bytes())
    start = chunk.data_page_offset
    size = chunk.total_compressed_size
    data[start : start + size] = b"\xff" * size
    path.write_bytes(bytes(data))


def test_a_damaged_column(tmp_path, fake_engine, job):
    """Guards: a file that cannot be used because of a column that nothing uses."""
    path = tmp_path / "rows.parquet"
    table = pyarrow.table({"problem": [f"{n}" for n in range(5)], "unused": list(range(5))})
    pyarrow.parquet.write_table(table, path, use_dictionary=False)
    damage(path, 1)
    config = job(str(path))
    assert generate(config).good == 5
    texts = {record["row"]["unused"] for record in load(config.run.output_dir)}
    assert len(texts) == 5
    assert all("row group 0: column 'unused' cannot be read: " in text for text in texts)
    damage(path, 0)
    summary = generate(job(str(path), "other"))
    assert (summary.good, summary.failed) == (0, 5)
    assert all(error.startswith("column 'problem' cannot be read") for error in summary.errors)


def test_row_groups_and_names_with_dots(tmp_path):
    """Guards: a column that is read twice because its name begins like another one's, and columns
    that go apart at the end of a row group.
    """
    table = pyarrow.table(
        {"a": [{"b": n} for n in range(2_500)], "a.b": list(range(2_500)), "": ["x"] * 2_500}
    )
    path = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(table, path, row_group_size=1_100)
    assert rows_of(path) == table.to_pylist()


def test_columns_of_one_name(tmp_path):
    """Guards: one of the two, without a word."""
    array = pyarrow.array(["x"])
    table = pyarrow.Table.from_arrays([array, array, array], names=["problem", "b", "problem"])
    pyarrow.parquet.write_table(table, tmp_path / "rows.parquet")
    with pytest.raises(DatasetError, match="several columns named problem"):
        open_dataset(DataConfig(dataset=str(tmp_path / "rows.parquet")), seed=0)


def test_an_empty_table(tmp_path):
    """Guards: a run of no rows that reports success, and a file of no bytes."""
    path = write(tmp_path / "rows.parquet", problem=pyarrow.array([], pyarrow.string()))
    with pytest.raises(DatasetError, match="is empty"):
        open_dataset(DataConfig(dataset=str(path)), seed=0)
    path.write_bytes(b"")
    with pytest.raises(DatasetError, match="as Parquet"):
        open_dataset(DataConfig(dataset=str(path)), seed=0)


def test_large_values_are_not_read_all_at_once(tmp_path):
    """Guards: a batch of a thousand images in memory."""
    image = pyarrow.array([bytes([n]) * 1_000_000 for n in range(60)])
    path = tmp_path / "rows.parquet"
    table = pyarrow.table({"problem": list("x" * 60), "image": image})
    pages = {"use_dictionary": False, "write_batch_size": 4}  # pages of four rows
    pyarrow.parquet.write_table(table, path, compression="none", **pages)
    del table, image
    pool = pyarrow.default_memory_pool()
    before = pool.bytes_allocated()
    peak = 0
    for row in read_parquet(path):
        assert len(row["image"]) == 1_000_000
        peak = max(peak, pool.bytes_allocated() - before)
    assert peak < 40_000_000
