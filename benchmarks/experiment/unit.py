"""One unit: rounds of drawing and training, then the evaluation of the student."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.experiment.draw import Clock, Drawing, training_set
from benchmarks.experiment.plan import Arm, Plan, Unit
from benchmarks.experiment.streams import Streams

from optimal_sampling.config import ModelConfig
from optimal_sampling.errors import EngineError
from optimal_sampling.evaluate.job import evaluate
from optimal_sampling.evaluate.options import EvaluateConfig
from optimal_sampling.records.store import Lock, read_json, write_atomically
from optimal_sampling.records.verdicts import graded_records
from optimal_sampling.train.options import SftOptions
from optimal_sampling.train.sft import sft

__all__ = ["Experiment", "evaluated", "hardware"]

Facts = dict[str, Any]


@dataclass(frozen=True)
class Experiment:
    """A plan, its problems, and the folder of its results."""

    output: Path
    plan: Plan
    dataset: str | None = None

    @property
    def streams(self) -> Streams:
        """The problems."""
        return Streams(self.output / "problems", self.plan, self.dataset)

    def result_path(self, unit: Unit) -> Path:
        """`unit.json`, which is written last."""
        return self.output / unit.folder / "unit.json"

    def run(self, unit: Unit) -> Facts:
        """Run what is missing of a unit; its results."""
        path = self.result_path(unit)
        if path.exists():
            return dict(read_json(path))
        lock = Lock(path)
        try:
            clock = Clock()
            student, rounds = self._train(unit)
            scores = self._scores(unit, student, path.parent / "scores")
            facts = {
                **asdict(unit),
                "plan": self.plan.digest,
                "rounds": rounds,
                **scores,
                "last_call": clock.read(),
                "hardware": hardware(),
            }
            write_atomically(path, json.dumps(facts) + "\n")
        finally:
            lock.release()
        return facts

    def _train(self, unit: Unit) -> tuple[str, list[Facts]]:
        """The student after all rounds, and what each took."""
        arm, student = self.plan.arms[unit.arm], self.plan.pairs[unit.pair].student
        rounds = []
        for number in range(0 if arm.mode == "none" else arm.rounds):
            folder = self.output / unit.folder / f"round-{number + 1}"
            stream = "train" if number == 0 else "second_round"
            drawing = self.drawing(unit, (stream, unit.seed), folder, student)
            facts = once(folder / "drawn.json", drawing.draw)
            rate = self.plan.sft["learning_rate"]
            facts |= once(folder / "trained.json", lambda: self.train(drawing, rate))  # noqa: B023
            rounds.append(facts)
            student = str(folder / "student")
        return student, rounds

    def drawing(self, unit: Unit, stream: tuple[str, int], folder: Path, student: str) -> Drawing:
        """What a unit draws from a stream, given by name and seed, with a student."""
        arm, problems = self.plan.arms[unit.arm], self.streams.path(*stream)
        return Drawing(
            plan=self.plan,
            arm=arm,
            models=ModelConfig(student=student, teacher=self._teacher(unit, arm, student)),
            problems=problems,
            count=len(self.streams.rows(*stream)),
            folder=folder,
            seed=unit.seed,
        )

    def _teacher(self, unit: Unit, arm: Arm, student: str) -> str:
        """The student itself where its weights are all that is used."""
        pair = self.plan.pairs[unit.pair]
        return pair.teacher_model(self.output) if arm.needs_teacher else student

    def train(self, drawing: Drawing, rate: float, name: str = "student") -> Facts:
        """Train the drawing's student on its text, into the folder `name` of the round."""
        data, facts = training_set(drawing)
        clock = Clock()
        summary = sft(
            SftOptions(
                model_name_or_path=drawing.models.student,
                dataset_name=str(data),
                output_dir=str(drawing.folder / name),
                learning_rate=rate,
                num_train_epochs=self.plan.sft["epochs"],
                per_device_train_batch_size=self.plan.sft["batch"],
                num_processes=1,
                seed=drawing.seed,
                check_prompts=0,
            ),
            {"save_strategy": "no"},
        )
        if summary.status != "complete":
            raise KeyboardInterrupt
        return {**facts, "updates": summary.updates, "training": clock.read()}

    def _scores(self, unit: Unit, student: str, folder: Path) -> Facts:
        """Right samples of each problem of the evaluation, and what they took."""
        arm, plan = self.plan.arms[unit.arm], self.plan.evaluation
        clock, is_base = Clock(), arm.mode == "none"
        questions = self.streams.path("evaluation")
        samples = plan["base_samples"] if is_base else plan["samples"]
        common = {"seed": unit.seed, "batch_size": plan["batch_size"]}
        facts = {"samples": samples}
        options = self.evaluation(questions, folder / "sampled", samples=samples, **common)
        facts |= {"sampled": evaluated(student, options)["right"]}
        options = self.evaluation(questions, folder / "greedy", temperature=0.0, **common)
        facts |= {"greedy": evaluated(student, options)["right"]}
        if arm.diversity:
            first = {"samples": plan["diversity_samples"], **common}
            first |= {"num_examples": plan["diversity_problems"]}
            options = self.evaluation(questions, folder / "diversity", **first)
            facts |= {"diversity": evaluated(student, options)}
        return {**facts, "evaluation": clock.read()}

    def evaluation(self, questions: Path, folder: Path, **options: Any) -> EvaluateConfig:
        """Options of `evaluate` for a stream of questions; by default one sample at T = 1."""
        text = self.plan.text
        name = "synthetic" if text["grader"] == "synthetic" else "questions"
        common: Mapping[str, Any] = {"temperature": 1.0, "top_p": 1.0, **options}
        return EvaluateConfig(
            benchmark_file=(f"{name}={questions}",),
            output_dir=str(folder),
            allow_other_questions=True,  # the name chooses the grader alone
            template=text["prompt"],
            max_new_tokens=text["max_new_tokens"],
            **common,
        )


def once(path: Path, make: Callable[[], Facts]) -> Facts:
    """What an earlier call left in a file; else what `make` returns, which is kept there."""
    if path.exists():
        return dict(read_json(path))
    facts = make()
    write_atomically(path, json.dumps(facts) + "\n")
    return facts


def evaluated(model: str, options: EvaluateConfig) -> Facts:
    """`right`: right samples of each question; `distinct`: different right texts among them."""
    report = evaluate(replace(options, extra_models=(model,)))
    if report.missing:
        raise EngineError(f"{options.output_dir}: {'; '.join(report.missing)}")
    (run,) = (Path(options.output_dir) / "runs").glob("*/*")
    right: dict[int, list[str]] = {}
    for record, graded in graded_records(run):
        texts = right.setdefault(record["row_index"], [])
        if graded is not None and graded["verdict"] == "correct":
            texts.append(record["completion"])
    ordered = [right[row] for row in sorted(right)]
    return {
        "right": [len(texts) for texts in ordered],
        "distinct": [len({*texts}) for texts in ordered],
    }


def hardware() -> Facts:
    """The machine, as the report names it."""
    import torch

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    return {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "gpu": gpu,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor())
