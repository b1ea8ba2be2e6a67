"""Grading of completions: is the answer that of the dataset?

    answers   a completion -> its answer; a row -> its reference answer
    normalise an answer -> its plain form, without what changes its looks alone
    numbers   rules for integers, fractions, percentages, number bases and ratios
    compare   two answers -> do they mean the same? All rules, then math-verify
    graders   `math`, `synthetic`, and functions of the user, by name
    pool      graders in processes, with a hard limit of time and memory per completion
    worker    what such a process runs
    job       a run folder -> verdicts; and verdicts while a run goes
    progress  its counts, shown while it goes

math-verify is loaded in the processes alone.
"""

from __future__ import annotations

from optimal_sampling.verify.graders import Grade, Task, grade, resolve_grader
from optimal_sampling.verify.pool import GraderPool

__all__ = ["Grade", "GraderPool", "Task", "grade", "resolve_grader"]
