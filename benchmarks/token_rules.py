"""Accuracy of two models with different tokenizers, mixed as bytes and by two rules on tokens.

    python benchmarks/token_rules.py --num-prompts 400 --output build/token_rules.jsonl

The rules choose the student's next token, and the teacher's law is carried over to its ids:

- shared strings: a token that both vocabularies have keeps its probability, all others have none;
- first sub-token: every token has the probability of the first of the teacher's tokens for it.

Each step the teacher reads the text as its own tokenizer splits it. Results are appended to the
output after every group of texts; the same command goes on from there. It ends with one line of
JSON: the share of right answers of each way to draw, with a 95% Wilson interval.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from optimal_sampling import load
from optimal_sampling.config import LocalOptions, MixtureConfig, ModelConfig, PromptConfig
from optimal_sampling.distribution import gumbel, keys_tensor, step
from optimal_sampling.engines import Engine
from optimal_sampling.engines.bytes.engine import ByteEngine
from optimal_sampling.engines.bytes.run import ByteLoop
from optimal_sampling.errors import ConfigError, OptimalSamplingError
from optimal_sampling.evaluate.statistics import interval
from optimal_sampling.prompts import PromptRenderer
from optimal_sampling.toy_pair.problems import is_correct, synthetic_rows
from optimal_sampling.types import Mode, Request, prompt_id
from optimal_sampling.vocabulary import Vocabulary, continued_ids, resolve_model

NONE = -1
ROWS = 64  # texts that are drawn together
SEED = 1_000_003  # of the problems, on which no shipped model was trained
MODES: tuple[Mode, ...] = ("student", "teacher", "mixture")
RULES = ("shared strings", "first sub-token")


@dataclass
class Results:
    """A file of lines: the settings, then who drew a group of texts, and which are right."""

    path: Path
    settings: dict[str, Any]
    found: dict[str, dict[int, list[int]]] = field(default_factory=dict)
    """By way to draw, and by the first problem of a group."""

    def open(self) -> None:
        """Read what is there. Raises ConfigError where it was made with other settings."""
        text = self.path.read_text() if self.path.exists() else ""
        whole = text[: text.rfind("\n") + 1]
        if whole != text:
            os.truncate(self.path, len(whole.encode()))  # a line that was being written
        if not whole:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._append(self.settings)
            return
        before, *groups = (json.loads(line) for line in whole.splitlines())
        if before != self.settings:
            raise ConfigError(
                f"{self.path} holds results of {before}, and these settings are {self.settings}: "
                "take another --output"
            )
        for group in groups:
            self.found.setdefault(group["drawn by"], {})[group["first"]] = group["correct"]

    def lacks(self, name: str, first: int) -> bool:
        """Whether a group has not been drawn."""
        return first not in self.found.get(name, {})

    def add(self, name: str, first: int, correct: list[int]) -> None:
        """Keep a group, on the disk too."""
        self.found.setdefault(name, {})[first] = correct
        self._append({"drawn by": name, "first": first, "correct": correct})

    def _append(self, line: dict[str, Any]) -> None:
        with open(self.path, "a") as file:
            file.write(json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def summary(self, count: int) -> list[dict[str, Any]]:
        """Of the first `count` problems."""
        rows = []
        for name, groups in self.found.items():
            hits = [hit for _, group in sorted(groups.items()) for hit in group][:count]
            share = interval(np.array(hits, dtype=float))
            bounds = {"low": round(share.low, 4), "high": round(share.high, 4)}
            right = {"problems": len(hits), "correct": round(share.value, 4)}
            rows.append({"drawn by": name} | right | bounds)
        return rows


def requests_of(vocabulary: Vocabulary, count: int, tokens: int) -> list[Request]:
    """Arithmetic problems as requests, in order of `sample_index`."""
    renderer = PromptRenderer(PromptConfig(), vocabulary)
    made = []
    for row in synthetic_rows(SEED, count):
        rendered = renderer.render(row)
        name = prompt_id(rendered.student_text, rendered.teacher_text)
        ids = tuple(rendered.student_ids), tuple(rendered.teacher_ids)
        made.append(Request(name, len(made), 0, *ids, tokens))
    return made


def columns_of(vocabulary: Vocabulary, rule: str) -> Tensor:
    """The teacher's id whose probability each of the student's ids takes; NONE: no probability."""
    student, teacher = (vocabulary.bytes_by_role[role] for role in ("student", "teacher"))
    same = {word: index for index, word in enumerate(teacher.of_id) if word}
    end = min(teacher.end_ids)
    columns = []
    for index, word in enumerate(student.of_id):
        if index in student.end_ids:
            columns.append(end)
        elif not word or (rule == "shared strings" and word not in same):
            columns.append(NONE)
        elif rule == "shared strings":
            columns.append(same[word])
        else:
            columns.append(first_token(vocabulary, word))
    return torch.tensor(columns)


def first_token(vocabulary: Vocabulary, word: bytes) -> int:
    """The first of the teacher's tokens for these bytes."""
    table = vocabulary.bytes_by_role["teacher"]
    text = word.decode(errors="ignore")
    ids = continued_ids(vocabulary.teacher_tokenizer, table, text) if text.encode() == word else []
    return ids[0] if ids else table.of_id.index(word[:1])


def evaluate(
    loop: ByteLoop, role: str, prompts: list[tuple[int, ...]], contexts: dict[int, tuple[int, ...]]
) -> Tensor:
    """Logits after the contexts; the rows' caches keep what they share with the last ones."""
    lengths = [len(prompt) + len(contexts.get(row, ())) for row, prompt in enumerate(prompts)]
    loop.make_room(np.array([lengths, lengths]).T, 1)
    found: dict[int, Tensor] = {}
    while len(found) < len(contexts):
        left = {row: context for row, context in contexts.items() if row not in found}
        found |= loop.models[role].contexts.evaluate(left)
    return torch.stack([found[row] for row in contexts]).float()


