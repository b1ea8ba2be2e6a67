"""Graders by name: `math`, `synthetic`, and `FILE.py:function` for one's own."""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from optimal_sampling.config import expand_user
from optimal_sampling.errors import ConfigError, MissingDependencyError, did_you_mean
from optimal_sampling.records.verdicts import VERDICTS, Verdict
from optimal_sampling.verify.answers import Block, answer_text, find_answer
from optimal_sampling.vocabulary.thinking import KNOWN_BLOCKS

__all__ = [
    "BUILT_IN",
    "Grade",
    "Grader",
    "GraderSpec",
    "Task",
    "grade",
    "load_grader",
    "resolve_grader",
]

BUILT_IN = ("math", "synthetic")
_SHOWN = 200  # characters of a value that a user's function returned


@dataclass(frozen=True, slots=True)
class Task:
    """One completion to grade."""

    completion: str
    reference: str | None
    """The reference answer; None where the row has none."""
    finish_reason: str = "stop"
    """`length` makes the verdict `truncated`."""
    in_thinking: bool = False
    """The prompt ends within a thinking block that the completion has to close."""
    row: Mapping[str, Any] = field(default_factory=dict)
    """The row of the dataset, for functions of the user."""
    blocks: Sequence[Block] = KNOWN_BLOCKS
    """Opening and closing markers of reasoning."""

    @property
    def answer(self) -> str | None:
        """The answer in the completion: after its reasoning, in a box, or stated."""
        text = answer_text(self.completion, self.blocks, in_thinking=self.in_thinking)
        return find_answer(text)


@dataclass(frozen=True, slots=True)
class Grade:
    """What a grader said."""

    verdict: Verdict
    answer: str | None = None
    """The answer that was found in the completion."""
    detail: str | None = None
    """Why, where the verdict alone does not say it."""
    failed: bool = False
    """The grader took too long, died or raised an error."""


Grader = Callable[[Task], Grade]


@dataclass(frozen=True)
class GraderSpec:
    """A grader that exists, not loaded yet."""

    name: str
    """As in verdicts: `math`, `synthetic`, or `FILE.py:function@` with a hash of the file."""
    path: str | None = None
    """File of a function of the user."""
    function: str = ""

    @property
    def verdict_of_failure(self) -> Verdict:
        """Of a completion on which the grader hangs or dies.

        Only an answer can do that to `math`, and no right answer does.
        """
        return "wrong" if self.path is None else "skipped"


def resolve_grader(spec: str) -> GraderSpec:
    """The grader `math`, `synthetic` or `FILE.py:function`. Runs no code of the file.

    Raises ConfigError where there is none, MissingDependencyError without math-verify.
    """
    if spec == "math" and importlib.util.find_spec("math_verify") is None:
        raise MissingDependencyError(
            "the grader math needs math-verify: pip install '.[eval]' in the folder of this package"
        )
    if spec in BUILT_IN:
        return GraderSpec(spec)
    file, colon, function = spec.rpartition(":")
    if not colon or not file.endswith(".py"):
        raise ConfigError(
            f"unknown grader {spec!r}{did_you_mean(spec, BUILT_IN)}; "
            f"there are {', '.join(BUILT_IN)} and FILE.py:function"
        )
    path = expand_user(file)
    try:
        source = path.read_bytes()
        functions = _functions(source)
    except OSError as error:
        raise ConfigError(f"cannot read the grader's file {file}: {error.strerror}") from error
    except (SyntaxError, ValueError) as error:
        raise ConfigError(f"the grader's file {file} is no Python: {error}") from error
    if function not in functions:
        raise ConfigError(
            f"{file} has no function {function!r}{did_you_mean(function, functions)}; "
            f"it has: {', '.join(functions) or 'none'}"
        )
    digest = hashlib.blake2b(source, digest_size=4).hexdigest()
    return GraderSpec(f"{path.name}:{function}@{digest}", str(path.absolute()), function)


