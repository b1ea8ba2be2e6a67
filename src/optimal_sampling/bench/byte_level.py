"""Two tokenizers: what the byte level costs, and what its tolerance changes in q*.

The contexts that each model is run on, per token of its own, beside the naive method, which runs it
on all hypotheses at every byte; the same pair with one tokenizer mixed as tokens and as bytes; and
the total variation of q* to that at tolerance 0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import count
from statistics import fmean
from typing import Any

import numpy as np
import torch
from rich.table import Table

from optimal_sampling.bench.harness import Report, Spent, interleave, make_table, per_second
from optimal_sampling.bench.subcommands import BytesOptions
from optimal_sampling.bench.workload import ModelPair, Workload
from optimal_sampling.config import DraftTokens, LocalOptions, MixtureConfig, ModelConfig
from optimal_sampling.distribution import log_q, make_pair, solve
from optimal_sampling.engines import Engine, load
from optimal_sampling.engines.bytes.byte_view import ByteView, TokenLaw
from optimal_sampling.engines.bytes.contexts import ByteModel
from optimal_sampling.engines.bytes.engine import ByteEngine
from optimal_sampling.engines.bytes.run import ByteLoop
from optimal_sampling.errors import ConfigError
from optimal_sampling.types import Completion, Granularity, Request
from optimal_sampling.vocabulary import Vocabulary, continued_ids

__all__ = ["CoverEngine", "Replay", "run"]

BATCH = 32
DRAFTS: tuple[DraftTokens, ...] = (0, 4, "auto")
SHARES = (0.5, 0.9, 0.99)
"""Quantiles of the total variation that the table shows."""


def run(options: BytesOptions, report: Report) -> None:
    """The subcommand `bytes`."""
    models = options.models
    vocabulary = Vocabulary.load(
        models.student,
        models.teacher,
        models.trust_remote_code,
        revisions=models.revisions,
        granularity="auto",
    )
    if vocabulary.granularity != "byte":
        raise ConfigError(
            f"student {models.student!r} and teacher {models.teacher!r} have one tokenizer; "
            "`bytes` measures pairs with two"
        )
    pair = ModelPair(models, vocabulary)
    report.models = pair.names
    workload = pair.workload(options.num_prompts)
    engine = load(models, MixtureConfig(), LocalOptions(batch_size=BATCH, draft_tokens=0))
    assert isinstance(engine, ByteEngine)
    costs = [_cost(engine, workload, tolerance, 0, report) for tolerance in options.tolerances]
    tolerance, *_ = options.tolerances
    costs += [_cost(engine, workload, tolerance, drafts, report) for drafts in DRAFTS[1:]]
    naive = CoverEngine(engine.pair, engine.mixture, engine.options, engine.vocabulary)
    costs.append(_cost(naive, workload, tolerance, 0, report))
    report.results += costs
    report.show(_cost_table(costs))
    report.save()
    distances = _distances(engine, workload, options, report)
    report.results += distances
    report.show(_distance_table(distances, options.reference))
    report.save()
    _compare_levels(options, report)


# what it costs


class CoverLoop(ByteLoop):
    """The naive method: at every byte both models run on all hypotheses of their views again."""

    def draw(self) -> None:
        """One symbol of every row."""
        for role, model in self.models.items():
            self._run_again(role, model)
        self.draw_symbols()

    def _run_again(self, role: str, model: ByteModel) -> None:
        """On the hypotheses that are older than the last byte."""
        free = {i: row for i, row in enumerate(self.rows) if not row.finished and not row.blocked}
        live = {i: row.views[role].live for i, row in free.items()}
        for place in count():
            wanted = {
                i: found[place].context
                for i, found in live.items()
                if place < len(found) and found[place].start < len(free[i].text)
            }
            if not any(place < len(found) for found in live.values()):
                return
            if wanted:
                logits = model.contexts.evaluate(wanted)
                model.laws.read(torch.stack(list(logits.values())), [wanted[i] for i in logits])


class CoverEngine(ByteEngine):
    """The same texts by the naive method."""

    loop_class = CoverLoop


def _cost(
    engine: ByteEngine, workload: Workload, tolerance: float, drafts: DraftTokens, report: Report
) -> dict[str, Any]:
    """Contexts and passes of one run, per token of the model's own."""
    report.status(f"tolerance {tolerance:g}, drafts {drafts}")
    options = replace(engine.options, byte_tolerance=tolerance, draft_tokens=drafts)
    view = engine.view(options=options)
    started = Spent.until_now()
    done = list(view.generate(workload.requests))
    spent = Spent.until_now(sum(_bytes(c) for c in done)) - started
    tokens = {
        "student": sum(len(c.token_ids) for c in done),
        "teacher": sum(_teacher_tokens(view, c) for c in done),
    }
    is_naive = isinstance(engine, CoverEngine)
    found: dict[str, Any] = {"tolerance": tolerance, "drafts": drafts, "naive": is_naive}
    for role, counts in view.counts.items():
        found[f"{role}_contexts_per_token"] = counts.contexts / tokens[role]
        found[f"{role}_read_per_token"] = counts.tokens / tokens[role]
        found[f"{role}_passes"] = counts.passes
        found[f"{role}_lost"] = fmean(_lost(c, role) for c in done)
    return found | {"bytes_per_cpu_second": spent.rate("cpu"), "bytes": spent.tokens}


