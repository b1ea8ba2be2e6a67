"""Run folders made without models: texts in the tokens of the shipped student."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer

from optimal_sampling import toy_pair
from optimal_sampling.config import (
    DataConfig,
    GenerateConfig,
    MixtureConfig,
    ModelConfig,
    RunConfig,
)
from optimal_sampling.records import RunFolder
from optimal_sampling.records.run_folder import record_lines
from optimal_sampling.records.schema import Prompt, Sample, key_of, record_of
from optimal_sampling.records.verdicts import Verdict, VerdictFile
from optimal_sampling.types import TRACE_FIELDS, Completion, Request, TokenTrace

TOKENIZER = Tokenizer.from_file(str(toy_pair.path("toy-student") / "tokenizer.json"))
END = TOKENIZER.token_to_id("<|end|>")


class Array(np.ndarray):
    """Stands for a tensor."""

    def numpy(self) -> np.ndarray:
        return np.asarray(self)


@dataclass
class Draw:
    """A sample of a run: its text, and what was found out about it."""

    text: str = "1+1=2"
    verdict: Verdict | None = None
    error: str = ""
    row: int = 0
    sample: int = 0
    values: dict[str, float] = field(default_factory=dict)
    """Of every token, by names of the trace."""
    top: int = 0
    """Top tokens per distribution."""


def completion_of(draw: Draw, request: Request) -> Completion:
    """Alpha goes from 0.5 to 1 along the text; the models differ everywhere."""
    if draw.error:
        return Completion.failed(request, draw.error)
    ids = (*TOKENIZER.encode(draw.text, add_special_tokens=False).ids, END)
    values = {"kl_student": 0.5, "kl_teacher": 0.25, "vetoed": 0.0, **draw.values}
    rows = []
    for place in range(len(ids)):
        row = dict.fromkeys(TRACE_FIELDS, 0.5) | {"alpha": 0.5 + 0.5 * place / len(ids)}
        rows.append(tuple((row | values).values()))
    captured = top_tokens(ids, draw.top) if draw.top else {}
    return Completion(request, ids, "stop", TokenTrace.from_rows(rows), captured=captured)


def top_tokens(ids: Sequence[int], k: int) -> dict[str, Array]:
    """The token drawn is the student's second, and q*'s and the teacher's first."""
    table = np.empty((len(ids), 3, k), np.int32)
    for place, drawn in enumerate(ids):
        others = [token for token in range(40, 41 + k) if token != drawn]
        table[place, 0] = [others[0], drawn, *others[1:]][:k]
        table[place, 1] = table[place, 2] = [drawn, *others][:k]
    shares = np.array([[0.6, 0.3], [0.9, 0.05], [0.8, 0.1]])
    rest = np.full((3, max(0, k - 2)), 0.01)
    log_p = np.log(np.concatenate([shares, rest], 1))[:, :k]
    return {
        "top_ids": table.view(Array),
        "top_log_p": np.tile(log_p, (len(ids), 1, 1)).astype(np.float32).view(Array),
    }


def write_run(path: Path, draws: Sequence[Draw], **mixture: object) -> Path:
    """A run folder with these samples and their verdicts."""
    config = GenerateConfig(
        models=ModelConfig(student="toy-student", teacher="toy-teacher"),
        mixture=MixtureConfig(**mixture),  # type: ignore[arg-type]
        data=DataConfig(dataset="synthetic"),
        run=RunConfig(output_dir=str(path)),
    )
    verdicts = {}
    with RunFolder(config) as folder:
        for draw in draws:
            prompt = Prompt(
                f"{draw.row:032x}", draw.row, {"problem": "p"}, f"ask {draw.row}", "teach", 3, 3
            )
            request = Request(prompt.id, draw.sample, 0, (1,), (1,), 99)
            record = record_of(Sample(prompt, completion_of(draw, request), draw.text, 1))
            folder.add(record)
            verdicts[key_of(record)] = draw.verdict
    _grade(path, verdicts)
    return path


def _grade(path: Path, verdicts: dict[tuple[str, int], Verdict | None]) -> None:
    if not any(verdicts.values()):
        return
    with VerdictFile(path, "main") as file:
        for _, line in record_lines(path):
            verdict = verdicts[key_of(line.record)]
            if verdict:
                identity = {"id": line.record["id"], "sample_index": line.record["sample_index"]}
                answers = {"answer": "2", "reference": "2" if verdict == "correct" else "3"}
                file.append(
                    {
                        **identity,
                        "verdict": verdict,
                        **answers,
                        "grader": "math",
                        "record": line.checksum,
                        "detail": None,
                        "failed": False,
                    }  # type: ignore[typeddict-item]
                )


@pytest.fixture
def draw() -> type[Draw]:
    return Draw


@pytest.fixture
def make_run(tmp_path: Path):
    """Writes a run folder of the name given."""
    return lambda name, draws, **mixture: write_run(tmp_path / name, draws, **mixture)
