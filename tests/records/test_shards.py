"""Slices and merges."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from optimal_sampling.config import DataConfig, GenerateConfig, RunConfig, parse_slice
from optimal_sampling.errors import ConfigError, RunFolderError
from optimal_sampling.records import RunFolder, end_of_shards, load, merge
from optimal_sampling.records.shards import check_partition


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0::8", slice(0, None, 8)),
        ("3::8", slice(3, None, 8)),
        ("10:20", slice(10, 20, 1)),
        (":", slice(0, None, 1)),
        (":5:", slice(0, 5, 1)),
    ],
)
def test_slices(text, expected):
    """Guards: a shard that is not the rows Python would take."""
    assert parse_slice(text) == expected


@pytest.mark.parametrize(
    "text", ["", "3", "a::b", "0::0", "-1::2", "0:1:2:3", "0;8", "٣::٨", "1.5:2"]
)
def test_not_a_slice(text):
    """Guards: a mistyped shard that silently takes the whole dataset."""
    with pytest.raises(ConfigError, match="data_slice"):
        DataConfig(data_slice=text)


def shard(tmp_path, part, numbers, make_record, asked=None, seed=0, num_examples=None):
    config = GenerateConfig(
        data=DataConfig(data_slice=part, num_examples=num_examples),
        run=RunConfig(output_dir=str(tmp_path / part.replace(":", "_")), seed=seed),
    )
    with RunFolder(config) as folder:
        for number in numbers:
            folder.add(make_record(number))
    count = len(numbers) if asked is None else asked
    (folder.path / f"summary-{config.shard}.json").write_text(json.dumps({"asked": count}))
    return folder.path


def test_an_interrupted_shard_is_not_merged(tmp_path, make_record):
    """Guards: stages that were interrupted between two of their tries, which owed nothing then."""
    first, second = (shard(tmp_path, f"{part}::2", [part], make_record) for part in range(2))
    summary = {"asked": 1, "status": "interrupted"}
    (second / "summary-slice-1--2.json").write_text(json.dumps(summary))
    with pytest.raises(RunFolderError, match=r"the last call on .* was interrupted; finish it"):
        merge([first, second], tmp_path / "all")


def test_merge(tmp_path, make_record):
    """Guards: a merged folder that lacks a record, holds one twice, or cannot be resumed."""
    shards = [shard(tmp_path, f"{part}::3", [part, part + 3, 99], make_record) for part in range(3)]
    assert merge(shards, tmp_path / "all") == 7
    assert sorted(record["row_index"] for record in load(tmp_path / "all")) == [
        0,
        1,
        2,
        3,
        4,
        5,
        99,
    ]
    whole = GenerateConfig(run=RunConfig(output_dir=str(tmp_path / "all")))
    with RunFolder(whole) as folder:
        assert len(folder.ledger.good) == 7


@pytest.mark.parametrize(
    ("slices", "num_examples", "end"),
    [
        (["0:2", "2:4"], None, 4),
        (["0:2", "2:"], None, None),
        (["0::2", "1::2"], None, None),
        (["0:2", "2:4"], 4, None),
        (["0:2", "2:4"], 9, 4),
    ],
)
def test_where_the_slices_end_is_known(tmp_path, make_record, slices, num_examples, end):
    """Guards: a merged folder without the dataset's last rows, of which nothing is said."""
    options = {} if num_examples is None else {"num_examples": num_examples}
    folders = []
    for part, text in enumerate(slices):
        config = GenerateConfig(
            data=DataConfig(data_slice=text, **options),
            run=RunConfig(output_dir=str(tmp_path / str(part))),
        )
        with RunFolder(config) as folder:
            folder.add(make_record(part))
        folders.append(folder.path)
    assert end_of_shards(folders) == end


def test_merge_refuses_what_does_not_fit(tmp_path, make_record):
    """Guards: a dataset with a hole in it that looks whole."""
    first = shard(tmp_path, "0::2", [0, 2], make_record)
    second = shard(tmp_path, "1::2", [1], make_record, asked=2)
    with pytest.raises(RunFolderError, match="1 good records of 2 asked for; finish it first"):
        merge([first, second], tmp_path / "all")
    with pytest.raises(RunFolderError, match="no partition"):
        merge([first, first], tmp_path / "again")
    with pytest.raises(RunFolderError, match="is not empty"):
        merge([first], first)
    other = shard(tmp_path / "other", "1::2", [1], make_record, seed=5)
    with pytest.raises(RunFolderError, match=r"different options: --seed \(0, 5\)"):
        merge([first, other], tmp_path / "third")


SLICES = st.builds(
    "{}:{}:{}".format,
    st.integers(0, 6),
    st.sampled_from(["", *range(9)]),
    st.sampled_from([1, 1, 2, 3, 4]),
)


@given(st.lists(SLICES, min_size=1, max_size=5))
@example(["0::2"])
@example(["0::2", "1::3"])
@example(["0:5:2", "1::2"])
@example(["0::3", "1::3", "1::3"])
@example(["2::3", "0::3", "1::3"])
@example(["0:20", "20:40"])
@example(["0:20", "20:999999999999"])
@example(["0:20", "21:40"])
@example(["0:20", "19:40"])
@example(["5:", "0:5"])
@example(["6::2", "0:6", "7::4", "9::4"])
@example(["1:", "0:"])
@example(["0:0", "0:"])
def test_a_partition_is_what_counting_rows_says(slices):
    """Guards: refusing `0:20` + `20:40`, and taking slices with a hole or an overlap: shards that
    are counted instead of looked at.
    """
    parts = [parse_slice(text) for text in slices]
    unbounded = any(part.stop is None for part in parts)
    total = (
        120
        if unbounded
        else min(120, max(end for part in parts for end in (part.start, part.stop)))
    )
    held = Counter(row for part in parts for row in range(total)[part])
    if [held[row] for row in range(total)] == [1] * total:
        check_partition(slices)
    else:
        with pytest.raises(
            RunFolderError, match=r"no partition of the dataset: row \d+ is in [02-5]"
        ):
            check_partition(slices)


def test_shards_of_different_amounts(tmp_path, make_record):
    """Guards: a hole that no slice shows, because one shard was made of the first ten rows only."""
    first = shard(tmp_path, "0::2", [0], make_record)
    second = shard(tmp_path, "1::2", [1], make_record, num_examples=10)
    with pytest.raises(RunFolderError, match=r"different options: --num-examples \(None, 10\)"):
        merge([first, second], tmp_path / "all")


def test_shards_have_names_of_their_own():
    """Guards: two slices that share a file, or a file name that some file systems refuse."""
    names = {
        replace(GenerateConfig(), data=DataConfig(data_slice=part)).shard
        for part in ("0::2", "1::2", "0:2", "0:")
    }
    assert len(names) == 4
    assert all(Path(name).name == name and ":" not in name for name in names)
