"""benchmarks/token_rules.py: what it keeps, and how the teacher's law is carried over."""

import json

import pytest
from benchmarks.token_rules import NONE, Results, columns_of
from tests.engines.bytes.conftest import byte_vocabulary, small_tokenizer

from optimal_sampling.errors import ConfigError

SETTINGS = {"student": "s", "new_tokens": 9}


def results(path, **changes):
    made = Results(path, SETTINGS | changes)
    made.open()
    return made


def test_it_goes_on_after_the_last_whole_group(tmp_path):
    """Guards: groups drawn twice or counted twice, half a line that ends every later run, results
    of other weights taken for these.
    """
    path = tmp_path / "new" / "results.jsonl"
    first = results(path)
    first.add("bytes", 0, [1, 0])
    first.add("bytes", 2, [1, 1])
    with open(path, "a") as file:
        file.write(json.dumps({"drawn by": "bytes", "first": 4})[:-3])
    again = results(path)
    assert [again.lacks("bytes", place) for place in (0, 2, 4)] == [False, False, True]
    again.add("bytes", 4, [0, 0])
    assert results(path).summary(5) == [
        {"drawn by": "bytes", "problems": 5, "correct": 0.6, "low": 0.2307, "high": 0.8824}
    ]
    with pytest.raises(ConfigError, match="take another --output"):
        results(path, new_tokens=10)


def test_where_each_rule_takes_the_teachers_probability():
    """Guards: a shared string that is none, a whole token for the first part of one, an end that
    no rule can draw.
    """
    student, teacher = small_tokenizer(("ab", "12")), small_tokenizer(("12", "1b"))
    vocabulary = byte_vocabulary(student, teacher)
    ids = student.get_vocab()
    taught = teacher.get_vocab()
    shared = columns_of(vocabulary, "shared strings")
    parts = columns_of(vocabulary, "first sub-token")
    for columns in (shared, parts):
        assert columns[ids["12"]] == taught["12"]
        assert columns[ids["a"]] == taught["a"]
        assert columns[student.eos_token_id] == teacher.eos_token_id
    assert shared[ids["ab"]] == NONE
    assert parts[ids["ab"]] == taught["a"]
