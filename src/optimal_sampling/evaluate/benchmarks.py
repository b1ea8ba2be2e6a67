"""Benchmarks: where their questions come from, and that they stay the same questions.

A benchmark is read from a local file or the hub, put into one form (`problem`, `answer`,
`solution`), and kept as `benchmarks/NAME.jsonl` beside the scores with a hash of its questions.
"""

from __future__ import annotations

import hashlib
import json
import math
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from optimal_sampling.config import DataConfig, expand_user
from optimal_sampling.errors import ConfigError, DatasetError, OptimalSamplingError, did_you_mean
from optimal_sampling.evaluate.options import EvaluateConfig
from optimal_sampling.generate.dataset import open_dataset
from optimal_sampling.prompts import PROMPT_COLUMNS
from optimal_sampling.records.store import read_json, write_atomically
from optimal_sampling.toy_pair.problems import box_span, synthetic_rows
from optimal_sampling.verify.answers import REFERENCE_FIELDS

__all__ = [
    "BENCHMARKS",
    "DEFAULT_BENCHMARKS",
    "Benchmark",
    "Questions",
    "benchmark_row",
    "chosen_benchmarks",
    "prepare",
    "question_hash",
    "read_rows",
]

Row = dict[str, Any]

_ASK = "{problem}\n\nPlease reason step by step, and put your final answer within \\boxed{}."
_SYNTHETIC_SEED = 1_000_003
"""Problems of this seed are those that the shipped pair was evaluated on, not trained."""
_SYNTHETIC_ROWS = 500
_GSM8K_MARK = "####"
_SHOWN = 5  # repeated questions that are named
_ENDINGS = (".jsonl", ".json", ".parquet", "")


@dataclass(frozen=True)
class Benchmark:
    """Where the questions of a benchmark are, and how they are asked and graded."""

    name: str
    hub: str = ""
    split: str | None = None
    subset: str | None = None
    aliases: tuple[str, ...] = ()
    """Other names of its file."""
    pinned: str = ""
    """`question_hash` of the questions that the name stands for; "" where it is not known."""
    template: str = _ASK
    grader: Literal["math", "synthetic"] = "math"


BENCHMARKS: dict[str, Benchmark] = {
    each.name: each
    for each in (
        Benchmark("gsm8k", "openai/gsm8k", "test", "main", ("gsm8k_test",)),
        Benchmark(
            "math500",
            "HuggingFaceH4/MATH-500",
            "test",
            aliases=("math_500",),
            pinned="2305cbd1552dcc7b63e4d153e99d536e",
        ),
        Benchmark(
            "aime24",
            "math-ai/aime24",
            "test",
            aliases=("aime2024",),
            pinned="369a89d6794b2a16685fa4760ede2603",
        ),
        Benchmark("aime25", "math-ai/aime25", "test", aliases=("aime2025",)),
        Benchmark(
            "amc23",
            "math-ai/amc23",
            "test",
            aliases=("amc2023",),
            pinned="4f3bd5cf54c635b10182d91383d27f69",
        ),
        Benchmark("minerva", "math-ai/minervamath", "test", aliases=("minerva_math",)),
        Benchmark("olympiadbench", "math-ai/olympiadbench", "test", aliases=("olympiad_bench",)),
        Benchmark(
            "synthetic",
            template="{problem}",
            grader="synthetic",
            pinned="a7a6637a10f862f1d17305d83878c043",
        ),
    )
}
"""All benchmarks by name."""

DEFAULT_BENCHMARKS = tuple(name for name in BENCHMARKS if name != "synthetic")


@dataclass(frozen=True)
class Questions:
    """The questions of a benchmark, on the disk."""

    benchmark: Benchmark
    path: Path
    """JSONL with the columns `problem`, `answer` and, where the source has it, `solution`."""
    source: str
    count: int
    digest: str
    """`question_hash`."""
    note: str = ""

    def rows(self) -> list[Row]:
        """The rows of the file."""
        return _parsed(self.path.read_text("utf-8"))


