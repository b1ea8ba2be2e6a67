"""What `--hint` shows of a solution: the right one, a wrong one, or that of another row.

Controls for privileged prompts: a teacher that gains as much from a wrong solution does not use it.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from typing import Any

from optimal_sampling.errors import PromptError
from optimal_sampling.prompts.rows import conversation_of, value_text
from optimal_sampling.toy_pair.problems import box_span
from optimal_sampling.types import Hint

__all__ = ["HINT_COLUMNS", "hint_columns", "wrong_answer", "wrong_solution"]

HINT_COLUMNS = ("hint", "solution", "answer", "privileged_context")
"""Columns that show the hint in the prompt it is for."""

_CHOICE = re.compile(r"(?P<before>(\\text\{)?\(?)(?P<letter>[A-Z])(?P<after>\)?\}?)")
_NUMBER = re.compile(r"[0-9]{1,18}")  # of a longer one its first digits, which change it too
_TAIL = "####"
"""Mark before the final answer in solutions of GSM8K."""


def hint_columns(
    kind: Hint,
    row: Mapping[str, Any],
    following: Mapping[str, Any] | None = None,
    answer_column: str | None = None,
) -> dict[str, str]:
    """HINT_COLUMNS as a hint of this kind shows them; empty for `none`.

    `following` is the row whose solution `other` shows. Raises PromptError where there is none to
    show, or no answer to change.
    """
    if kind == "none":
        return {}
    source = row if kind != "other" else following
    if source is None:
        raise PromptError("the hint `other` needs a dataset of two rows or more")
    answer = _text(source, answer_column or "answer")
    solution = _text(source, "solution") or _privileged(source) or answer
    if not solution:
        raise PromptError(f"the hint `{kind}` needs a column solution or answer with a text")
    answer = answer or _stated_answer(solution) or ""
    if kind == "wrong":
        if not answer:
            raise PromptError("the hint `wrong` needs an answer to change: the row has none")
        wrong = wrong_answer(answer)
        solution, answer = wrong_solution(solution, answer, wrong), wrong
    return dict.fromkeys(HINT_COLUMNS, solution) | {"answer": answer}


def wrong_answer(answer: str) -> str:
    """Another answer of the same form, a function of the answer alone.

    The next letter for a choice, another first number, or else `not` the answer.
    """
    choice = _CHOICE.fullmatch(answer.strip())
    if choice:
        letter = "ABCDA"["ABCD".find(choice["letter"]) + 1]
        return f"{choice['before']}{letter}{choice['after']}"
    number = _NUMBER.search(answer)
    if number is None:
        return f"not {answer}"
    step = 1 + hashlib.blake2b(answer.encode("utf-8", "replace"), digest_size=1).digest()[0] % 9
    changed = f"{int(number[0]) + step:0{len(number[0])}d}"
    return answer[: number.start()] + changed + answer[number.end() :]


def wrong_solution(solution: str, right: str, wrong: str) -> str:
    r"""The solution with another final answer.

    Replaced is the last `\boxed{}`, else what follows the last `####`, else the last place where
    the right answer stands as a word; a solution that states none is followed by the wrong one.
    """
    box = box_span(solution)
    if box:
        return solution[: box[0]] + wrong + solution[box[1] :]
    before, mark, _ = solution.rpartition(_TAIL)
    if mark:
        return f"{before}{mark} {wrong}"
    word = rf"(?<![\w.]){re.escape(right)}(?!\w|\.\d)"
    places = list(re.finditer(word, solution))
    if not places:
        return rf"{solution}" + "\n\n" + rf"The final answer is \boxed{{{wrong}}}."
    return solution[: places[-1].start()] + wrong + solution[places[-1].end() :]


def _stated_answer(solution: str) -> str | None:
    """The final answer that a solution marks as such."""
    box = box_span(solution)
    if box:
        return solution[box[0] : box[1]]
    _, mark, tail = solution.rpartition(_TAIL)
    return tail.strip() if mark else None


def _text(row: Mapping[str, Any], column: str) -> str:
    return value_text(row.get(column), column) or ""


def _privileged(row: Mapping[str, Any]) -> str:
    """TRL's `privileged_context`, a text or turns."""
    return "" if "privileged_context" not in row else conversation_of(row).privileged or ""
