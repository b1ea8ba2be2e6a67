"""Arithmetic problems of 1 to 5 steps, their solutions, and the grading of answers.

Everything is a function of a seed. Plain Python, without models or tokenizers.
"""

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

__all__ = ["box_span", "boxed", "is_correct", "synthetic_rows"]

Step = tuple[int, str, int, int]  # left, operator, right, result
Compute = Callable[[int, str, int, int], int]  # left, operator, right, index of the step -> result

MAX_STEPS = 5
LARGEST = 999  # no result is larger, none is negative
PRODUCT_SHARE = 0.8  # of first operations; the others are sums


def exact(left: int, operator: str, right: int, index: int = 0) -> int:
    """The true result of one operation."""
    return {"*": left * right, "+": left + right, "-": left - right}[operator]


@dataclass(frozen=True)
class Problem:
    """`numbers[0] operators[0] numbers[1] ...`; precedence and left to right agree."""

    numbers: tuple[int, ...]
    operators: str

    @property
    def steps(self) -> int:
        """Number of operations."""
        return len(self.operators)

    @property
    def expression(self) -> str:
        """The operations without the question mark."""
        return str(self.numbers[0]) + tail(self, 0)

    @property
    def text(self) -> str:
        """The user turn."""
        return f"{self.expression}=?"

    @property
    def answer(self) -> str:
        """The true result, in digits."""
        return str(results(self)[-1][3])

    @property
    def solution(self) -> str:
        r"""The operations with their results, and the answer in `\boxed{}`."""
        return worked(results(self))


def make_problem(seed: int, index: int, steps: int | None = None) -> Problem:
    """Problem `index` of a seed. `steps=None`: 1 to 5 steps, all equally likely."""
    rng = random.Random(f"problem:{seed}:{index}")
    length = rng.randint(1, MAX_STEPS)
    steps = length if steps is None else steps
    first = rng.randint(10, 99)
    if rng.random() < PRODUCT_SHARE:
        numbers, operators = [first, rng.randint(2, 9)], "*"
    else:
        numbers, operators = [first, rng.randint(10, 99)], "+"
    value = exact(numbers[0], operators, numbers[1])
    while len(operators) < steps:
        number = rng.randint(10, 99)
        allowed = ["+"] * (value + number <= LARGEST) + ["-"] * (value >= number)
        operator = rng.choice(allowed)
        value = exact(value, operator, number)
        numbers.append(number)
        operators += operator
    return Problem(tuple(numbers), operators)


def results(problem: Problem, compute: Compute = exact) -> list[Step]:
    """The operations in order, each starting from the result of `compute` before it."""
    steps: list[Step] = []
    value = problem.numbers[0]
    operations = zip(problem.operators, problem.numbers[1:], strict=True)
    for index, (operator, number) in enumerate(operations):
        result = compute(value, operator, number, index)
        steps.append((value, operator, number, result))
        value = result
    return steps


def worked(steps: list[Step]) -> str:
    r"""A worked solution: `47*3=141; 141+85=226. \boxed{226}`."""
    equations = [f"{left}{operator}{right}={result}" for left, operator, right, result in steps]
    return rf"{'; '.join(equations)}. \boxed{{{steps[-1][3]}}}"


def box_span(text: str) -> tuple[int, int] | None:
    r"""Start and end of the content of the last complete `\boxed{...}`, with balanced braces."""
    start = text.rfind(r"\boxed{")
    while start >= 0:
        inside = start + len(r"\boxed{")
        depth = 1
        for position, character in enumerate(text[inside:], start=inside):
            depth += {"{": 1, "}": -1}.get(character, 0)
            if depth == 0:
                return inside, position
        start = text.rfind(r"\boxed{", 0, start)
    return None


def boxed(completion: str) -> str | None:
    r"""Content of the last complete `\boxed{...}`."""
    span = box_span(completion)
    return None if span is None else completion[span[0] : span[1]]


def is_correct(completion: str, answer: str) -> bool:
    """Whether the last box holds the same integer as `answer`."""
    try:
        return int(boxed(completion) or "") == int(answer)
    except ValueError:
        return False


def synthetic_rows(seed: int, n: int) -> Iterator[dict[str, str | int]]:
    """Rows of the dataset `synthetic`: the first `n` problems of a seed."""
    for index in range(n):
        problem = make_problem(seed, index)
        yield {
            "problem": problem.text,
            "answer": problem.answer,
            "solution": problem.solution,
            "steps": problem.steps,
        }


def tail(problem: Problem, start: int) -> str:
    """The operations from `start` on, as text: `+85-19`."""
    pairs = zip(problem.operators[start:], problem.numbers[start + 1 :], strict=True)
    return "".join(f"{operator}{number}" for operator, number in pairs)
