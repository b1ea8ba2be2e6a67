"""Soft targets: from the record to the columns that other tools read."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from pyarrow import parquet
from tests.records.export.conftest import Draw

from optimal_sampling.errors import ConfigError, RunFolderError
from optimal_sampling.records import load
from optimal_sampling.records.export import export, read_top_tokens


def rows_of(report):
    [file] = Path(report.folder, "data").glob("*.parquet")
    return parquet.read_table(file).to_pylist()


def test_a_record_gives_back_its_top_tokens(runs, rows):
    """Guards: arrays read in another order, and log-probabilities of another distribution."""
    folder = runs.make([Draw(0, "it is 12")], rows, top=3)
    [record] = load(folder)
    for place, name in enumerate(("student", "teacher", "mixture")):
        ids, log_p = read_top_tokens(record, name)
        drawn = np.array(record["completion_ids"])[:, None]
        np.testing.assert_array_equal(ids, drawn + place + np.arange(3))
        np.testing.assert_array_equal(log_p, np.tile([-0.25, -0.5, -0.75], (len(drawn), 1)))
    with pytest.raises(RunFolderError, match="--top-tokens"):
        read_top_tokens(next(load(runs.make([Draw(0, "a")], rows, "plain"))), "mixture")
    drawn = next(load(runs.make([Draw(0, "a")], rows, "bytes"))) | {"granularity": "byte"}
    with pytest.raises(RunFolderError, match="two models with one tokenizer"):
        read_top_tokens(drawn, "mixture")


def test_bytes_per_token(runs, rows):
    """Guards: a size in docs/records.md that is not that of the records."""
    folder = runs.make([Draw(0, "it is 12, is it not")], rows, top=20)
    [record] = load(folder)
    top = record["top_tokens"]
    per_token = (len(top["ids"]) + len(top["log_p"])) / len(record["completion_ids"])
    assert per_token == pytest.approx(480, rel=0.02)  # base64 is padded once


def test_a_row_per_position(runs, rows):
    """Guards: soft targets that are one position early or late, and NaN where nothing is known."""
    folder = runs.make([Draw(0, "it is 12")], rows, top=3)
    report = export(runs.options(folder, format="tokens", soft_targets="mixture"), runs.tools)
    [row] = rows_of(report)
    ids, values = np.array(row["token_ids"]), np.array(row["top_values"])
    assert ids.shape == values.shape == (len(row["input_ids"]), 3)
    first = row["labels"].index(row["input_ids"][-1])
    trained = [place for place, label in enumerate(row["labels"]) if label != -100]
    assert first == trained[-1]
    # logits at a position are about the token after it
    np.testing.assert_array_equal(
        ids[trained[0] - 1 : -1, 0], np.array(row["input_ids"])[trained] + 2
    )
    assert np.exp(values[: trained[0] - 1]).sum(1).tolist() == [1.0] * (trained[0] - 1)
    # DistillKit's sum over tokens, with a uniform student
    terms = np.exp(values) * (values - np.log(1 / 300))
    assert np.isfinite(terms).all()


def test_a_row_per_token(runs, rows):
    """Guards: columns of another length than the completion; the token drawn, unknown."""
    folder = runs.make([Draw(0, "it is 12")], rows, top=3)
    options = {"format": "tokens", "soft_layout": "trl"}
    for name, known in (("student", True), ("teacher", False)):
        target = str(runs.root / name)
        found = runs.options(folder, soft_targets=name, output_dir=target, **options)
        [row] = rows_of(export(found, runs.tools))
        drawn = [label for label in row["labels"] if label != -100]
        assert [each for [each] in row["actual_token_ids"]] == drawn
        assert len(row["logprobs"]) == len(row["logprob_token_ids"]) == len(drawn)
        actual = -0.25 if known else -np.inf  # the teacher's ids begin after the token
        assert [each for [each] in row["actual_logprobs"]] == [actual] * len(drawn)


def test_soft_targets_need_the_very_ids(runs, rows):
    """Guards: soft targets beside texts that may be tokenised otherwise; a run without any."""
    folder = runs.make([Draw(0, "a")], rows)
    with pytest.raises(ConfigError, match="--format tokens"):
        runs.options(folder, soft_targets="mixture")
    with pytest.raises(RunFolderError, match="--top-tokens"):
        export(runs.options(folder, format="tokens", soft_targets="mixture"), runs.tools)
    assert not (runs.root / "out").exists()