def chosen_benchmarks(config: EvaluateConfig) -> list[Benchmark]:
    """The benchmarks to run, in the order given. Raises ConfigError for an unknown name."""
    files = config.files
    names = config.benchmarks or tuple(files) or DEFAULT_BENCHMARKS
    for name in names:
        if name not in BENCHMARKS and name not in files:
            known = ", ".join(BENCHMARKS)
            raise ConfigError(
                f"unknown benchmark {name!r}{did_you_mean(name, BENCHMARKS)}; there are: {known}. "
                f"For questions of your own give --benchmark-file {name}=PATH"
            )
    unused = [name for name in files if name not in names]
    if unused:
        raise ConfigError(f"--benchmark-file {unused[0]}=... is not among --benchmarks")
    return [BENCHMARKS.get(name) or Benchmark(name) for name in dict.fromkeys(names)]


def prepare(benchmark: Benchmark, config: EvaluateConfig) -> Questions:
    """Read the questions, compare them with the pinned ones and those of before, and keep them.

    Where the source cannot be read, the questions that an earlier call kept are taken, with a
    note. Raises an OptimalSamplingError where there are none, or where they are other questions.
    """
    folder = Path(config.output_dir).resolve() / "benchmarks"
    path, about = folder / f"{benchmark.name}.jsonl", folder / f"{benchmark.name}.json"
    before: Mapping[str, Any] = read_json(about) if about.exists() else {}
    try:
        source, rows = read_rows(benchmark, config)
    except OptimalSamplingError as error:
        if not path.exists() or not before:
            raise
        source, rows = _kept(path, before)
        note = f"read from {path}, because: {error}"
        return Questions(benchmark, path, source, len(rows), before["question_hash"], note)
    digest = question_hash(_problems(rows))
    _check_pinned(benchmark, source, digest, config.allow_other_questions)
    rows, repeated = _distinct(rows)
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    now = {"question_hash": digest, "text": _digest([text])}
    _check_unchanged(benchmark, path, before, now)
    if not path.exists() or path.read_text("utf-8") != text:
        write_atomically(path, text)
    if not before:
        facts = {"source": source, "split": benchmark.split, **now}
        write_atomically(about, json.dumps(facts, indent=2) + "\n")
    notes = [] if benchmark.pinned in ("", digest) else ["other questions"]
    return Questions(benchmark, path, source, len(rows), digest, "; ".join(notes + repeated))


def _check_pinned(benchmark: Benchmark, source: str, digest: str, is_allowed: bool) -> None:
    if benchmark.pinned in ("", digest) or is_allowed:
        return
    raise DatasetError(
        f"{source} does not hold the questions of {benchmark.name} (their hash is {digest}, and "
        f"should be {benchmark.pinned}): its scores could not be compared with others. Give the "
        f"right file with --benchmark-file {benchmark.name}=PATH, use another name for these "
        "questions, or add --allow-other-questions"
    )


def _check_unchanged(
    benchmark: Benchmark, path: Path, before: Mapping[str, Any], now: Mapping[str, str]
) -> None:
    for name, what in (("question_hash", "questions"), ("text", "answers")):
        if before and before.get(name) != now[name]:
            raise DatasetError(
                f"the {what} of {benchmark.name} are not those of the first call, which are in "
                f"{path}; choose another --output-dir, or give that file: "
                f"--benchmark-file {benchmark.name}={path}"
            )


def _distinct(rows: Sequence[Row]) -> tuple[list[Row], list[str]]:
    """Each question once, as it is asked, and notes that name the rows that are left out."""
    first: dict[str, int] = {}
    repeated = []
    for place, (row, text) in enumerate(zip(rows, _normalised(_problems(rows)), strict=True)):
        before = first.setdefault(text, place)
        if before != place:
            other = "" if rows[before]["answer"] == row["answer"] else " with another answer"
            repeated.append(f"row {place + 1} is row {before + 1} again{other}")
    if not repeated:
        return list(rows), []
    named = ", ".join(repeated[:_SHOWN]) + (", ..." if len(repeated) > _SHOWN else "")
    return [rows[place] for place in first.values()], [
        f"{len(repeated)} repeated questions are left out: {named}"
    ]


def _problems(rows: Iterable[Row]) -> Iterator[str]:
    return (row["problem"] for row in rows)


def _kept(path: Path, before: Mapping[str, Any]) -> tuple[str, list[Row]]:
    """Source and rows that an earlier call kept. Raises DatasetError where they were changed."""
    text = path.read_text("utf-8")
    if _digest([text]) != before.get("text"):
        raise DatasetError(f"{path} was changed after it was written; restore it, or remove it")
    return str(before["source"]), _parsed(text)


def _parsed(text: str) -> list[Row]:
    return [json.loads(line) for line in text.split("\n") if line]


