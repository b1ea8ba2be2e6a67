"""Rows and grading of the lm-eval tasks in this folder. lm-eval loads this file by its path.

Grades with lm-eval's and math-verify's own comparisons, none of this package's.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from tempfile import TemporaryDirectory
from typing import Any


def process_docs(dataset: Any) -> Any:
    """The rows with the columns `problem` and `answer`, whatever the benchmark calls them."""
    from optimal_sampling.evaluate.benchmarks import benchmark_row

    def renamed(row: Mapping[str, Any]) -> dict[str, str]:
        return {name: str(benchmark_row(row)[name]) for name in ("problem", "answer")}

    return dataset.map(renamed, remove_columns=dataset.column_names)


def synthetic(**_: Any) -> dict[str, Any]:
    """The rows of the benchmark `synthetic`."""
    from datasets import Dataset

    from optimal_sampling.evaluate.benchmarks import BENCHMARKS, prepare
    from optimal_sampling.evaluate.options import EvaluateConfig

    with TemporaryDirectory() as folder:
        config = EvaluateConfig(extra_models=("toy-student",), output_dir=folder)
        questions = prepare(BENCHMARKS["synthetic"], config)
        lines = questions.path.read_text("utf-8").splitlines()
    return {"test": Dataset.from_list([json.loads(line) for line in lines])}


def process_results(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, int]:
    """`exact_match`: the last box, normalised as text, against the reference answer.
    `math_verify`: math-verify on the whole completion.
    """
    return {
        "exact_match": int(_is_exact_match(results[0], doc["answer"])),
        "math_verify": int(_is_verified(results[0], doc["answer"])),
    }


def _is_exact_match(completion: str, answer: str) -> bool:
    from lm_eval.tasks.hendrycks_math.utils import is_equiv, last_boxed_only_string, remove_boxed

    box = last_boxed_only_string(completion)
    if box is None:
        return False
    try:
        return bool(is_equiv(remove_boxed(box), answer))
    except AssertionError:  # of `\boxed 5`, of `\fbox{5}`
        return False


def _is_verified(completion: str, answer: str) -> bool:
    from math_verify import parse, verify

    return bool(verify(parse(f"${answer}$"), parse(completion)))
