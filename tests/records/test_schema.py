"""A record and its line."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from optimal_sampling.records.schema import (
    SCHEMA_VERSION,
    Prompt,
    completion_record,
    decode_line,
    encode_line,
    row_id,
)
from optimal_sampling.types import TRACE_FIELDS, Completion, Request, TokenTrace

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(st.text(), JSON, min_size=1))
def test_a_record_survives_its_line(record):
    """Guards: a newline, quote or U+2028 inside a text splitting or ending the line early."""
    record["id"] = "x"
    line = encode_line(record)
    assert line.count(b"\n") == 1
    assert line.endswith(b"\n")
    assert decode_line(line) == record


@pytest.mark.parametrize("text", ["\ud800", "a\udfffb", "ok \U0001f600 \ud83d", "π≤"])
def test_lone_surrogates_survive(text):
    """Guards: `UnicodeEncodeError` in the middle of a run, for a row that some tools write happily."""
    line = encode_line({"id": "x", "row": {"problem": text}})
    line.decode("utf-8")  # a file that is not UTF-8 cannot be read by anyone else
    assert decode_line(line) == {"id": "x", "row": {"problem": text}}


@given(st.integers(0, 10_000), st.integers(1, 255))
def test_any_changed_byte_is_noticed(place, change):
    """Guards: bit rot and torn writes that leave valid JSON."""
    line = bytearray(
        encode_line({"id": "0" * 32, "completion": "1+1=2", "completion_ids": [1, 2, 3]})
    )
    line[place % len(line)] ^= change
    assert decode_line(bytes(line)) is None


@given(st.text())
def test_a_row_cannot_forge_a_checksum(text):
    """Guards: finding the checksum by searching for its name instead of by its place."""
    record = {"id": "x", "row": {"checksum": text, "problem": '","checksum":"0011223344556677"}'}}
    assert decode_line(encode_line(record)) == record


def trace_record(rows, **options):
    request = Request("a" * 32, 0, 3, (1,), (1, 2), 8)
    completion = Completion(
        request, tuple(range(len(rows))), "length", TokenTrace.from_rows(rows), seconds=1.23456
    )
    prompt = Prompt("a" * 32, 5, options.pop("row", {"problem": "p"}), "s", "t", 1, 2)
    return completion_record(
        prompt, completion, "text", attempts=2, token_lists=options.pop("token_lists", True)
    )


def test_every_documented_field_is_there():
    """Guards: a field of docs/records.md that no record has, or the reverse."""
    record = trace_record([(0.5,) * len(TRACE_FIELDS)])
    page = (Path(__file__).parents[2] / "docs" / "records.md").read_text("utf-8")
    documented = [line.split("`")[1] for line in page.splitlines() if line.startswith("| `")]
    assert [name for name in documented if name.isidentifier()] == [*record, "checksum"]
    assert json.loads(encode_line(record)).keys() - record.keys() == {"checksum"}
    assert record["schema_version"] == SCHEMA_VERSION


def test_nan_never_reaches_json():
    """Guards: `NaN` in a line, which is no JSON, and a mean that one NaN token makes NaN."""
    nan = (math.nan,) * len(TRACE_FIELDS)
    record = trace_record(
        [nan, (0.5,) * len(TRACE_FIELDS)], row={"problem": "p", "score": math.inf}
    )
    assert record["alpha_mean"] == 0.5
    assert record["token_alpha"] == [None, 0.5]
    assert record["row"]["score"] is None
    assert trace_record([nan])["alpha_mean"] is None
    assert decode_line(encode_line(record)) == record


def test_a_completion_without_tokens_has_no_means():
    """Guards: division by zero where the first token fails."""
    record = trace_record([])
    assert (
        record["alpha_mean"]
        is record["alpha_min"]
        is record["kl_student"]
        is record["ess_ratio"]
        is None
    )


def test_token_lists_can_be_left_out():
    """Guards: the switch leaving null columns, which `load_dataset` types differently from lists."""
    record = trace_record([(0.25,) * len(TRACE_FIELDS)], token_lists=False)
    assert not [name for name in record if name.startswith("token_")]
    assert record["alpha_mean"] == 0.25


def test_row_columns_cannot_collide_with_ours():
    """Guards: a dataset with a column `id` or `completion` overwriting the record's."""
    record = trace_record([], row={"id": "theirs", "completion": 3, "error": "no"})
    assert record["id"] == "a" * 32
    assert record["completion"] == "text"
    assert record["row"]["id"] == "theirs"


def test_row_id_is_the_content():
    """Guards: a failed row that is owed again under another name at the next call."""
    assert row_id({"problem": None, "n": 1}) == row_id({"n": 1, "problem": None})
    assert row_id({"problem": None, "n": 1}) != row_id({"problem": None, "n": 2})
