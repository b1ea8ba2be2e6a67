"""Records made without models."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from optimal_sampling.records.schema import Prompt, Record, completion_record, failure_record
from optimal_sampling.types import TRACE_FIELDS, Completion, Request, TokenTrace


def build_record(
    number: int = 0,
    *,
    sample_index: int = 0,
    error: str = "",
    attempts: int = 1,
    row: Any = None,
    tokens: int = 3,
) -> Record:
    prompt = Prompt(
        f"{number:032x}",
        number,
        row or {"problem": f"{number}+1=?"},
        f"<s>{number}",
        f"<t>{number}",
        4,
        5,
    )
    if error:
        return failure_record(prompt, sample_index, 7, error, attempts=attempts, token_lists=True)
    request = Request(prompt.id, sample_index, 7, (1, 2, 3, 4), (1, 2, 3, 4, 5), 16)
    rows = [tuple(0.1 * (place + 1) for _ in TRACE_FIELDS) for place in range(tokens)]
    completion = Completion(
        request, tuple(range(tokens)), "stop", TokenTrace.from_rows(rows), seconds=0.25
    )
    return completion_record(
        prompt, completion, f"answer {number} π", attempts=attempts, token_lists=True
    )


@pytest.fixture
def make_record() -> Callable[..., Record]:
    return build_record
