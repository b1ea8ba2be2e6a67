"""Files of verdicts: which verdict counts, and what a crash leaves."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from optimal_sampling.errors import RunFolderError
from optimal_sampling.records.shards import merge
from optimal_sampling.records.store import RecordFile, Scan
from optimal_sampling.records.verdicts import (
    MEANINGS,
    Subject,
    VerdictFile,
    graded_records,
    load_verdicts,
)


def verdict(record, checksum, verdict="correct", **changes):
    return {
        "id": record["id"],
        "sample_index": record["sample_index"],
        "verdict": verdict,
        "answer": "1",
        "reference": "1",
        "grader": "math",
        "record": checksum,
        "detail": None,
        "failed": False,
        **changes,
    }


def write_records(run, records, shard="main"):
    """Append records; their checksums."""
    path = run / "records" / f"{shard}.jsonl"
    with RecordFile(path) as file:
        scan = Scan(path)
        list(scan)
        file.open(scan)
        return [file.append(record) for record in records]


def test_each_record_has_its_own_verdict(tmp_path, make_record):
    """Guards: verdicts that are matched by their place, and records without one left out."""
    records = [make_record(number) for number in range(3)]
    sums = write_records(tmp_path, records)
    with VerdictFile(tmp_path, "main") as file:
        file.append(verdict(records[2], sums[2], "wrong"))
        file.append(verdict(records[0], sums[0]))
    found = [graded and graded["verdict"] for _, graded in graded_records(tmp_path)]
    assert found == ["correct", None, "wrong"]


def test_the_last_verdict_counts(tmp_path, make_record):
    """Guards: an answer that was graded again and keeps its first verdict."""
    record = make_record(0)
    (checksum,) = write_records(tmp_path, [record])
    for word in ("wrong", "correct"):
        with VerdictFile(tmp_path, "main") as file:
            file.append(verdict(record, checksum, word))
    (graded,) = load_verdicts(tmp_path).values()
    assert graded["verdict"] == "correct"


def test_a_verdict_on_a_replaced_record_does_not_count(tmp_path, make_record):
    """Guards: the verdict on one completion, given to another of the same identity."""
    old, new = make_record(0, tokens=3), make_record(0, tokens=4)
    (checksum,) = write_records(tmp_path, [old])
    with VerdictFile(tmp_path, "main") as file:
        file.append(verdict(old, checksum))
    assert len(load_verdicts(tmp_path)) == 1
    (tmp_path / "records" / "main.jsonl").unlink()
    write_records(tmp_path, [new])
    assert load_verdicts(tmp_path) == {}


def test_failed_records_have_no_verdict(tmp_path, make_record):
    """Guards: a verdict on a record with an error, counted beside the good ones."""
    record = make_record(0, error="no memory")
    (checksum,) = write_records(tmp_path, [record])
    with VerdictFile(tmp_path, "main") as file:
        file.append(verdict(record, checksum))
    assert load_verdicts(tmp_path) == {}


def test_a_torn_tail_is_cut_wherever_it_is_torn(tmp_path, make_record):
    """Guards: a half line of a killed process, read as a verdict or glued to the next one."""
    records = [make_record(number) for number in range(2)]
    sums = write_records(tmp_path, records)
    with VerdictFile(tmp_path, "main") as file:
        file.append(verdict(records[0], sums[0]))
        file.commit()
        whole = file.path.stat().st_size
        file.append(verdict(records[1], sums[1]))
    data = file.path.read_bytes()
    for size in range(whole, len(data), 7):
        file.path.write_bytes(data[:size])
        assert len(load_verdicts(tmp_path)) == 1
        with VerdictFile(tmp_path, "main") as again:
            assert again.torn_lines == (size > whole)
            again.append(verdict(records[1], sums[1]))
        assert file.path.read_bytes() == data


def test_a_damaged_verdict_is_no_verdict(tmp_path, make_record):
    """Guards: a flipped bit that turns `wrong` into another word, or stops the reading."""
    records = [make_record(number) for number in range(3)]
    sums = write_records(tmp_path, records)
    with VerdictFile(tmp_path, "main") as file:
        for record, checksum in zip(records, sums, strict=True):
            file.append(verdict(record, checksum))
    data = file.path.read_bytes().replace(b"correct", b"cOrrect", 1)
    file.path.write_bytes(data)
    assert [bool(graded) for _, graded in graded_records(tmp_path)] == [False, True, True]
    with VerdictFile(tmp_path, "main") as again:
        assert again.bad_lines == 1
        held = [
            again.has((record["id"], 0), Subject(checksum, "1", "math"))
            for record, checksum in zip(records, sums, strict=True)
        ]
    assert held == [False, True, True]


def test_one_process_writes_a_file(tmp_path):
    """Guards: two graders that write into each other's lines."""
    with (
        VerdictFile(tmp_path, "main"),
        pytest.raises(RunFolderError, match=f"pid {os.getpid()}"),
    ):
        VerdictFile(tmp_path, "main")


def test_a_verdict_counts_for_what_it_is_about(tmp_path, make_record):
    """Guards: records, references or graders that changed, and verdicts that stayed."""
    record = make_record(0)
    key = record["id"], 0
    with VerdictFile(tmp_path, "main") as file:
        file.append(verdict(record, "a" * 16))
    with VerdictFile(tmp_path, "main") as file:
        assert file.has(key, Subject("a" * 16, "1", "math"))
        assert not file.has(key, Subject("b" * 16, "1", "math"))
        assert not file.has(key, Subject("a" * 16, "2", "math"))
        assert not file.has(key, Subject("a" * 16, "1", "synthetic"))
        file.append(verdict(record, "a" * 16, "wrong", failed=True))
        assert file.has(key, Subject("a" * 16, "1", "math"))
        assert not file.has(key, Subject("a" * 16, "1", "math"), failed=False)
        assert file.counts() == {"wrong": 1}


def test_the_documented_table_is_the_type():
    """Guards: a field of a verdict that the documentation does not have, or explains otherwise."""
    text = (Path(__file__).parents[2] / "docs" / "records.md").read_text()
    section = text.split("## A verdict")[1].split("## ")[0]
    rows = [line.strip("| ").split(" | ") for line in section.splitlines() if "| `" in line]
    assert {name.strip("`"): meaning for name, _, meaning in rows[:-1]} == MEANINGS


def test_merging_takes_verdicts_along(tmp_path, make_record):
    """Guards: a merged run that has to be graded again."""
    (tmp_path / "shard").mkdir()
    amounts = {"num_examples": None, "samples_per_prompt": 1, "data_slice": None}
    config = {"compared": {}, "may_differ": amounts}
    (tmp_path / "shard" / "config.json").write_text(json.dumps(config))
    (tmp_path / "shard" / "summary.json").write_text(json.dumps({"asked": 3}))
    records = [make_record(number) for number in range(3)]
    sums = write_records(tmp_path / "shard", records)
    with VerdictFile(tmp_path / "shard", "main") as file:
        file.append(verdict(records[1], sums[1], "wrong"))
    assert merge([tmp_path / "shard"], tmp_path / "merged") == 3
    found = [graded and graded["verdict"] for _, graded in graded_records(tmp_path / "merged")]
    assert found == [None, "wrong", None]
