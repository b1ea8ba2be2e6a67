"""What changed between two calls on one run folder."""

from __future__ import annotations

import json
from dataclasses import replace

import pyarrow
import pyarrow.parquet
import pytest

from optimal_sampling.config import DataConfig
from optimal_sampling.errors import DatasetError
from optimal_sampling.generate import generate
from optimal_sampling.records import load
from optimal_sampling.records.schema import row_id
from optimal_sampling.records.store import encode_line

ROWS = [
    {"problem": f"{n}+1=?", "answer": n + 1, "π": [n / 3, None, {"a\ud800": float("nan")}]}
    for n in range(6)
]


def edited(row, **columns):
    return [*ROWS[:row], ROWS[row] | columns, *ROWS[row + 1 :]]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (edited(3, answer=5), r"row 3 of dataset .* has changed since .* in: answer \(1 such"),
        (edited(3, answer="4"), r"row 3 .* in: answer \(1 such"),
        (edited(0, problem="0+1=", answer=True), r"row 0 .* in: problem, answer \(1 such"),
        (edited(5, extra=None), r"row 5 .* in: extra \(1 such"),
        ([{"problem": row["problem"]} for row in ROWS], r"row 0 .* in: answer, π \(6 such"),
        (ROWS[:2] + ROWS[3:], r"row 2 .* in: problem, answer, π \(3 such"),
        (ROWS[::-1], r"row 0 .* in: problem, answer, π \(6 such"),
        (ROWS[:5], r"has 5 rows, and .* has records of row 5; restore it, or choose another"),
    ],
)
def test_an_edited_dataset_is_noticed(fake_engine, job, rows, message):
    """Guards: half of a run made from other rows than the other half, under one name."""
    generate(job(ROWS))
    with pytest.raises(DatasetError, match=message):
        generate(job(rows))
    assert len(list(load(job(ROWS).run.output_dir))) == 6


def test_a_grown_dataset_goes_on(fake_engine, job):
    """Guards: refusing to make the rows that were appended."""
    generate(job(ROWS[:4]))
    summary = generate(job(ROWS))
    assert (summary.already_good, summary.generated) == (4, 2)


def test_fewer_rows_that_are_asked_for(fake_engine, job):
    """Guards: `--num-examples` and `--data-slice` read as an edited dataset."""
    generate(job(ROWS))
    assert generate(job(ROWS, num_examples=3)).already_good == 3
    assert generate(job(ROWS, data_slice="1::2")).already_good == 3
    generate(job("synthetic", "other", num_examples=3))
    assert generate(job("synthetic", "other", num_examples=2)).already_good == 2
    other = job("synthetic", "other", num_examples=150)
    assert generate(other).already_good == 3
    assert generate(replace(other, data=DataConfig())).generated == 0


def test_a_row_that_failed_may_be_corrected(fake_engine, job):
    """Guards: a folder that nobody can finish because one of its rows was null."""
    assert generate(job(edited(2, problem=None))).failed == 1
    summary = generate(job(ROWS))
    assert (summary.status, summary.already_good, summary.generated) == ("complete", 5, 1)


def test_rows_of_another_slice_are_not_compared(fake_engine, job):
    """Guards: reading all of the dataset for one shard of it."""
    generate(job(ROWS, data_slice="0::2"))
    assert generate(job(edited(2, answer=0), data_slice="1::2")).generated == 3
    with pytest.raises(DatasetError, match="row 2 of dataset"):
        generate(job(edited(2, answer=0), data_slice="0::2"))


@pytest.mark.parametrize("edit", [False, True])
def test_bytes_as_version_0_1_0_recorded_them(fake_engine, job, tmp_path, edit):
    """Guards: a folder with images of an earlier version that does not resume."""
    path = tmp_path / "rows.parquet"
    rows = [{"problem": f"{n}", "image": bytes([n, 255])} for n in range(3)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    config = job(str(path))
    generate(config)
    file = next((tmp_path / "run" / "records").glob("*.jsonl"))
    lines = []
    for row, line in zip(rows, file.read_text().splitlines(), strict=True):
        record = json.loads(line)
        del record["checksum"]
        image = str(rows[record["row_index"]]["image"])
        problem = "other" if edit else record["row"]["problem"]
        lines.append(encode_line(record | {"row": {"problem": problem, "image": image}}))
        assert row.keys() == record["row"].keys()
    file.write_bytes(b"".join(lines))
    if edit:
        with pytest.raises(DatasetError, match=r"row 0 .* in: problem \(3 such"):
            generate(config)
    else:
        assert generate(config).already_good == 3


def test_bytes_have_a_hash():
    """Guards: two rows whose images have one size, counted as one row that appears twice."""
    first, second = ({"problem": None, "image": bytes([n]) * 9} for n in range(2))
    assert row_id(first) != row_id(second)
