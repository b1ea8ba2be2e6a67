"""Accuracy of two models with different tokenizers, mixed as bytes and by two rules on tokens.

    python benchmarks/token_rules.py [--student toy-number-student] [--num-prompts 400]

The rules choose the student's next token, and the teacher's law is carried over to its ids:

- shared strings: a token that both vocabularies have keeps its probability, all others have none;
- first sub-token: every token has the probability of the first of the teacher's tokens for it.

Each step the teacher reads the text as its own tokenizer splits it. Stock models without caches:
for small ones.
"""

from __future__ import annotations

import argparse
import json

import torch
from torch import Tensor

from optimal_sampling import load
from optimal_sampling.config import LocalOptions, MixtureConfig, ModelConfig, PromptConfig
from optimal_sampling.distribution import gumbel, keys_tensor, step
from optimal_sampling.engines.local.loading import load_model
from optimal_sampling.prompts import PromptRenderer
from optimal_sampling.toy_pair.problems import is_correct, synthetic_rows
from optimal_sampling.types import Mode, Request, prompt_id
from optimal_sampling.vocabulary import Vocabulary, continued_ids, resolve_model

NONE = -1
CHUNK = 128  # texts that go through a model together


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


@torch.inference_mode()
def last_logits(model: torch.nn.Module, texts: list[list[int]]) -> Tensor:
    """Logits after each text, which are padded on the right."""
    found = []
    for first in range(0, len(texts), CHUNK):
        part = texts[first : first + CHUNK]
        ids = torch.zeros(len(part), max(map(len, part)), dtype=torch.long)
        for row, text in enumerate(part):
            ids[row, : len(text)] = torch.tensor(text)
        logits = model(input_ids=ids).logits
        found.append(logits[torch.arange(len(part)), [len(text) - 1 for text in part]])
    return torch.cat(found).float()


def by_rule(rule: str, vocabulary: Vocabulary, requests: list[Request], models: dict) -> list[str]:
    """Texts drawn token by token."""
    columns = columns_of(vocabulary, rule)
    student = vocabulary.bytes_by_role["student"]
    outputs: dict[int, list[int]] = {row: [] for row in range(len(requests))}
    going = list(outputs)
    for position in range(requests[0].max_new_tokens):
        prompts = [requests[row] for row in going]
        own = [
            [*r.student_prompt_ids, *outputs[row]] for r, row in zip(prompts, going, strict=True)
        ]
        other = [
            [*r.teacher_prompt_ids, *teacher_ids(vocabulary, student.join(outputs[row]))]
            for r, row in zip(prompts, going, strict=True)
        ]
        student_logits = last_logits(models["student"], own)[:, : student.size]
        teacher_logits = last_logits(models["teacher"], other)[:, columns.clamp(min=0)]
        teacher_logits = teacher_logits.masked_fill(columns == NONE, -torch.inf)
        places = torch.full((len(going),), position)
        noise = gumbel(keys_tensor(r.noise_key for r in prompts), places, student.size)
        drawn = step(student_logits, teacher_logits, noise, places, MixtureConfig()).token.tolist()
        for row, token in zip(going, drawn, strict=True):
            outputs[row].append(token)
        going = [row for row in going if outputs[row][-1] not in student.end_ids]
        if not going:
            break
    return [student.join(ids).decode(errors="replace") for ids in outputs.values()]


def teacher_ids(vocabulary: Vocabulary, text: bytes) -> list[int]:
    """The teacher's own tokens of a text."""
    table = vocabulary.bytes_by_role["teacher"]
    return continued_ids(vocabulary.teacher_tokenizer, table, text.decode(errors="ignore")) or []


def by_engine(config: ModelConfig, requests: list[Request], mode: Mode) -> list[str]:
    """Texts of the engine: q* of bytes, or one model alone."""
    with load(config, MixtureConfig(), LocalOptions(batch_size=64), mode) as engine:
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
    models = {
        role: load_model(resolve_model(getattr(config, role)), config, role)
        for role in ("student", "teacher")
    }
    modes: tuple[Mode, ...] = ("student", "teacher", "mixture")
    texts = {f"{mode}, engine": by_engine(config, requests, mode) for mode in modes}
    for rule in ("shared strings", "first sub-token"):
        texts[rule] = by_rule(rule, vocabulary, requests, models)
    for name, drawn in texts.items():
        hits = [is_correct(text, answer) for text, answer in zip(drawn, answers, strict=True)]
        share = sum(hits) / len(hits)
        error = (share * (1 - share) / len(hits)) ** 0.5
        print(json.dumps({"drawn by": name, "correct": round(share, 4), "error": round(error, 4)}))


if __name__ == "__main__":
    main()
