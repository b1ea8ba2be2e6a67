"""The teacher of one style: the shipped teacher, trained further on solutions in that style."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.experiment.plan import Pair
from benchmarks.experiment.streams import Streams
from scripts.toy_training_data import solve

from optimal_sampling.records.store import read_json, write_atomically
from optimal_sampling.toy_pair.problems import make_problem
from optimal_sampling.train.options import SftOptions
from optimal_sampling.train.sft import sft
from optimal_sampling.vocabulary import load_tokens

__all__ = ["prepare", "teacher_of"]


def teacher_of(pair: Pair, output: Path) -> str:
    """The teacher's name or folder."""
    return pair.teacher if isinstance(pair.teacher, str) else str(_folder(pair, output))


def _folder(pair: Pair, output: Path) -> Path:
    return output / "models" / f"{pair.name}-teacher"


def prepare(pair: Pair, streams: Streams, output: Path) -> Mapping[str, Any]:
    """Train the teacher where the plan says so and it is not there yet.

    Minutes on one thread; the same weights on one kind of machine with one thread. Returns what it
    took: empty where the teacher is given.
    """
    if isinstance(pair.teacher, str):
        return {}
    folder, facts = _folder(pair, output), output / "models" / f"{pair.name}-teacher.json"
    if facts.exists():
        return read_json(facts)
    began = time.perf_counter(), time.process_time()
    recipe = pair.teacher
    data = output / "models" / f"{pair.name}-teacher.jsonl"
    write_atomically(data, _examples(recipe, streams))
    options = SftOptions(
        model_name_or_path=recipe["base"],
        dataset_name=str(data),
        output_dir=str(folder),
        learning_rate=recipe["learning_rate"],
        num_train_epochs=recipe["epochs"],
        per_device_train_batch_size=recipe["batch"],
        num_processes=1,
    )
    summary = sft(options, {"save_strategy": "no"})
    found = {
        "seconds": round(time.perf_counter() - began[0], 1),
        "cpu_seconds": round(time.process_time() - began[1], 1),
        "examples": summary.examples,
        "updates": summary.updates,
        "last_loss": summary.last_loss,
        "megabytes": round((folder / "model.safetensors").stat().st_size / 1e6, 1),
    }
    write_atomically(facts, json.dumps(found, indent=2) + "\n")
    return found


def _examples(recipe: Mapping[str, Any], streams: Streams) -> str:
    """Prompts and solutions as JSONL, of problems that are not held out."""
    tokens = load_tokens(recipe["base"]).tokenizer
    about = streams.plan.problems["teacher"]
    held_out = {
        row["problem"] for name in ("evaluation", "validation") for row in streams.rows(name)
    }
    lines = []
    for index in range(about["count"]):
        problem = make_problem(about["seed"], index)
        if problem.text in held_out:
            continue
        message = [{"role": "user", "content": problem.text}]
        prompt = tokens.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
        lines.append(json.dumps({"prompt": prompt, "completion": solve(problem, recipe["style"])}))
    return "\n".join(lines) + "\n"
