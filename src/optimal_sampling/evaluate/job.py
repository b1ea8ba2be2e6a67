"""The `evaluate` job: checkpoints x benchmarks -> run folders -> graded samples -> tables."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optimal_sampling.config import GenerateConfig
from optimal_sampling.errors import (
    ConfigError,
    DatasetError,
    ModelError,
    OptimalSamplingError,
    StorageError,
    TokenizerMismatchError,
    did_you_mean,
)
from optimal_sampling.evaluate.benchmarks import Questions, chosen_benchmarks, prepare
from optimal_sampling.evaluate.checkpoints import Checkpoint, Skipped, find_checkpoints
from optimal_sampling.evaluate.options import EvaluateConfig
from optimal_sampling.evaluate.samples import failures, graded_samples, rows_without_reference
from optimal_sampling.evaluate.statistics import CheckpointScores, Metric, Sample, check_scipy
from optimal_sampling.evaluate.tables import Evaluation, json_text, markdown_text, summarize
from optimal_sampling.generate import generate
from optimal_sampling.generate.progress import Progress
from optimal_sampling.records.store import read_json, write_atomically
from optimal_sampling.records.verdicts import VERDICTS, graded_records
from optimal_sampling.verify import resolve_grader
from optimal_sampling.version import __version__

if TYPE_CHECKING:
    from optimal_sampling.engines import Engine

__all__ = ["Report", "evaluate", "run_config", "run_folder"]

_SHOWN = 5  # rows that are named


@dataclass
class Report:
    """What an evaluation found."""

    summary: dict[str, Any]
    """As `tables.summarize` gives it, with `benchmarks`, `checkpoints`, `missing` and `version`."""
    missing: list[str]
    """What was asked for and has no score, or not a whole one, with the reason."""
    files: tuple[Path, ...] = ()


@dataclass
class _State:
    """What is known so far."""

    config: EvaluateConfig
    say: Callable[[str], None]
    samples: dict[str, dict[str, list[Sample]]] = field(default_factory=dict)
    """By benchmark and checkpoint."""
    facts: dict[str, dict[str, Any]] = field(default_factory=dict)
    """By checkpoint: its model and the hash of its files."""
    precision: dict[str, str] = field(default_factory=dict)
    """By checkpoint: that of its weights."""
    skipped: dict[str, frozenset[int]] = field(default_factory=dict)
    """By benchmark: rows without a usable reference."""
    missing: list[str] = field(default_factory=list)
    errors: list[OptimalSamplingError] = field(default_factory=list)

    def fail(self, what: str, error: OptimalSamplingError) -> None:
        """Name what has no score; the others go on."""
        self.errors.append(error)
        self.miss(f"{what}: {error}")

    def miss(self, line: str) -> None:
        """Name what has no score, or not a whole one."""
        self.missing.append(line)
        self.say(f"MISSING {line}")


def evaluate(
    config: EvaluateConfig,
    new_progress: Callable[[], Progress] = Progress,
    say: Callable[[str], None] = lambda line: None,
) -> Report:
    """Answer and grade every question with every checkpoint, and write the tables.

    A benchmark or checkpoint that cannot be used is named in the report, and the others go on.
    Raises ConfigError, ModelError, StorageError, and the first error where nothing has a score.
    """
    state = _State(config, say)
    checkpoints, skipped = find_checkpoints(
        config.checkpoint_dir, config.extra_models, config.output_dir
    )
    _check_baseline(config.baseline, checkpoints)
    benchmarks = chosen_benchmarks(config)
    for grader in {each.grader for each in benchmarks}:
        resolve_grader(grader)
    check_scipy()
    _name_skipped(skipped, state)
    questions = _with_references(list(_prepared(benchmarks, state)), state)
    if not questions:
        raise state.errors[0]
    _run_all(checkpoints, questions, new_progress, state)
    if not state.samples:
        raise state.errors[0]
    return _report(state, checkpoints, questions, skipped)


def _check_baseline(baseline: str | None, checkpoints: Sequence[Checkpoint]) -> None:
    labels = [each.label for each in checkpoints]
    if baseline is not None and baseline not in labels:
        raise ConfigError(
            f"--baseline {baseline!r} is not evaluated{did_you_mean(baseline, labels)}; there are: "
            f"{', '.join(labels)}"
        )


def _name_skipped(skipped: Sequence[Skipped], state: _State) -> None:
    for each in skipped:
        if each.is_half_written:
            state.say(f"skipped {each.label}: {each.reason}")
        else:
            state.miss(f"{each.label}: {each.reason}")
    size = state.config.tensor_parallel_size
    if size > 1 and state.config.engine == "local":
        state.say(
            f"note: --tensor-parallel-size {size} changes nothing: the local engine computes a "
            "model on one device. --engine vllm splits it; or start one process on each device "
            "(CUDA_VISIBLE_DEVICES) with its own --benchmarks and the same --output-dir, then one "
            "with all of them"
        )


def _prepared(benchmarks: Sequence[Any], state: _State) -> Iterator[Questions]:
    """The questions of each benchmark that can be reached."""
    for benchmark in benchmarks:
        try:
            found = prepare(benchmark, state.config)
        except StorageError:
            raise
        except OptimalSamplingError as error:
            state.fail(benchmark.name, error)
            continue
        note = f" ({found.note})" if found.note else ""
        state.say(
            f"{benchmark.name}: {found.count} questions of {found.source}, "
            f"hash {found.digest}{note}"
        )
        yield found


def _with_references(questions: Sequence[Questions], state: _State) -> list[Questions]:
    """The benchmarks that can be graded; says how many of their questions cannot."""
    state.skipped = rows_without_reference(questions)
    kept = []
    for each in questions:
        name, rows = each.benchmark.name, _asked(each, state.config)
        skipped = state.skipped[name] & {*rows}
        if len(skipped) == len(rows):
            state.fail(name, DatasetError(f"no question of {each.source} has a usable answer"))
            continue
        if skipped:
            first = ", ".join(str(row + 1) for row in sorted(skipped)[:_SHOWN])
            more = ", ..." if len(skipped) > _SHOWN else ""
            state.say(
                f"{name}: {len(skipped)} questions are left out, because their reference answer "
                f"cannot be read: rows {first}{more} of {each.path}"
            )
        kept.append(each)
    return kept


def _asked(questions: Questions, config: EvaluateConfig) -> range:
    """The rows that are asked."""
    return range(questions.count)[: config.num_examples]


def _run_all(
    checkpoints: Sequence[Checkpoint],
    questions: Sequence[Questions],
    new_progress: Callable[[], Progress],
    state: _State,
) -> None:
    total = len(checkpoints) * len(questions)
    for number, checkpoint in enumerate(checkpoints):
        with _SharedEngine() as engine:
            for place, each in enumerate(questions, start=1):
                done = number * len(questions) + place
                what = f"{checkpoint.label} on {each.benchmark.name}"
                state.say(f"[{done}/{total}] {what}")
                try:
                    _run(checkpoint, each, engine, new_progress(), state)
                except StorageError:
                    raise
                except (ModelError, TokenizerMismatchError) as error:
                    state.fail(checkpoint.label, error)
                    break
                except OptimalSamplingError as error:
                    engine.close()
                    state.fail(what, error)


def _run(
    checkpoint: Checkpoint,
    questions: Questions,
    engine: _SharedEngine,
    progress: Progress,
    state: _State,
) -> None:
    """One checkpoint on one benchmark: answers, verdicts, samples."""
    config, benchmark = state.config, questions.benchmark
    folder = run_folder(config, checkpoint.label, benchmark.name)
    run = run_config(config, checkpoint.model, questions, folder)
    generate(run, progress, engine.open)
    skipped, rows = state.skipped[benchmark.name], _asked(questions, config)
    failed = failures(folder, {*rows} - skipped, config.samples)
    if failed:
        reasons = "; ".join(f"{count} x {error}" for error, count in failed.items())
        state.miss(
            f"{failed.total()} samples of {checkpoint.label} on {benchmark.name} failed and count "
            f"as wrong: {reasons}"
        )
    samples = graded_samples(folder, rows, config.samples, skipped)
    state.samples.setdefault(benchmark.name, {})[checkpoint.label] = samples
    compared: Any = read_json(folder / "config.json")["compared"]
    state.facts[checkpoint.label] = {
        "model": checkpoint.model,
        "files": compared.get("student_files"),
    }
    state.precision[checkpoint.label] = compared["precision"]
    for line in _result_lines(samples, folder, config.verbose):
        state.say(line)


def run_config(
    config: EvaluateConfig, model: str, questions: Questions, folder: Path
) -> GenerateConfig:
    """The `generate` config of one checkpoint on one benchmark. The model has both roles."""
    common = config.run_config()
    turn = config.template or questions.benchmark.template
    return replace(
        common,
        models=replace(common.models, student=model, teacher=model),
        data=replace(common.data, dataset=str(questions.path)),
        prompt=replace(common.prompt, student_template=turn, teacher_template=turn),
        run=replace(common.run, output_dir=str(folder)),
        verify=replace(common.verify, verify=questions.benchmark.grader, reference="answer"),
    )


def run_folder(config: EvaluateConfig, label: str, benchmark: str) -> Path:
    """The run folder of a checkpoint on a benchmark."""
    return Path(config.output_dir) / "runs" / label.strip("/").replace("/", "__") / benchmark


def _result_lines(samples: Sequence[Sample], folder: Path, is_verbose: bool) -> Iterator[str]:
    """A run's counts; with `is_verbose` the first right and the first wrong completion."""
    counts = Counter(each.verdict for each in samples)
    yield "  " + ", ".join(f"{counts[name]} {name}" for name in VERDICTS if counts[name])
    if is_verbose:
        yield from _examples(folder)


