import re
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from toy_training_data import STYLES, hinted, solve, wrong_at

from optimal_sampling.toy_pair import problems
from optimal_sampling.toy_pair.problems import Problem, make_problem

numbered = st.builds(make_problem, st.integers(), st.integers(0, 10**6))


@given(numbered)
def test_a_problem_is_right_and_stays_in_range(problem: Problem):
    assert eval(problem.expression) == int(problem.answer)
    assert 1 <= problem.steps <= problems.MAX_STEPS
    assert all(0 <= result <= problems.LARGEST for *_, result in problems.results(problem))


@given(numbered, st.sampled_from(STYLES))
def test_every_equation_of_a_solution_holds(problem: Problem, style):
    solution = solve(problem, style)
    body = solution[: solution.rindex(r"\boxed{")]
    for line in re.split(r"[;\n.] ?", body):
        values = {eval(side) for side in line.split("=")} if line.strip() else {0}
        assert len(values) == 1, line
    assert problems.is_correct(solution, problem.answer)


@given(numbered)
def test_the_styles_agree_on_the_first_token(problem: Problem):
    assert len({solve(problem, style)[0] for style in STYLES}) == 1


@given(numbered, st.sampled_from(STYLES), st.randoms(use_true_random=False), st.data())
def test_a_mistake_is_carried_on(problem: Problem, style, rng, data):
    step = data.draw(st.integers(0, problem.steps - 1))
    mistake = wrong_at(problem, {step}, rng)
    right, mistaken = problems.results(problem), problems.results(problem, mistake)
    assert [r == m for r, m in zip(right, mistaken, strict=True)][: step + 1] == [True] * step + [
        False
    ]
    assert all(later[0] == earlier[3] for earlier, later in pairwise(mistaken))
    assert problems.is_correct(solve(problem, style, mistake), str(mistaken[-1][3]))


def test_a_problem_depends_on_seed_and_index_alone():
    """Guards the shards: worker 3 must see the same problem 17 as a run on one machine."""
    late = make_problem(5, 17)
    assert [make_problem(5, i) for i in range(30)][17] == late
    assert make_problem(6, 17) != late


def test_known_problem_in_all_styles():
    problem = Problem((47, 3, 85, 19), "*+-")
    assert problem.text == "47*3+85-19=?"
    assert solve(problem, "A") == r"47*3=141; 141+85=226; 226-19=207. \boxed{207}"
    assert solve(problem, "B") == (
        r"47*3=40*3+7*3=120+21=141; 141+85=141+80+5=221+5=226; "
        r"226-19=226-10-9=216-9=207. \boxed{207}"
    )
    assert solve(problem, "C") == "47*3=(141)\n141+85=(226)\n226-19=(207)\n\\boxed{207}"
    assert solve(problem, "D") == r"47*3+85-19=141+85-19=226-19=207. \boxed{207}"


def test_lengths_are_equally_likely():
    counts = [
        sum(make_problem(0, i).steps == n for i in range(5000))
        for n in range(1, problems.MAX_STEPS + 1)
    ]
    assert min(counts) > 880  # 1000 expected, standard deviation 28
    assert max(counts) < 1120


@pytest.mark.parametrize(
    ("completion", "right"),
    [
        (r"\boxed{207}", True),
        (r"\boxed{207}<|end|>", True),
        (r"\boxed{1} and \boxed{ 207 }", True),
        (r"\boxed{207} and \boxed{1}", False),
        (r"\boxed{207} and \boxed{1", True),
        (r"\boxed{{207}}", False),
        (r"\boxed{}", False),
        ("207", False),
        ("", False),
    ],
)
def test_grading(completion: str, right: bool):
    assert problems.is_correct(completion, "207") is right


def test_rows_of_the_data_set():
    rows = list(problems.synthetic_rows(3, 20))
    assert len(rows) == 20
    assert rows[:5] == list(problems.synthetic_rows(3, 5))
    for row in rows:
        assert list(row) == ["problem", "answer", "solution", "steps"]
        assert problems.is_correct(row["solution"], row["answer"])


def test_a_hint_is_on_its_own_line():
    assert hinted("47*3=?", "141") == "47*3=?\nHint: 141"
