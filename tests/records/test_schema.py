"""The fields of a record, and its line."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, get_args, get_origin, get_type_hints

import pytest
from hypothesis import given
from hypothesis import strategies as st

from optimal_sampling.records.schema import (
    FIELDS,
    MAY_BE_ABSENT,
    Prompt,
    Record,
    Sample,
    record_of,
    row_id,
)
from optimal_sampling.records.store import decode_line, encode_line
from optimal_sampling.types import (
    TRACE_FIELDS,
    Completion,
    FinishReason,
    Granularity,
    Mode,
    Request,
    TokenTrace,
)

HERE = Path(__file__).parent
TYPES = get_type_hints(Record)
TYPE_NAMES = {
    str: "text",
    int: "int",
    float: "float",
    FinishReason: "text",
    Granularity: "text",
    Mode: "text",
    bool: "bool",
    float | None: "float or null",
    list[int]: "list of int",
    list[float | None]: "list of float or null",
    dict[str, Any]: "object",
}
"""How docs/records.md writes a type."""

WIDTH = len(TRACE_FIELDS)
NEWER = {"mode", "ess_student", "ess_teacher", "curvature", "alpha_weighted"}
NEWER |= {"chernoff", "log_p_student", "nll_student", "vetoed", "log_p_student_restricted"}
NEWER |= {"kl_student_restricted", "kl_teacher_restricted", "granularity"}
"""Fields that version 0.1.0 did not write."""
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
    assert json.loads(line).keys() - record.keys() == {"checksum"} - record.keys()


@pytest.mark.parametrize("text", ["\ud800", "a\udfffb", "ok \U0001f600 \ud83d", "π≤"])
def test_lone_surrogates_survive(text):
    """Guards: `UnicodeEncodeError` in a run, for a row that some tools write without an error."""
    line = encode_line({"id": "x", "row": {"problem": text}})
    line.decode("utf-8")  # other tools cannot read a file that is not UTF-8
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


def sample(rows, finish_reason="length", *, text="text", attempts=2, row=None, **completion):
    """A sample with one token per row of the trace."""
    request = Request("a" * 32, 2, 7, (1, 2), (1, 2, 3), 16)
    ids = tuple(range(1, len(rows) + 1))
    trace = TokenTrace.from_rows(rows)
    done = Completion(request, ids, finish_reason, trace, **completion)
    prompt = Prompt("a" * 32, 5, row or {"problem": "p"}, "<s>1+1=?", "<t>1+1=?", 4, 5)
    return Sample(prompt, done, text, attempts)


def failed_row():
    """A sample of a row that could not be rendered."""
    row = {"problem": None, "n": 1}
    request = Request(row_id(row), 1, 7, (), (), 16)
    reason = "column 'problem' is null"
    completion = Completion(request, (), "error", TokenTrace.from_rows([]), reason)
    return Sample(Prompt(row_id(row), 3, row), completion, "", attempts=2)


def samples():
    """Samples of every kind, with `token_lists` of their records."""
    row = {"problem": "1+1=?", "score": math.nan, "list": [1, 2.5, None, math.inf]}
    row |= {"id": "theirs", "π": "x≤π \u2028"}
    trace = [
        tuple(0.123456789 * (place + 1) / (column + 1) for column in range(WIDTH))
        for place in range(3)
    ]
    odd = [(math.nan,) * WIDTH, (0.5,) * WIDTH, (0.0,) * WIDTH]
    usual = {"row": row, "text": "2 π", "seconds": 1.23456}
    nan = {"row": row, "text": "half \ud83d", "error": "NaN logits", "seconds": 1.23456}
    none = {"row": row, "text": "", "attempts": 1, "error": "no token"}
    return [
        (sample(trace, "stop", attempts=1, **usual), True),
        (sample(trace, "length", attempts=3, **usual), False),
        (sample(odd, "error", **nan), True),
        (sample([], "error", **none), True),
        (failed_row(), True),
        (failed_row(), False),
    ]


def test_lines_are_those_of_version_0_1_0():
    """Guards: a change of a field, its place or its digits, after which resumed runs differ.

    `data/lines.jsonl` was written by version 0.1.0 for these samples, without the NEWER fields.
    """
    records = [record_of(one, token_lists=lists) for one, lists in samples()]
    assert all(record.keys() >= NEWER for record in records)
    lines = [
        encode_line({k: value for k, value in record.items() if k not in {*NEWER, "token_vetoed"}})
        for record in records
    ]
    expected = (HERE / "data" / "lines.jsonl").read_bytes().splitlines(keepends=True)
    assert lines == expected


def fits(value: Any, kind: Any) -> bool:
    """Whether a value read from JSON has a type of the table."""
    if isinstance(kind, UnionType):
        return any(fits(value, part) for part in get_args(kind))
    if get_origin(kind) is list:
        return type(value) is list and all(fits(item, get_args(kind)[0]) for item in value)
    if get_origin(kind) is dict:
        return type(value) is dict
    if kind in (FinishReason, Granularity, Mode):
        return value in get_args(kind)
    return type(value) is (NoneType if kind is None else kind)


@pytest.mark.parametrize(("one", "lists"), samples())
def test_every_field_has_its_type(one, lists):
    """Guards: a null, an int or a number where the table promises a text, a float or a list."""
    record = decode_line(encode_line(record_of(one, token_lists=lists)))
    lists_absent = set() if lists else Record.__optional_keys__
    assert record.keys() - {"token_vetoed"} == FIELDS.keys() - lists_absent - {*MAY_BE_ABSENT}
    wrong = {name: value for name, value in record.items() if not fits(value, TYPES[name])}
    assert not wrong


def test_the_documented_table_is_that_of_the_code():
    """Guards: a field of docs/records.md that no record has, or the reverse, or another meaning."""
    page = (HERE.parents[1] / "docs" / "records.md").read_text("utf-8")
    _, _, section = page.partition("## A record\n")
    section, _, _ = section.partition("\n## ")
    documented = [line for line in section.splitlines() if line.startswith("| `")]
    *fields, checksum = documented
    assert fields == [
        f"| `{name}` | {TYPE_NAMES[TYPES[name]]} | {field.meaning} |"
        for name, field in FIELDS.items()
    ]
    assert checksum.startswith("| `checksum` | text |")


def test_nan_never_reaches_json():
    """Guards: `NaN` in a line, which is no JSON, and a mean that one NaN token makes NaN."""
    nan = (math.nan,) * WIDTH
    record = record_of(sample([nan, (0.5,) * WIDTH], row={"problem": "p", "score": math.inf}))
    assert record["alpha_mean"] == record["alpha_min"] == record["alpha_max"] == 0.5
    assert record["token_alpha"] == [None, 0.5]
    assert record["row"]["score"] is None
    assert record_of(sample([nan]))["alpha_mean"] is None
    assert decode_line(encode_line(record)) == record


@pytest.mark.parametrize(
    ("vetoed", "kept"),
    [((0.0, 0.0), None), ((0.0, 0.25), [0.0, 0.25]), ((math.nan, 0.0), None)],
)
def test_vetoed_mass_of_tokens_is_kept_where_there_is_any(vetoed, kept):
    """Guards: a list of zeros in every record of a run without a support, or a lost list."""
    column = TRACE_FIELDS.index("vetoed")
    rows = [tuple(x if i == column else 0.5 for i in range(WIDTH)) for x in vetoed]
    assert record_of(sample(rows)).get("token_vetoed") == kept
    assert "token_vetoed" not in record_of(sample(rows), token_lists=False)


def test_nll_is_of_the_whole_completion():
    """Guards: a sum that leaves out the token which the student could not have drawn."""
    column = TRACE_FIELDS.index("log_p_student")

    def nll(*log_p):
        rows = [tuple(x if i == column else 0.0 for i in range(WIDTH)) for x in log_p]
        return record_of(sample(rows))["nll_student"]

    assert nll(-0.25, -1.5, -2.0) == 3.75
    assert nll(-0.25, -math.inf) is None
    assert nll(-0.25, math.nan) is None


def test_a_completion_without_tokens_has_no_means():
    """Guards: division by zero where the first token fails."""
    record = record_of(sample([]))
    means = [name for name, kind in TYPES.items() if kind == float | None]
    assert len(means) == 18
    assert [record[name] for name in means] == [None] * len(means)


def test_token_lists_can_be_left_out():
    """Guards: the switch leaving null columns, which `load_dataset` does not type as lists."""
    record = record_of(sample([(0.25,) * WIDTH]), token_lists=False)
    assert not [name for name in record if name.startswith("token_")]
    assert record["alpha_mean"] == 0.25


def test_row_columns_cannot_collide_with_ours():
    """Guards: a dataset with a column `id` or `completion` overwriting the record's."""
    record = record_of(sample([], row={"id": "theirs", "completion": 3, "error": "no"}))
    assert (record["id"], record["completion"], record["error"]) == ("a" * 32, "text", "")
    assert record["row"] == {"id": "theirs", "completion": 3, "error": "no"}


def test_row_id_is_the_content():
    """Guards: a failed row that is owed again under another id at the next call."""
    assert row_id({"problem": None, "n": 1}) == row_id({"n": 1, "problem": None})
    assert row_id({"problem": None, "n": 1}) != row_id({"problem": None, "n": 2})


def test_a_stage_is_in_its_records_alone():
    """Guards: records of plain runs that change, and a stage whose records do not name it."""
    one = sample([])
    record = record_of(replace(one, stage="own", tries=3))
    assert (record["stage"], record["tries"]) == ("own", 3)
    assert [*record][4:6] == ["stage", "tries"]
    del record["stage"], record["tries"]
    assert record == record_of(one)


def test_raw_text_is_kept_where_it_differs():
    """Guards: special tokens within a completion lost from the record, or every text kept twice."""
    one = sample([])
    assert record_of(replace(one, raw_text="<|call|>x"))["completion_raw"] == "<|call|>x"
    assert "completion_raw" not in record_of(replace(one, raw_text=one.text))