def _functions(source: bytes) -> list[str]:
    """Names that the file gives at its top level to functions, and to other values."""
    names = []
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef):
            names.append(node.name)
        elif isinstance(node, ast.Assign):
            names += [target.id for target in node.targets if isinstance(target, ast.Name)]
        elif isinstance(node, ast.ImportFrom):
            names += [alias.asname or alias.name for alias in node.names]
    return names


def load_grader(spec: GraderSpec) -> Grader:
    """The grader, ready to grade. Runs the user's file. Raises ConfigError."""
    if spec.path is not None:
        return _user_grader(spec)
    if spec.name == "synthetic":
        return _grade_synthetic
    from optimal_sampling.verify.compare import load_math_verify

    load_math_verify()
    return _grade_math


def grade(task: Task, grader: Grader) -> Grade:
    """The verdict of a grader on a completion; `truncated` before it is asked.

    Raises MemoryError and what the grader itself does not handle.
    """
    return Grade("truncated") if task.finish_reason == "length" else grader(task)


def _grade_math(task: Task) -> Grade:
    from optimal_sampling.verify.compare import is_same, is_same_text, why_unusable

    if task.reference is None:
        return Grade("skipped", detail="the row has no reference answer")
    answer = task.answer
    if reason := why_unusable(task.reference):
        same = answer is not None and is_same_text(answer, task.reference)
        return Grade("correct", answer) if same else Grade("skipped", answer, reason)
    if answer is None:
        return Grade("no_answer")
    same = is_same(answer, task.reference)
    return Grade("correct" if same else "wrong", answer)


def _grade_synthetic(task: Task) -> Grade:
    from optimal_sampling.toy_pair.problems import boxed, is_correct

    if task.reference is None:
        return Grade("skipped", detail="the row has no reference answer")
    if not is_correct(rf"\boxed{{{task.reference}}}", task.reference):
        return Grade("skipped", detail=f"the reference {task.reference!r:.{_SHOWN}} is no integer")
    answer = boxed(task.completion)
    if answer is None:
        return Grade("no_answer")
    same = is_correct(task.completion, task.reference)
    return Grade("correct" if same else "wrong", answer)


def _user_grader(spec: GraderSpec) -> Grader:
    """The user's function, called with (completion, reference, row)."""
    function = _load_function(spec)
    name = f"{Path(spec.path or '').name}:{spec.function}"

    def grader(task: Task) -> Grade:
        try:
            value = function(task.completion, task.reference, dict(task.row))
        except MemoryError:
            raise
        except Exception as error:
            frames = traceback.extract_tb(error.__traceback__)
            lines = [frame.lineno for frame in frames if frame.filename == spec.path]
            place = f" (line {lines[-1]})" if lines else ""
            reason = f"{name} raised {type(error).__name__}: {error}{place}"
            return Grade("skipped", detail=reason, failed=True)
        if isinstance(value, bool):
            return Grade("correct" if value else "wrong")
        if isinstance(value, str) and value in VERDICTS:
            return Grade(value)
        wanted = f"True, False or one of {', '.join(VERDICTS)}"
        reason = f"{name} returned {value!r:.{_SHOWN}} instead of {wanted}"
        return Grade("skipped", detail=reason, failed=True)

    return grader


def _load_function(spec: GraderSpec) -> Callable[..., Any]:
    path = str(spec.path)
    module_spec = importlib.util.spec_from_file_location("grader_of_the_user", path)
    assert module_spec is not None
    assert module_spec.loader is not None
    module = importlib.util.module_from_spec(module_spec)
    try:
        module_spec.loader.exec_module(module)
        function: Callable[..., Any] = getattr(module, spec.function)
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        raise ConfigError(f"the grader's file {path} could not be loaded: {reason}") from error
    if not callable(function):
        raise ConfigError(f"{spec.function} of {path} is no function")
    return function