def group_by_rule(rule: str, engine: ByteEngine, requests: list[Request]) -> list[str]:
    """Texts that are drawn together."""
    vocabulary, loop = engine.vocabulary, engine.open_loop()
    columns = columns_of(vocabulary, rule)
    student = vocabulary.bytes_by_role["student"]
    prompts = {role: [r.prompt_ids(role) for r in requests] for role in engine.roles}
    for role, model in loop.models.items():
        for row, prompt in enumerate(prompts[role]):
            model.contexts.place(row, prompt)
    outputs: dict[int, tuple[int, ...]] = dict.fromkeys(range(len(requests)), ())
    going = dict(outputs)
    for position in range(requests[0].max_new_tokens):
        written = {row: teacher_ids(vocabulary, student.join(ids)) for row, ids in going.items()}
        student_logits = evaluate(loop, "student", prompts["student"], going)[:, : student.size]
        teacher_logits = evaluate(loop, "teacher", prompts["teacher"], written)
        teacher_logits = teacher_logits[:, columns.clamp(min=0)]
        teacher_logits = teacher_logits.masked_fill(columns == NONE, -torch.inf)
        places = torch.full((len(going),), position)
        keys = keys_tensor(requests[row].noise_key for row in going)
        noise = gumbel(keys, places, student.size)
        drawn = step(student_logits, teacher_logits, noise, places, MixtureConfig()).token.tolist()
        for row, token in zip(going, drawn, strict=True):
            outputs[row] += (token,)
        going = {r: ids for r, ids in outputs.items() if not student.end_ids & {*ids[-1:]}}
        if not going:
            break
    loop.close()
    return [student.join(ids).decode(errors="replace") for ids in outputs.values()]


def teacher_ids(vocabulary: Vocabulary, text: bytes) -> tuple[int, ...]:
    """The teacher's own tokens of a text."""
    table = vocabulary.bytes_by_role["teacher"]
    ids = continued_ids(vocabulary.teacher_tokenizer, table, text.decode(errors="ignore"))
    return tuple(ids or ())


def by_engine(engine: Engine, requests: list[Request]) -> list[str]:
    """Texts of an engine: q* of bytes, or one model alone."""
    done = {c.request.sample_index: c for c in engine.generate(requests)}
    return [
        c.byte_level.text if c.byte_level else engine.vocabulary.decode(c.token_ids)
        for _, c in sorted(done.items())
    ]


def ways(config: ModelConfig) -> dict[str, Callable[[list[Request]], list[str]]]:
    """Every way to draw, by name; each makes texts of requests."""
    options = LocalOptions(batch_size=ROWS)
    engine = load(config, MixtureConfig(), options)
    assert isinstance(engine, ByteEngine)
    alone: dict[Mode, Engine] = {
        "student": load(config, MixtureConfig(), options, "student"),
        "teacher": engine.view(mode="teacher"),
        "mixture": engine,
    }
    found = {f"{mode}, engine": partial(by_engine, alone[mode]) for mode in MODES}
    return found | {rule: partial(group_by_rule, rule, engine) for rule in RULES}


def settings_of(config: ModelConfig, new_tokens: int) -> dict[str, Any]:
    """What results depend on: both models with the checksums of their weights."""
    folders = {role: resolve_model(getattr(config, role)) for role in ("student", "teacher")}
    sums = {
        f"{role}_sha256": sha256((Path(folder) / "model.safetensors").read_bytes()).hexdigest()
        for role, folder in folders.items()
    }
    names = {"student": config.student, "teacher": config.teacher}
    return names | sums | {"new_tokens": new_tokens, "seed": SEED, "rows": ROWS}


def draw_all(config: ModelConfig, results: Results, count: int) -> None:
    """Draw the groups that are not in the results, of all ways in turn."""
    vocabulary = Vocabulary.load(config.student, config.teacher, granularity="byte")
    whole = -(-count // ROWS) * ROWS
    requests = requests_of(vocabulary, whole, results.settings["new_tokens"])
    answers = [row["answer"] for row in synthetic_rows(SEED, whole)]
    drawing = ways(config)
    for first in range(0, whole, ROWS):
        chosen = slice(first, first + ROWS)
        for name, draw in drawing.items():
            if results.lacks(name, first):
                pairs = zip(draw(requests[chosen]), answers[chosen], strict=True)
                results.add(name, first, [int(is_correct(*pair)) for pair in pairs])
                print(f"{name}: {first + ROWS} of {whole}", file=sys.stderr)


def main() -> None:
    """Draw what is missing, and print what is there."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--student", default="toy-number-student")
    parser.add_argument("--teacher", default="toy-teacher")
    parser.add_argument("--num-prompts", type=int, default=400)
    parser.add_argument("--new-tokens", type=int, default=120)
    parser.add_argument("--output", type=Path, default=Path("build/token_rules.jsonl"))
    options = parser.parse_args()
    config = ModelConfig(student=options.student, teacher=options.teacher, device="cpu")
    try:
        results = Results(options.output, settings_of(config, options.new_tokens))
        results.open()
        draw_all(config, results, options.num_prompts)
    except OptimalSamplingError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("stopped; the same command goes on")
    rows = results.summary(options.num_prompts)
    for row in rows:
        print(f"{row['drawn by']:20} {row['correct']:6.1%}  {row['low']:.1%} to {row['high']:.1%}")
    print(json.dumps({"benchmark": "token_rules", **results.settings, "results": rows}))


if __name__ == "__main__":
    main()
