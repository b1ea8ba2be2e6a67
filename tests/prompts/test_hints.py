"""Which solution a hint shows, and where in which prompt it stands."""

from __future__ import annotations

import pytest

from optimal_sampling.config import PromptConfig
from optimal_sampling.errors import ConfigError, PromptError
from optimal_sampling.prompts import PromptRenderer
from optimal_sampling.prompts.hints import hint_columns, wrong_answer, wrong_solution
from optimal_sampling.toy_pair.problems import is_correct, synthetic_rows
from tests.vocabulary.conftest import vocabulary_of

ROW = {"problem": "1+1=?", "answer": "2", "solution": r"1+1=2. \boxed{2}"}
NEXT = {"problem": "3*3=?", "answer": "9", "solution": r"3*3=9. \boxed{9}"}


def test_kinds():
    """Guards: a `wrong` hint that is right, and an `other` one that is the row's own."""
    assert hint_columns("none", ROW, NEXT) == {}
    right = hint_columns("right", ROW, NEXT)
    assert (right["hint"], right["answer"]) == (ROW["solution"], "2")
    other = hint_columns("other", ROW, NEXT)
    assert (other["solution"], other["answer"]) == (NEXT["solution"], "9")
    wrong = hint_columns("wrong", ROW, NEXT)
    assert wrong["answer"] != "2"
    assert wrong["hint"] == rf"1+1=2. \boxed{{{wrong['answer']}}}"


def test_no_wrong_solution_is_right():
    """Guards: an answer that is changed into itself."""
    for row in synthetic_rows(7, 300):
        wrong = hint_columns("wrong", row)
        assert is_correct(str(row["solution"]), str(row["answer"]))
        assert not is_correct(wrong["hint"], str(row["answer"]))
        assert is_correct(wrong["hint"], wrong["answer"])


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("(C)", "(D)"),
        (r"\text{(D)}", r"\text{(A)}"),
        ("E", "A"),
        (r"\text{Evelyn}", r"not \text{Evelyn}"),
        ("p - q", "not p - q"),
    ],
)
def test_answers_without_numbers(right, wrong):
    """Guards: a choice that becomes no choice, and a text whose letters change."""
    assert wrong_answer(right) == wrong


@pytest.mark.parametrize("right", ["025", "9", "1.0", r"\frac{\pi}{2}", "10,000"])
def test_numbers_change(right):
    """Guards: lost zeros in front, and changes outside of the first number."""
    changed = wrong_answer(right)
    assert changed != right
    assert len(changed) >= len(right)
    assert wrong_answer(right) == changed


def test_a_number_of_any_length_is_changed():
    """Guards: a traceback for more digits than Python reads, in the middle of a run."""
    right = "7" * 5000
    assert wrong_answer(right) != right
    assert len(wrong_answer(right)) == 5000


@pytest.mark.parametrize(
    ("solution", "expected"),
    [
        (r"\boxed{7} or \boxed{7}", r"\boxed{7} or \boxed{8}"),
        (r"\boxed{\frac{7}{1}}.", r"\boxed{8}."),
        ("3+4 = <<3+4=7>>7\n#### 7", "3+4 = <<3+4=7>>7\n#### 8"),
        ("7 is 7, not 17 or 7.5, end", "7 is 8, not 17 or 7.5, end"),
        ("as is known.", "as is known.\n\nThe final answer is \\boxed{8}."),
    ],
)
def test_where_the_answer_is_replaced(solution, expected):
    """Guards: a solution that still ends with the right answer."""
    assert wrong_solution(solution, "7", "8") == expected


def test_columns_that_stand_in_for_a_solution():
    """Guards: datasets of TRL, and those with answers only, without any hint."""
    assert hint_columns("right", {"problem": "x", "answer": 7})["hint"] == "7"
    row = {"prompt": "x", "privileged_context": r"so \boxed{5}"}
    assert hint_columns("right", row)["hint"] == r"so \boxed{5}"
    assert hint_columns("wrong", row)["hint"] == rf"so \boxed{{{wrong_answer('5')}}}"
    assert hint_columns("right", {"q": "x", "gold": "3"}, answer_column="gold")["answer"] == "3"


def test_rows_without_a_hint():
    """Guards: a prompt that says it shows a solution and shows none."""
    for row in ({"problem": "x"}, {"problem": "x", "answer": None, "solution": ""}):
        with pytest.raises(PromptError, match="needs a column solution or answer"):
            hint_columns("right", row)
    with pytest.raises(PromptError, match="has none"):
        hint_columns("wrong", {"problem": "x", "solution": "left to the reader"})
    with pytest.raises(PromptError, match="two rows"):
        hint_columns("other", ROW, None)


def rendered(row=ROW, following=NEXT, **options):
    config = PromptConfig(chat_template=False, **options)
    return PromptRenderer(config, vocabulary_of(), columns=row).render(row, following)


def test_the_hint_stands_in_one_prompt():
    """Guards: a hint in both prompts, in none, or in that of the other model."""
    for role, other in (("teacher", "student"), ("student", "teacher")):
        prompts = rendered(hint="other", hint_to=role)
        assert getattr(prompts, f"{other}_text") == "1+1=?"
        shown = getattr(prompts, f"{role}_text")
        assert shown == "1+1=?\n\nReference solution:\n" + NEXT["solution"]
    assert rendered().teacher_text == "1+1=?"


def test_the_hint_takes_the_place_of_the_solution():
    """Guards: a wrong hint beside the right solution, which the template still shows."""
    template = "{problem} {answer} {solution} {hint} {privileged_context}"
    text = rendered(hint="other", teacher_template=template).teacher_text
    assert text == "1+1=? 9 " + " ".join([NEXT["solution"]] * 3)
    row = {"prompt": "1+1=?", "privileged_context": r"\boxed{2}"}
    text = rendered(row, hint="wrong").teacher_text
    assert text == rf"1+1=?{chr(10) * 2}Reference solution:{chr(10)}\boxed{{{wrong_answer('2')}}}"


def test_templates_that_ask_for_no_hint():
    """Guards: the text {hint} in prompts, and a failure of every row instead of the call."""
    with pytest.raises(ConfigError, match="--hint right, wrong or other"):
        rendered(teacher_template="{problem} {hint}")
    with pytest.raises(ConfigError, match="--hint-to student"):
        rendered(hint="right", student_template="{problem} {hint}")
