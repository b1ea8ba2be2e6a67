"""How the grader `math` does on the reference answers of datasets: `check_grading.py FILE.jsonl...`

Each reference is graded against itself in the forms in which models write it, which must be
`correct`; against itself with its last number raised by one, and against that of the next row with
another answer, which must be `wrong`. Prints counts, and each case that differs.
"""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from optimal_sampling.verify import Task, grade, resolve_grader
from optimal_sampling.verify.answers import reference_of
from optimal_sampling.verify.graders import load_grader

MATH = load_grader(resolve_grader("math"))
IS_INTEGER = re.compile(r"-?\d{1,12}")
IS_NUMBER = re.compile(r"\d+(\.\d+)?")


def forms(answer: str) -> Iterator[tuple[str, str]]:
    """Completions that give this answer, each with the name of its form."""
    yield "boxed", rf"So it is $\boxed{{{answer}}}$."
    yield "display", "\\[\n\\boxed{\\displaystyle " + answer + "}\n\\]"
    yield "two boxes", rf"Is it \boxed{{99991}}? No: \boxed{{{answer}}}"
    yield "after thinking", rf"<think>\boxed{{99991}}</think>\boxed{{{answer}}}"
    yield "stated", f"The final answer is ${answer}$."
    yield "hashes", f"#### {answer}"
    for name, changed in changed_forms(answer):
        if changed != answer:
            yield name, rf"\boxed{{{changed}}}"


def changed_forms(answer: str) -> Iterator[tuple[str, str]]:
    """The answer, written in another way where it has the form for it."""
    yield "slash", re.sub(r"^(-?)\\d?frac\{(\d+)\}\{(\d+)\}$", r"\1\2/\3", answer)
    yield "dfrac", answer.replace(r"\frac", r"\dfrac")
    yield "radical", re.sub(r"\\sqrt\{(\d)\}", r"\\sqrt\1", answer)
    yield "left right", re.sub(r"^\((.*)\)$", r"\\left( \1 \\right)", answer)
    yield "no unit", re.sub(r"(?<=[\d}])\s*\\(text|mbox)\s*\{[^{}:]*\}(\^\d)?\.?$", "", answer)
    yield "no degree", re.sub(r"\^\{?\\circ\}?", "", answer)
    yield "no percent", re.sub(r"\s*\\?%$", "", answer)
    yield "no base", re.sub(r"^(\w+)_\{?\d+\}?$", r"\1", answer)
    yield "choice", re.sub(r"^\\text\{\(?([A-Z])\)?\}$", r"\1", answer)
    yield "choice in brackets", re.sub(r"^\\text\{\(?([A-Z])\)?\}$", r"(\1)", answer)
    yield "words", re.sub(r"^\\text\{([^{}]*)\}$", r"\1", answer)
    if IS_INTEGER.fullmatch(answer):
        yield "decimal", f"{answer}.0"
        yield "thousands", f"{int(answer):,}"
        yield "assigned", f"x = {answer}"
    if IS_NUMBER.fullmatch(answer):
        yield "currency", rf"\${answer}"
        yield "unit", rf"{answer}\text{{ units}}"


def others(answer: str, following: list[str]) -> Iterator[tuple[str, str]]:
    """Completions that give another answer."""
    numbers = list(re.finditer(r"\d+", answer))
    if numbers:
        start, end = numbers[-1].span()
        yield "raised", rf"\boxed{{{answer[:start]}{int(numbers[-1][0]) + 1}{answer[end:]}}}"
    other = next((text for text in following if text != answer), None)
    if other is not None:
        yield "next row", rf"\boxed{{{other}}}"


def check(path: Path) -> None:
    """Print the counts of one file."""
    rows = [json.loads(line) for line in path.open(encoding="utf-8")]
    references = [text for text in map(reference_of, rows) if text is not None]
    counts: dict[str, Counter[str]] = {"correct": Counter(), "wrong": Counter()}
    for place, reference in enumerate(references):
        cases = [("correct", *each) for each in forms(reference)]
        cases += [("wrong", *each) for each in others(reference, references[place + 1 :])]
        for expected, form, completion in cases:
            verdict = grade(Task(completion, reference), MATH).verdict
            counts[expected][form] += 1
            if verdict != expected:
                counts[expected]["not so"] += 1
                print(f"  {verdict} instead of {expected}, {form}: {completion} | {reference}")
    print(f"{path.name}: {len(rows)} rows, {len(references)} references")
    for expected, found in counts.items():
        total = found.total() - found["not so"]
        print(f"  {total} must be {expected}, {found['not so']} are not: {dict(found)}")


for name in sys.argv[1:]:
    check(Path(name))