def _examples(folder: Path) -> Iterator[str]:
    shown: set[str] = set()
    for record, graded in graded_records(folder):
        if graded and graded["verdict"] in {"correct", "wrong"} - shown:
            shown.add(graded["verdict"])
            yield f"  --- {graded['verdict']}, reference {graded['reference']}:"
            prompt = record[f"{record['mode']}_prompt"]  # type: ignore[literal-required]
            yield f"{prompt}{record['completion']}"


class _SharedEngine:
    """The engine of one checkpoint, opened for the first benchmark that needs it."""

    def __init__(self) -> None:
        self._engine: Engine | None = None

    @contextmanager
    def open(self, *arguments: Any) -> Iterator[Engine]:
        """In place of `engines.open_engine`; stays open for the next benchmark."""
        from optimal_sampling.engines import open_engine  # torch is loaded here

        if self._engine is None:
            self._engine = open_engine(*arguments)
        yield self._engine

    def close(self) -> None:
        """Free the models. The next `open` loads them again."""
        if self._engine is not None:
            self._engine.close()
        self._engine = None

    def __enter__(self) -> _SharedEngine:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def _report(
    state: _State,
    checkpoints: Sequence[Checkpoint],
    questions: Sequence[Questions],
    skipped: Sequence[Skipped],
) -> Report:
    """The tables, written to results.json and results.md."""
    config = state.config
    counts = [k for k in config.counts if k > 1]
    metrics = [Metric("avg", config.samples)]
    metrics += [Metric("pass", k) for k in counts] + [Metric("maj", k) for k in counts]
    evaluations = list(_evaluations(state, checkpoints, questions))
    if not evaluations:
        raise state.errors[0]
    scored = {each.checkpoint for each in evaluations}
    baseline = config.baseline if config.baseline in scored else None
    if config.baseline != baseline:
        state.miss(f"--baseline {config.baseline} has no scores; {evaluations[0].checkpoint} is it")
    summary = summarize(evaluations, metrics, baseline)
    summary |= {
        "benchmarks": {each.benchmark.name: _about(each) for each in questions},
        "checkpoints": state.facts,
        "skipped": {each.label: each.reason for each in skipped},
        "missing": state.missing,
        "version": __version__,
    }
    folder = Path(config.output_dir)
    files = folder / "results.json", folder / "results.md"
    write_atomically(files[0], json_text(summary))
    write_atomically(files[1], _markdown(summary, config))
    return Report(summary, state.missing, files)


