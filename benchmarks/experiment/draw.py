"""Drawing an arm's text: calls of `generate` until the right completions hold enough tokens."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
from benchmarks.experiment.plan import Arm, Plan

from optimal_sampling.config import (
    DataConfig,
    GenerateConfig,
    LocalOptions,
    MixtureConfig,
    ModelConfig,
    PromptConfig,
    RunConfig,
    VerifyConfig,
)
from optimal_sampling.export_tools import tools
from optimal_sampling.generate import generate
from optimal_sampling.generate.recipes import recipe_stages
from optimal_sampling.records.export import ExportOptions, export
from optimal_sampling.records.run_folder import load
from optimal_sampling.records.store import read_json
from optimal_sampling.records.verdicts import graded_records
from optimal_sampling.types import Mode

__all__ = ["Clock", "Drawing", "training_set"]

_SCORED_ROWS = 200
_KINDS = {
    "mixture": "optimal_sampling",
    "teacher": "baseline",
    "student": "student",
    "reference": "warmstart",
}


@dataclass
class Clock:
    """Wall clock and CPU time of this process since it was made."""

    wall: float = field(default_factory=time.perf_counter)
    cpu: float = field(default_factory=time.process_time)

    def read(self) -> dict[str, float]:
        """Seconds, as the results keep them."""
        return {
            "seconds": round(time.perf_counter() - self.wall, 2),
            "cpu_seconds": round(time.process_time() - self.cpu, 2),
        }


@dataclass(frozen=True)
class Drawing:
    """What is drawn for one round of a unit."""

    plan: Plan
    arm: Arm
    models: ModelConfig
    problems: Path
    """JSONL file of the stream."""
    count: int
    """Its rows."""
    folder: Path
    """Of the round; the run folder is `run` in it."""
    seed: int

    @property
    def run(self) -> Path:
        """The run folder."""
        return self.folder / "run"

    @property
    def wanted(self) -> int:
        """Tokens of right completions, one completion per problem."""
        return round(self.plan.text["tokens"] * self.arm.token_share)

    def draw(self) -> dict[str, Any]:
        """Draw until there is enough, or the stream ends. What was drawn, as the results keep it.

        The number of problems follows from the records alone, so that a call that was cut short
        ends with the same ones.
        """
        clock, resumed = Clock(), self.run.exists()
        count = math.ceil(self.wanted / self.plan.text["tokens_per_problem"])
        if self.arm.mode == "reference":
            count = self.count
        while True:
            count = min(count, self.count)
            generate(self._config(count))
            tokens = sum(self._kept_tokens(count))
            if tokens >= self.wanted or count == self.count:
                break
            missing = (self.wanted - tokens) * count / max(tokens, 1)
            count += max(4, min(count, math.ceil(1.02 * missing)))
        return {**clock.read(), "resumed": resumed, **self._facts(count)}

    def _config(self, count: int) -> GenerateConfig:
        arm, text = self.arm, self.plan.text
        is_reference = arm.mode == "reference"
        mixture = MixtureConfig(**arm.mixture_options)
        prompt = {"student_template": text["prompt"], "teacher_template": text["prompt"]}
        return GenerateConfig(
            models=self.models,
            mixture=mixture,
            stages=recipe_stages(arm.recipe, mixture, arm.tries) if arm.recipe else (),
            data=DataConfig(
                dataset=str(self.problems),
                num_examples=count,
                samples_per_prompt=1 if arm.recipe else arm.tries,
            ),
            prompt=PromptConfig(**{**prompt, **arm.prompt}),
            run=RunConfig(
                output_dir=str(self.run),
                # reference solutions are exported from the rows of any run: one token is enough
                mode="student" if is_reference else arm.mode,  # type: ignore[arg-type]
                max_new_tokens=1 if is_reference else text["max_new_tokens"],
                seed=self.seed,
                token_lists=False,
            ),
            verify=VerifyConfig(verify=text["grader"], reference="answer"),
            engine=LocalOptions(batch_size=text["batch_size"]),
        )

    def _kept_tokens(self, count: int) -> Iterator[int]:
        """Tokens of what is kept of each problem that has something."""
        for tries in self._tries(count).values():
            kept = next((each.tokens for each in tries if each.is_right), None)
            if kept is not None:
                yield kept

    def _tries(self, count: int) -> dict[int, list[_Try]]:
        """The completions of each row, in the order in which they were drawn."""
        found: dict[int, dict[int, _Try]] = {}
        for record, graded in graded_records(self.run):
            place = record.get("tries", record["sample_index"] + 1)
            if record["row_index"] < count and (self.arm.recipe or place <= self.arm.tries):
                is_right = graded is not None and graded["verdict"] == "correct"
                each = _Try(is_right, record["n_completion_tokens"], record["mode"])
                found.setdefault(record["row_index"], {})[place] = each
        return {row: [tries[place] for place in sorted(tries)] for row, tries in found.items()}

    def _facts(self, count: int) -> dict[str, Any]:
        """Counts: of problems, completions and tokens, and of each problem's right completions.

        `drawn`: tokens drawn from each model, of the mixture from both; `needed`: those up to the
        end of each problem's first right completion.
        """
        tries = {} if self.arm.mode == "reference" else self._tries(count)
        rights = [sum(each.is_right for each in tries.get(row, [])) for row in range(count)]
        everything = [each for row in tries.values() for each in row]
        needed = [each for row in tries.values() for each in _until_right(row)]
        return {
            "problems": count,
            "completions": len(everything),
            "right": rights if tries else [],
            "drawn": {name: _tokens(everything, name) for name in ("student", "teacher")},
            "needed": {name: _tokens(needed, name) for name in ("student", "teacher")},
        }


class _Try(NamedTuple):
    """A completion."""

    is_right: bool
    tokens: int
    mode: Mode


def _until_right(tries: Sequence[_Try]) -> Sequence[_Try]:
    """Up to the first right one."""
    end = next((place for place, each in enumerate(tries, 1) if each.is_right), len(tries))
    return tries[:end]


def _tokens(tries: Iterable[_Try], model: str) -> int:
    """Tokens that a model took part in."""
    return sum(each.tokens for each in tries if each.mode in ("mixture", model))


def training_set(drawing: Drawing) -> tuple[Path, dict[str, Any]]:
    """The right completions up to the tokens that are wanted, as a Parquet file; and its facts.

    In the order of the problems: that of finishing would favour short completions.
    """
    folder, mode = drawing.folder / "data", drawing.arm.mode
    options = ExportOptions(
        runs=(str(drawing.run),),
        output_dir=str(folder),
        kind=_KINDS[mode],  # type: ignore[arg-type]
        format="tokens",
        only="all" if mode == "reference" else "correct",
        max_per_prompt=1,
        solution_column=drawing.arm.solution,
        score_rows=_SCORED_ROWS,
        overwrite=True,
    )
    export(options, tools())
    place = {record["id"]: record["row_index"] for record in load(drawing.run)}
    table = pq.read_table(folder / "data")
    rows = sorted(table.to_pylist(), key=lambda row: place[row["id"]])
    kept, tokens = _first(rows, drawing.wanted)
    target = drawing.folder / "train.parquet"
    pq.write_table(pa.Table.from_pylist(kept, table.schema), target)
    nll = read_json(folder / "export.json")["student_nll"]
    return target, {"examples": len(kept), "tokens": tokens, "student_nll": nll}


def _first(rows: list[dict[str, Any]], wanted: int) -> tuple[list[dict[str, Any]], int]:
    """The first rows, as long as they hold at most the wanted tokens; and how many they hold."""
    kept, tokens = [], 0
    for row in rows:
        more = sum(label != -100 for label in row["labels"])
        if tokens + more > wanted:
            break
        kept.append(row)
        tokens += more
    return kept, tokens