def read_rows(benchmark: Benchmark, config: EvaluateConfig) -> tuple[str, list[Row]]:
    """Where the questions come from, and their rows in one form. Raises an OptimalSamplingError."""
    local = _local_path(benchmark, config)
    if benchmark.name == "synthetic" and local is None:
        return "synthetic", _synthetic()
    if local is None:
        data = DataConfig(benchmark.hub, split=benchmark.split, subset=benchmark.subset)
        source = f"{benchmark.hub}, split {benchmark.split}"
    else:
        split = benchmark.split if local.is_dir() else None
        data, source = DataConfig(str(local), split=split), str(local)
    return source, list(_benchmark_rows(source, open_dataset(data, seed=0)))


def _benchmark_rows(source: str, rows: Iterable[tuple[int, Row]]) -> Iterator[Row]:
    for place, row in rows:
        try:
            yield benchmark_row(row)
        except DatasetError as error:
            raise DatasetError(f"row {place + 1} of {source} {error}") from error


def _synthetic() -> list[Row]:
    """The first distinct problems of the seed."""
    rows = map(benchmark_row, synthetic_rows(_SYNTHETIC_SEED, 2 * _SYNTHETIC_ROWS))
    distinct = {row["problem"]: row for row in rows}
    return list(distinct.values())[:_SYNTHETIC_ROWS]


def _local_path(benchmark: Benchmark, config: EvaluateConfig) -> Path | None:
    """The file or folder of a benchmark; None where it is to be taken from the hub."""
    given = config.files.get(benchmark.name)
    if given is not None:
        return expand_user(given)
    if config.data_dir is None:
        return None
    folder = expand_user(config.data_dir)
    if not folder.is_dir():
        raise DatasetError(f"--data-dir {config.data_dir} is no folder")
    names = (benchmark.name, *benchmark.aliases)
    places = [folder / f"{name}{ending}" for name in names for ending in _ENDINGS]
    return next((place for place in places if place.exists()), None)


def benchmark_row(row: Mapping[str, Any]) -> Row:
    """A row of any benchmark in one form: `problem`, `answer`, and `solution` where it has one.

    `answer` is the text after `####` in GSM8K's, the parts of a list joined by commas, the box of
    the solution where there is no other; null where there is none. Raises DatasetError.
    """
    texts = {name: row[name] for name in PROMPT_COLUMNS if isinstance(row.get(name), str)}
    column = next((name for name, text in texts.items() if text.strip()), None)
    if column is None:
        has = ", ".join(map(str, row))
        raise DatasetError(f"has no question as text; it has the columns: {has}")
    solution = row.get("solution")
    if isinstance(solution, list | tuple):
        solution = "\n\n".join(map(str, solution))
    answer = _answer(row)
    if isinstance(answer, str) and _GSM8K_MARK in answer:
        solution = answer
        answer = answer.rpartition(_GSM8K_MARK)[2].strip().replace(",", "")
    if answer is None and isinstance(solution, str):
        box = box_span(solution)
        answer = solution[box[0] : box[1]] if box else None
    kept = {"problem": row[column], "answer": answer}
    return kept | ({"solution": solution} if isinstance(solution, str) and solution else {})


def _answer(row: Mapping[str, Any]) -> str | None:
    """The reference answer as text; None where no column has a text, a number or a list of them."""
    columns = (name for name in REFERENCE_FIELDS if name != "solution")
    texts = (_answer_text(row.get(name)) for name in columns)
    return next((text for text in texts if text), None)


def _answer_text(value: Any) -> str | None:
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value))
    if isinstance(value, float):
        if not math.isfinite(value):
            return None
        value = int(value) if value.is_integer() else value
    is_answer = isinstance(value, str | int | float) and not isinstance(value, bool)
    return str(value) if is_answer else None


def question_hash(problems: Iterable[str]) -> str:
    """Hash (32 hex digits) of a set of questions, in any order and with any white space."""
    return _digest(sorted(_normalised(problems)))


def _normalised(problems: Iterable[str]) -> Iterator[str]:
    for problem in problems:
        yield " ".join(unicodedata.normalize("NFC", problem).split())


def _digest(texts: Iterable[str]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for text in texts:
        data = text.encode("utf-8", "surrogatepass")
        digest.update(len(data).to_bytes(8, "little"))
        digest.update(data)
    return digest.hexdigest()