def _evaluations(
    state: _State, checkpoints: Sequence[Checkpoint], questions: Sequence[Questions]
) -> Iterator[Evaluation]:
    """In the order of the checkpoints, so that the first one is the baseline."""
    for checkpoint in checkpoints:
        for each in questions:
            name = each.benchmark.name
            samples = state.samples.get(name, {}).get(checkpoint.label)
            if samples is None:
                continue
            settings = {
                **state.config.settings(),
                "precision": state.precision[checkpoint.label],
                "template": state.config.template or each.benchmark.template,
                "question_hash": each.digest,
                "grader": each.benchmark.grader,
            }
            scores = CheckpointScores.from_samples(samples)
            yield Evaluation(checkpoint.label, name, scores, settings)


def _about(questions: Questions) -> dict[str, Any]:
    return {
        "source": questions.source,
        "questions": questions.count,
        "question_hash": questions.digest,
        "is_pinned": questions.digest == questions.benchmark.pinned,
        "note": questions.note,
    }


def _markdown(summary: dict[str, Any], config: EvaluateConfig) -> str:
    """The tables, then how they were made and what is missing."""
    settings = json.dumps(config.settings(), ensure_ascii=False)
    parts = [markdown_text(summary), f"Settings: `{settings}`\n"]
    for name, about in summary["benchmarks"].items():
        note = f" ({about['note']})" if about["note"] else ""
        parts.append(f"- {name}: {about['source']}, question hash {about['question_hash']}{note}")
    if summary["skipped"] or summary["missing"]:
        parts.append("\nWithout a score:\n")
        parts += [f"- {label}: {reason}" for label, reason in summary["skipped"].items()]
        parts += [f"- {line}" for line in summary["missing"]]
    return "\n".join(parts) + "\n"