def _bytes(completion: Completion) -> int:
    text = completion.byte_level.text if completion.byte_level is not None else ""
    return len(text.encode())


def _lost(completion: Completion, role: str) -> float:
    return completion.byte_level.lost[role] if completion.byte_level is not None else 0.0


def _teacher_tokens(engine: ByteEngine, completion: Completion) -> int:
    """Tokens that the teacher's tokenizer makes of the text, and its end."""
    vocabulary = engine.vocabulary
    text = completion.byte_level.text if completion.byte_level is not None else ""
    table = vocabulary.bytes_by_role["teacher"]
    ids = continued_ids(vocabulary.teacher_tokenizer, table, text) or []
    return len(ids) + (completion.finish_reason == "stop")


def _cost_table(costs: Sequence[dict[str, Any]]) -> Table:
    columns = ("method", "tolerance", "drafts", "student contexts/token", "teacher contexts/token")
    more = ("student passes", "teacher passes", "student lost", "teacher lost", "bytes/CPU s")
    rows = [
        (
            "cover at every byte" if cost["naive"] else "byte view",
            f"{cost['tolerance']:g}",
            cost["drafts"],
            cost["student_contexts_per_token"],
            cost["teacher_contexts_per_token"],
            cost["student_passes"],
            cost["teacher_passes"],
            f"{cost['student_lost']:.2g}",
            f"{cost['teacher_lost']:.2g}",
            cost["bytes_per_cpu_second"],
        )
        for cost in costs
    ]
    return make_table(f"Two tokenizers at batch {BATCH}", (*columns, *more), rows)


# what it changes


@dataclass(slots=True, eq=False)
class Replay:
    """A text, and by role the views of it at several tolerances."""

    request: Request
    text: bytes
    views: dict[str, list[ByteView]]
    laws: dict[str, dict[tuple[int, ...], TokenLaw]]
    """What is known already, for all views of a role."""

    def wanted(self, role: str) -> tuple[int, ...] | None:
        """A context whose law a view lacks; the views that find theirs known go on."""
        for view in self.views[role]:
            while view.wanted:
                context = view.wanted[-1].context
                if context not in self.laws[role]:
                    return context
                view.receive(self.laws[role][context])
        return None

    def push(self) -> bool:
        """All views go on by a byte; False at the end of the text."""
        [place, *_] = {len(view.text) for views in self.views.values() for view in views}
        if place == len(self.text):
            return False
        for views in self.views.values():
            for view in views:
                view.push(self.text[place])
        return True


def _distances(
    engine: ByteEngine, workload: Workload, options: BytesOptions, report: Report
) -> list[dict[str, float]]:
    """Total variation of q* and of both models' laws to the reference, at every prefix."""
    tolerances = (*options.tolerances, options.reference)
    found: list[list[list[float]]] = [[] for _ in options.tolerances]
    covers: list[int] = []
    done = sorted(engine.generate(workload.requests), key=lambda c: c.request.id)
    for first in range(0, len(done), BATCH):
        if len(found[0]) >= options.prefixes:
            break
        report.status(f"{len(found[0])} of {options.prefixes} prefixes")
        chosen = done[first : first + BATCH]
        replays = [_replay(engine, c, tolerances, options.replay_bytes) for c in chosen]
        _walk(engine, replays, found, covers)
    kept = [np.array(rows[: options.prefixes]) for rows in found]
    return [
        {
            "tolerance": tolerance,
            "prefixes": len(rows),
            "q_mean": float(rows[:, 0].mean()),
            **{f"q_{share:g}": float(np.quantile(rows[:, 0], share)) for share in SHARES},
            "q_largest": float(rows[:, 0].max()),
            "student_mean": float(rows[:, 1].mean()),
            "teacher_mean": float(rows[:, 2].mean()),
            "hypotheses_per_byte": fmean(covers),
        }
        for tolerance, rows in zip(options.tolerances, kept, strict=True)
    ]


def _replay(
    engine: ByteEngine, completion: Completion, tolerances: Sequence[float], most: int
) -> Replay:
    """The first `most` bytes of a completion."""
    drawn = completion.byte_level
    text = drawn.text.encode()[:most] if drawn is not None else b""
    views = {
        role: [ByteView(engine.tries[role], tolerance) for tolerance in tolerances]
        for role in engine.roles
    }
    return Replay(completion.request, text, views, {role: {} for role in engine.roles})


