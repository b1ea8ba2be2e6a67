"""Where the answer of a completion, and the reference of a row, are found."""

from __future__ import annotations

import sys

import pytest

from optimal_sampling.errors import MissingDependencyError
from optimal_sampling.verify.answers import ends_in_thinking, find_answer, last_box, reference_of
from optimal_sampling.verify.graders import resolve_grader
from optimal_sampling.verify.job import Source
from optimal_sampling.vocabulary.thinking import KNOWN_BLOCKS


@pytest.mark.parametrize(
    ("row", "reference"),
    [
        ({"answer": "5", "solution": r"\boxed{6}"}, "5"),
        ({"answer": 5}, "5"),
        ({"answer": 0.5}, "0.5"),
        # GSM8K as its authors publish it
        ({"question": "?", "answer": "2+3 = <<2+3=5>>5\n#### 1,005"}, "1,005"),
        # MATH has no column of answers
        (
            {"problem": "?", "solution": r"First \boxed{4}, so $\boxed{\frac{1}{2}}$."},
            r"\frac{1}{2}",
        ),
        # OlympiadBench has lists
        ({"final_answer": ["7"]}, "7"),
        ({"final_answer": ["7", "8"]}, None),
        # a solution without an answer that can be told is no reference
        ({"solution": "Left to the reader."}, None),
        # an empty column does not hide the next one
        ({"answer": "", "solution": r"\boxed{4}"}, "4"),
        ({"answer": None, "ground_truth": "3"}, "3"),
        # a truth value is no number
        ({"answer": True}, None),
        ({"answer": {"value": 3}}, None),
        ({}, None),
    ],
)
def test_the_reference_of_a_row(row, reference):
    """Guards: datasets whose columns are read as something else than their answer."""
    assert reference_of(row) == reference


def test_a_named_column_is_the_only_one():
    """Guards: another column that is graded with, where the named one is empty."""
    row = {"answer": "5", "other": "6", "empty": None}
    assert reference_of(row, "other") == "6"
    assert reference_of(row, "empty") is None


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"\boxed{a}{b}", "a"),
        (r"\boxed {5}", "5"),
        (r"\boxed{\left\{ 1 \right\}}", r"\left\{ 1 \right\}"),
        (r"\boxed{1}\boxed{", "1"),
        (r"\boxedx{1}", None),
        (r"\boxed", None),
        ("{" * 50_000, None),
    ],
)
def test_the_last_box(text, answer):
    """Guards: braces that are miscounted."""
    assert last_box(text) == answer


def test_many_open_boxes_take_no_time():
    """Guards: a search that is quadratic in the boxes of a text that repeats itself."""
    assert last_box(r"\boxed{" * 20_000) is None


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("So the answer is: **7**.", "7"),
        ("FINAL ANSWER: 7", "7"),
        ("Answer:\n7", "7"),
        ("My answers are many", None),
        ("#### 7\n", "7"),
        ("The answer is", None),
    ],
)
def test_a_stated_answer(text, answer):
    """Guards: models that were not told to box their answer, and are all wrong."""
    assert find_answer(text) == answer


def test_the_prompt_that_opens_a_block():
    """Guards: reasoning that begins in the prompt, taken for an answer."""
    assert ends_in_thinking("<|im_start|>assistant\n<think>\n", KNOWN_BLOCKS)
    assert not ends_in_thinking("<think>\n\n</think>\n\n", KNOWN_BLOCKS)


def test_the_models_own_markers_count():
    """Guards: markers of a run's chat template that only its prompts know."""
    own = Source(resolve_grader("synthetic"), None, lambda: (("<<", ">>"), *KNOWN_BLOCKS))
    record = {
        "completion": r"\boxed{3}>>\boxed{4}",
        "student_prompt": "question <<",
        "teacher_prompt": "question",
        "finish_reason": "stop",
        "row": {},
    }
    task = own.task(record, "4")
    assert (task.in_thinking, task.answer) == (True, "4")
    drawn_from_teacher = own.task({**record, "mode": "teacher"}, "4")
    assert not drawn_from_teacher.in_thinking


def test_without_math_verify(monkeypatch):
    """Guards: an ImportError in a process of the pool instead of the command that helps."""
    monkeypatch.setitem(sys.modules, "math_verify", None)
    with pytest.raises(MissingDependencyError, match=r"pip install '\.\[eval\]'"):
        resolve_grader("math")
