"""JSON files of every form: lines, lists, compressed."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import tracemalloc

import pyarrow
import pytest
from hypothesis import given
from hypothesis import strategies as st

from optimal_sampling.errors import DatasetError
from optimal_sampling.generate.json_rows import is_json, read_json

ROWS = [{"problem": f'{n} [{{\\"]}},π\u2028', "n": n, "nested": [{"a": [n]}]} for n in range(50)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()


def zstd(data):
    """Two frames, as appending to a file leaves them."""
    half = data.index(b"\n") + 1
    frames = (pyarrow.compress(part, "zstd", asbytes=True) for part in (data[:half], data[half:]))
    return b"".join(frames)


COMPRESSIONS = {
    "": bytes,
    ".gz": lambda data: gzip.compress(data[:99]) + gzip.compress(data[99:]),
    ".zst": zstd,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
}


@pytest.mark.parametrize("ending", [*COMPRESSIONS, ".GZ"])
@pytest.mark.parametrize("form", [".jsonl", ".JSONL", ".ndjson", ".json"])
def test_compressed_files(tmp_path, form, ending):
    """Guards: refusing `.jsonl.gz`, `.jsonl.zst` and `.JSONL`, and reading one frame of several."""
    path = tmp_path / f"rows{form}{ending}"
    assert is_json(path.name)
    path.write_bytes(COMPRESSIONS[ending.lower()](LINES))
    assert list(read_json(path)) == ROWS


@pytest.mark.parametrize(
    "name", ["rows.csv", "rows.gz", "rows.parquet.gz", "json", "rows.jsonl.zip", "rows.txt.gz"]
)
def test_other_names(name):
    """Guards: reading an archive or a table as JSON because of a part of its name."""
    assert not is_json(name)


@pytest.mark.parametrize("indent", [None, 0, 2])
@pytest.mark.parametrize("before", ["", "\ufeff", " \n\t", "\ufeff\r\n"])
@pytest.mark.parametrize("ending", ["", ".gz", ".zst"])
def test_a_list_of_objects(tmp_path, indent, before, ending):
    """Guards: refusing the form in which `json.dump` and most web tools write a table."""
    path = tmp_path / f"rows.json{ending}"
    text = f"{before}{json.dumps(ROWS, indent=indent)}\n \n"
    path.write_bytes(COMPRESSIONS[ending](text.encode()))
    assert list(read_json(path)) == ROWS


def test_empty_files(tmp_path):
    """Guards: an error, or a row, where there is none."""
    for content in ("", " \n", "\ufeff", "[]", " [ ]\n"):
        path = tmp_path / "rows.json"
        path.write_text(content)
        assert list(read_json(path)) == []


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)


@given(
    rows=st.lists(st.dictionaries(st.text(), JSON, max_size=3), max_size=5),
    indent=st.sampled_from([None, 1]),
    ascii_only=st.booleans(),
    chunk=st.integers(1, 40),
)
def test_a_list_is_the_same_wherever_it_is_cut(tmp_path_factory, rows, indent, ascii_only, chunk):
    """Guards: an object that lies across two reads, cut inside an escape, a number or a name."""
    path = tmp_path_factory.mktemp("cut") / "rows.json"
    text = json.dumps(rows, indent=indent, ensure_ascii=ascii_only)
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    if not any(0xD800 <= ord(character) < 0xE000 for character in text):
        assert list(read_json(path, chunk)) == rows


@pytest.mark.parametrize("chunk", [1, 7, 1 << 16])
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[{"a": 1},\n {"a": b}]', r"line 2, item 1 of the list: Expecting value"),
        ('[{"a": 1}\n{"a": 2}]', r"line 2, item 1 of the list: Expecting ','"),
        ('[{"a": 1},]', r"line 1, item 1 of the list: Expecting value"),
        ('[{"a": 1}', r"line 1, item 1 of the list: Expecting ','"),
        ('[{"a": 1},\n\n{"a": "b', r"line 3, item 1 of the list: Unterminated string"),
        ('[{"a": 1}]\n\n{"a": 2}', r"line 1, item 1 of the list: Expecting ','"),
        ('[{"a": 1}, "b"]', r"item 1 of the list: expected an object \{\.\.\.\}, found a string"),
        ("[[1, 2]]", r"item 0 of the list: .* found an array"),
        ('[{"a": "\\x"}]', r"line 1, item 0 of the list: Invalid \\escape"),
        ("[" * 100_000, r"line 1, item 0 of the list: nested too deeply"),
        ('[{"a": ' + "1" * 5000 + "}]", r"line 1, item 0 of the list: Exceeds the limit"),
        ('[{"a": b},' + '{"a": 1},' * 99, r"line 1, item 0 of the list: Expecting value"),
        ('{\n  "data": [{"a": 1}]\n}', r"line 1, column 3: .*an object over several lines"),
    ],
)
def test_bad_lists(tmp_path, text, message, chunk):
    """Guards: a traceback, or a place in the file that is not the one at fault."""
    path = tmp_path / "rows.json"
    path.write_text(text)
    with pytest.raises(DatasetError, match=message):
        list(read_json(path, max(chunk, len(text) // 100)))


@pytest.mark.parametrize("ending", [".gz", ".zst", ".bz2", ".xz"])
@pytest.mark.parametrize("damage", ["cut", "not compressed", "not UTF-8"])
def test_damaged_files(tmp_path, ending, damage):
    """Guards: a traceback, and the rows of half a file that pass for all of it."""
    path = tmp_path / f"rows.jsonl{ending}"
    data = COMPRESSIONS[ending](LINES)
    data = {"cut": data[:-20], "not compressed": LINES, "not UTF-8": data}[damage]
    if damage == "not UTF-8":
        data = COMPRESSIONS[ending](LINES + b'{"problem": "\xff"}\n')
    path.write_bytes(data)
    with pytest.raises(DatasetError, match=r"rows\.jsonl"):
        list(read_json(path))


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "latin-1"])
@pytest.mark.parametrize("text", ['{"problem": "é"}\n', '[{"problem": "é"}]'])
def test_other_encodings(tmp_path, encoding, text):
    """Guards: a traceback for a file that a Windows shell wrote."""
    path = tmp_path / "rows.json"
    path.write_bytes(text.encode(encoding))
    with pytest.raises(DatasetError, match=r"not UTF-8|is not JSON at line 1|'utf-8' codec"):
        list(read_json(path))


def test_what_python_reads_and_json_does_not_say(tmp_path):
    """Values that differ between readers: NaN and infinities, a name given twice (the last one
    counts), columns of mixed types, a number beyond 64 bits, a lone surrogate.
    """
    path = tmp_path / "rows.jsonl"
    path.write_bytes(
        b'{"a": Infinity}\r\n{"a": 1, "a": "2"}\r\n{"a": [1]}\r\n{"a": 123456789012345678901}\r\n'
        b'{"a": "\\ud800"}'
    )
    found = [row["a"] for row in read_json(path)]
    assert found == [float("inf"), "2", [1], 123456789012345678901, "\ud800"]


@pytest.mark.parametrize("form", ["lines", "list"])
@pytest.mark.parametrize("ending", ["", ".gz", ".zst"])
def test_a_large_file_is_not_read_whole(tmp_path, form, ending):
    """Guards: `json.load` of a file that is larger than the memory."""
    path = tmp_path / f"rows.json{ending}"
    row = {"problem": "x" * 20_000}
    data = json.dumps([row] * 2_000) if form == "list" else (json.dumps(row) + "\n") * 2_000
    path.write_bytes(COMPRESSIONS[ending](data.encode() + b"\n"))
    tracemalloc.start()
    try:
        assert sum(1 for _ in read_json(path)) == 2_000
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < len(data) / 20


def test_a_very_long_line(tmp_path):
    """Guards: a limit on the length of a row."""
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"problem": "x" * 30_000_000}) + '\n{"problem": "y"}')
    assert [len(row["problem"]) for row in read_json(path)] == [30_000_000, 1]
