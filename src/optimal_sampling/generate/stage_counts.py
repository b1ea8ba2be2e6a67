"""What a run folder holds of each stage."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from optimal_sampling.records.schema import Record
from optimal_sampling.records.verdicts import Graded, graded_records

__all__ = ["StageCounts", "stage_lines"]

_ROLES = ("student", "teacher")


@dataclass
class _Count:
    """One stage."""

    tries: int = 0
    prompts: set[int] = field(default_factory=set)
    """Rows of the prompts tried."""
    solved: set[int] = field(default_factory=set)
    """Rows of the prompts with a correct completion."""
    tokens: Counter[str] = field(default_factory=Counter)
    """By model: tokens of the prompts and completions that it read or drew."""

    def add(self, record: Record, graded: Graded | None) -> None:
        self.tries += 1
        self.prompts.add(record["row_index"])
        if graded is not None and graded["verdict"] == "correct":
            self.solved.add(record["row_index"])
        for role in _ROLES:
            if record["mode"] in (role, "mixture"):
                self.tokens[role] += record["n_completion_tokens"]
                self.tokens[role] += int(record[f"n_{role}_prompt_tokens"])  # type: ignore[literal-required]

    def numbers(self) -> dict[str, float]:
        """The counts by name."""
        return {
            "prompts": len(self.prompts),
            "tries": self.tries,
            "solved": len(self.solved),
            **{f"{role}_tokens": self.tokens[role] for role in _ROLES},
        }


@dataclass
class StageCounts:
    """Counts of the good records of a run folder, by stage. Other records are not counted."""

    counts: dict[str, _Count] = field(default_factory=dict)

    @classmethod
    def of(cls, run: str | Path) -> StageCounts:
        """Those of a folder. Raises RunFolderError."""
        counts = cls()
        for record, graded in graded_records(run):
            counts.add(record, graded)
        return counts

    def add(self, record: Record, graded: Graded | None) -> None:
        """Count a good record and its verdict."""
        stage = record.get("stage")
        if stage:
            self.counts.setdefault(stage, _Count()).add(record, graded)

    @property
    def prompts(self) -> set[int]:
        """Rows of the prompts that were tried."""
        return {row for each in self.counts.values() for row in each.prompts}

    @property
    def solved(self) -> set[int]:
        """Rows of the prompts with a correct completion."""
        return {row for each in self.counts.values() for row in each.solved}

    def numbers(self, stages: Sequence[str]) -> dict[str, dict[str, float]]:
        """The counts of each stage by name; `*_tokens`: what a model read or drew."""
        return {stage: self.counts.get(stage, _Count()).numbers() for stage in stages}


def stage_lines(
    numbers: Mapping[str, Mapping[str, float]], prompts: int, solved: int
) -> Iterator[tuple[str, str]]:
    """Name and value of each line of a table; none without stages."""
    for stage, counts in numbers.items():
        parts = [f"{counts[name]} {name}" for name in ("prompts", "tries", "solved")]
        parts += [f"{role} {counts[f'{role}_tokens']} tokens" for role in _ROLES]
        parts += [f"{counts['seconds']:.1f} s in this call"] if "seconds" in counts else []
        yield f"stage {stage}", ", ".join(parts)
    if numbers:
        yield "prompts solved", f"{solved} of {prompts}"
