"""Accuracy of two models with different tokenizers, mixed as bytes and by two rules on tokens.

    python benchmarks/token_rules.py [--student toy-number-student] [--num-prompts 400]

The rules choose the student's next token, and the teacher's law is carried over to its ids:

- shared strings: a token that both vocabularies have keeps its probability, all others have none;
- first sub-token: every token has the probability of the first of the teacher's tokens for it.

Each step the teacher reads the text as its own tokenizer splits it.
"""

from __future__ import annotations

import argparse
import json

import numpy as np
import torch
from torch import Tensor

from optimal_sampling import load
from optimal_sampling.config import LocalOptions, MixtureConfig, ModelConfig, PromptConfig
from optimal_sampling.distribution import gumbel, keys_tensor, step
from optimal_sampling.engines.bytes.engine import ByteEngine
from optimal_sampling.engines.bytes.run import ByteLoop
from optimal_sampling.prompts import PromptRenderer
from optimal_sampling.toy_pair.problems import is_correct, synthetic_rows
from optimal_sampling.types import Mode, Request, prompt_id
from optimal_sampling.vocabulary import Vocabulary, continued_ids

NONE = -1
ROWS = 64  # texts that are drawn together


def requests_of(vocabulary: Vocabulary, count: int, tokens: int) -> list[Request]:
    """Arithmetic problems as requests, in order of `sample_index`."""
    renderer = PromptRenderer(PromptConfig(), vocabulary)
    made = []
    for row in synthetic_rows(1_000_003, count):
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


def by_rule(rule: str, engine: ByteEngine, requests: list[Request]) -> list[str]:
    """Texts drawn token by token, in groups of ROWS."""
    groups = [requests[first : first + ROWS] for first in range(0, len(requests), ROWS)]
    return [text for group in groups for text in group_by_rule(rule, engine, group)]


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


def by_engine(config: ModelConfig, requests: list[Request], mode: Mode) -> list[str]:
    """Texts of the engine: q* of bytes, or one model alone."""
    with load(config, MixtureConfig(), LocalOptions(batch_size=ROWS), mode) as engine:
        done = {c.request.sample_index: c for c in engine.generate(requests)}
        return [
            c.byte_level.text if c.byte_level else engine.vocabulary.decode(c.token_ids)
            for _, c in sorted(done.items())
        ]


def main() -> None:
    """Print one line of JSON for each way to draw."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--student", default="toy-number-student")
    parser.add_argument("--teacher", default="toy-teacher")
    parser.add_argument("--num-prompts", type=int, default=400)
    parser.add_argument("--new-tokens", type=int, default=120)
    options = parser.parse_args()
    config = ModelConfig(student=options.student, teacher=options.teacher, device="cpu")
    vocabulary = Vocabulary.load(options.student, options.teacher, granularity="byte")
    requests = requests_of(vocabulary, options.num_prompts, options.new_tokens)
    answers = [row["answer"] for row in synthetic_rows(1_000_003, options.num_prompts)]
    engine = load(config, MixtureConfig(), LocalOptions(batch_size=ROWS))
    modes: tuple[Mode, ...] = ("student", "teacher", "mixture")
    texts = {f"{mode}, engine": by_engine(config, requests, mode) for mode in modes}
    for rule in ("shared strings", "first sub-token"):
        texts[rule] = by_rule(rule, engine, requests)
    for name, drawn in texts.items():
        hits = [is_correct(text, answer) for text, answer in zip(drawn, answers, strict=True)]
        share = sum(hits) / len(hits)
        error = (share * (1 - share) / len(hits)) ** 0.5
        print(json.dumps({"drawn by": name, "correct": round(share, 4), "error": round(error, 4)}))


if __name__ == "__main__":
    main()