def _walk(
    engine: ByteEngine,
    replays: list[Replay],
    found: list[list[list[float]]],
    covers: list[int],
) -> None:
    """Read all texts byte by byte; the models run for all that wait for them in one pass."""
    loop = engine.open_loop()
    for row, replay in enumerate(replays):
        for role, model in loop.models.items():
            model.contexts.place(row, replay.request.prompt_ids(role))
    going = dict(enumerate(replays))
    while going:
        for role, model in loop.models.items():
            while wanted := {
                row: context
                for row, replay in going.items()
                if (context := replay.wanted(role)) is not None
            }:
                loop.make_room(_lengths(replays, wanted, role), 1)
                for row, logits in model.contexts.evaluate(wanted).items():
                    [law] = model.laws.read(logits[None], [wanted[row]])
                    assert law is not None
                    going[row].laws[role][wanted[row]] = law
        for replay in going.values():
            for number, distance in enumerate(_distance(replay, engine.mixture)):
                found[number].append(distance)
            covers.append(sum(len(views[0].live) for views in replay.views.values()))
        going = {row: replay for row, replay in going.items() if replay.push()}
    loop.close()


def _lengths(
    replays: Sequence[Replay], wanted: Mapping[int, tuple[int, ...]], role: str
) -> np.ndarray:
    """Tokens of every row, in both models' caches as many as this one needs."""
    lengths = [
        len(replay.request.prompt_ids(role)) + len(wanted.get(row, ()))
        for row, replay in enumerate(replays)
    ]
    return np.array([lengths, lengths]).T


def _distance(replay: Replay, mixture: MixtureConfig) -> list[list[float]]:
    """By tolerance: total variation of q*, of the student and of the teacher, to the last one."""
    laws = {role: [view.law() for view in views] for role, views in replay.views.items()}
    student, teacher = laws["student"], laws["teacher"]
    mixed = _mixed(np.stack(student), np.stack(teacher), mixture)
    return [
        [_variation(kind[number], kind[-1]) for kind in (mixed, student, teacher)]
        for number in range(len(student) - 1)
    ]


def _mixed(student: np.ndarray, teacher: np.ndarray, mixture: MixtureConfig) -> np.ndarray:
    """q* of every row."""
    with np.errstate(divide="ignore"):
        log_p = [torch.from_numpy(np.log(laws)) for laws in (student, teacher)]
    pair = make_pair(log_p[0], log_p[1], mixture)
    solved = solve(pair, torch.ones(len(student), dtype=torch.long), mixture)
    q: np.ndarray = log_q(solved).double().exp().numpy()
    return q


def _variation(one: np.ndarray, other: np.ndarray) -> float:
    return float(0.5 * np.abs(one - other).sum())


def _distance_table(distances: Sequence[dict[str, float]], reference: float) -> Table:
    shares = tuple(f"{share:.0%}" for share in SHARES)
    columns = ("tolerance", "q*: mean", *shares, "largest", "student: mean", "teacher: mean")
    quantiles = (f"q_{share:g}" for share in SHARES)
    keys = ("tolerance", "q_mean", *quantiles, "q_largest", "student_mean", "teacher_mean")
    rows = [tuple(f"{row[key]:.2g}" for key in keys) for row in distances]
    title = (
        f"Total variation to tolerance {reference:g} at {distances[0]['prefixes']} prefixes; "
        f"a cover at every byte has {distances[0]['hypotheses_per_byte']:.2f} contexts per byte"
    )
    return make_table(title, columns, rows)


# beside tokens


def _compare_levels(options: BytesOptions, report: Report) -> None:
    """The shipped pair, which has one tokenizer, mixed as tokens and as bytes."""
    device = options.models.device
    levels: tuple[Granularity, ...] = ("token", "byte")
    engines: dict[tuple[Granularity, DraftTokens], Engine] = {}
    for level in levels:
        models = ModelConfig(device=device, granularity=level)
        engine = load(models, MixtureConfig(), LocalOptions(batch_size=BATCH))
        for drafts in DRAFTS:
            settings = LocalOptions(batch_size=BATCH, draft_tokens=drafts)
            engines[level, drafts] = engine.view(options=settings)
    workload = ModelPair(ModelConfig(device=device)).workload(options.compared_prompts)

    def texts(engine: Engine) -> int:
        return sum(1 for _ in engine.generate(workload.requests))

    systems = {f"{level} {drafts}": partial(texts, e) for (level, drafts), e in engines.items()}
    timings = interleave(systems, options.repeats, report.status)
    rates = per_second(timings, "cpu")
    rows = []
    for level, drafts in engines:
        rate = rates[f"{level} {drafts}"]
        ratio = rates[f"token {drafts}"] / rate
        rows.append((level, drafts, 1e3 / rate, ratio))
        found = {"cpu_ms_per_text": 1e3 / rate, "to_tokens": ratio}
        report.results.append({"level": level, "drafts": drafts} | found)
    columns = ("level", "drafts", "CPU ms/text", "time to that of tokens")
    report.show(make_table(f"The shipped pair at batch {BATCH}", columns, rows))
