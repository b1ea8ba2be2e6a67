"""The teacher of one style: the shipped teacher, trained further on solutions in that style."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks.experiment.draw import Clock
from benchmarks.experiment.plan import Pair
from benchmarks.experiment.unit import Experiment, evaluated
from scripts.toy_training_data import solve

from optimal_sampling.records.run_folder import load
from optimal_sampling.records.store import write_atomically
from optimal_sampling.toy_pair.problems import Problem, make_problem
from optimal_sampling.train.options import SftOptions
from optimal_sampling.train.sft import sft
from optimal_sampling.vocabulary import load_tokens

__all__ = ["TrainedTeacher"]


@dataclass(frozen=True)
class TrainedTeacher:
    """The teacher of a pair, trained where the plan says so. Kept with the results."""

    experiment: Experiment
    pair: Pair

    @property
    def folder(self) -> Path:
        """Of the trained model."""
        return Path(self.pair.teacher_model(self.experiment.output))

    @property
    def recipe(self) -> Mapping[str, Any]:
        """How it is trained; empty where the teacher is given as it is."""
        return {} if isinstance(self.pair.teacher, str) else self.pair.teacher

    def prepare(self) -> Mapping[str, Any]:
        """Train and measure it: minutes on one thread, and the same weights on the same machine.

        Returns what it took and what it can do; empty where there is nothing to train.
        """
        facts = self.folder.with_suffix(".json")
        if not self.recipe or facts.exists():
            return {}
        clock = Clock()
        summary = sft(self._options(), {"save_strategy": "no"})
        if summary.status != "complete":
            raise KeyboardInterrupt
        found = {
            **clock.read(),
            "examples": summary.examples,
            "updates": summary.updates,
            "megabytes": round((self.folder / "model.safetensors").stat().st_size / 1e6, 1),
            **self._measured(),
        }
        write_atomically(facts, json.dumps(found, indent=2) + "\n")
        return found

    def _options(self) -> SftOptions:
        data = self.folder.with_suffix(".jsonl")
        write_atomically(data, "".join(json.dumps(row) + "\n" for row in self._examples()))
        return SftOptions(
            model_name_or_path=self.recipe["base"],
            dataset_name=str(data),
            output_dir=str(self.folder),
            learning_rate=self.recipe["learning_rate"],
            num_train_epochs=self.recipe["epochs"],
            per_device_train_batch_size=self.recipe["batch"],
            num_processes=1,
            check_prompts=0,
        )

    def _examples(self) -> Iterator[dict[str, str]]:
        """Prompts and solutions of problems that are not held out."""
        streams, tokens = self.experiment.streams, load_tokens(self.recipe["base"]).tokenizer
        names = ("evaluation", "validation")
        held_out = {row["problem"] for name in names for row in streams.rows(name)}
        for problem in self._problems():
            if problem.text not in held_out:
                message = [{"role": "user", "content": problem.text}]
                prompt = tokens.apply_chat_template(
                    message, tokenize=False, add_generation_prompt=True
                )
                yield {"prompt": prompt, "completion": solve(problem, self.recipe["style"])}

    def _problems(self) -> Iterator[Problem]:
        about = self.experiment.plan.problems["teacher"]
        yield from (make_problem(about["seed"], index) for index in range(about["count"]))

    def _measured(self) -> dict[str, float]:
        """On the validation problems at T = 1: right answers, and solutions as in the training."""
        experiment = self.experiment
        questions = experiment.streams.path("validation")
        output = experiment.output / "models" / f"{self.pair.name}-validation"
        options = experiment.evaluation(
            questions, output, batch_size=experiment.plan.evaluation["batch_size"]
        )
        right = evaluated(str(self.folder), options)["right"]
        (run,) = (output / "runs").glob("*/*")
        wanted = [row["solution_other"] for row in experiment.streams.rows("validation")]
        same = [record["completion"] == wanted[record["row_index"]] for record in load(run)]
        return {"right": fmean(right), "as_trained": fmean(same)}
