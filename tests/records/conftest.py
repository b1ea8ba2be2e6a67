"""Records made without models."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from optimal_sampling.records.schema import Prompt, Record, Sample, record_of
from optimal_sampling.types import TRACE_FIELDS, Completion, Request, TokenTrace


def build_record(number: int = 0, *, error: str = "", attempts: int = 1, tokens: int = 3) -> Record:
    """A record of row `number`; with an error, that of a row that could not be rendered."""
    prompt = Prompt(
        id=f"{number:032x}",
        row_index=number,
        row={"problem": f"{number}+1=?"},
        student_text=f"<s>{number}",
        teacher_text=f"<t>{number}",
        n_student_tokens=4,
        n_teacher_tokens=5,
    )
    request = Request(prompt.id, 0, 7, (1, 2, 3, 4), (1, 2, 3, 4, 5), 16)
    if error:
        completion = Completion(request, (), "error", TokenTrace.from_rows([]), error)
        return record_of(Sample(prompt, completion, "", attempts))
    rows = [tuple(0.1 * (place + 1) for _ in TRACE_FIELDS) for place in range(tokens)]
    trace = TokenTrace.from_rows(rows)
    completion = Completion(request, tuple(range(tokens)), "stop", trace, seconds=0.25)
    return record_of(Sample(prompt, completion, f"answer {number} π", attempts))


@pytest.fixture
def make_record() -> Callable[..., Record]:
    return build_record
