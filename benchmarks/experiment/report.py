"""Results on the disk -> one document of data, and from it `docs/experiment.md` and its figure."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.experiment import text
from benchmarks.experiment.analysis import BINS, Results, decoded, encoded
from benchmarks.experiment.figure import Mark, Panel, svg
from benchmarks.experiment.plan import METRICS, SHARPNESS, Arm, plan_of_folder
from benchmarks.experiment.streams import Streams

from optimal_sampling.errors import DatasetError
from optimal_sampling.evaluate.statistics import Estimate
from optimal_sampling.records.store import read_json, write_atomically

__all__ = ["collect", "compare", "markdown", "write"]

MODELS = ("student", "teacher")


def collect(output: Path) -> Results:
    """The results of a folder, with the plan that it was begun with. Raises RunFolderError."""
    plan, dataset = plan_of_folder(output)
    paths = sorted((output / "units").glob("*/*/*/unit.json"))
    units = [_compact(read_json(path)) for path in paths]
    if not units:
        raise DatasetError(f"{output} holds no finished unit; call `run` first")
    streams = Streams(output / "problems", plan, dataset)
    teachers = {path.stem: dict(read_json(path)) for path in output.glob("models/*.json")}
    document = {
        "plan": plan.digest,
        "dataset": dataset,
        "steps": [row.get("steps") for row in streams.rows("evaluation")],
        "teachers": teachers,
        "units": units,
    }
    return Results(plan, document)


def _compact(unit: Mapping[str, Any]) -> dict[str, Any]:
    """A unit with its lists of counts as texts."""
    found = {**unit, "sampled": encoded(unit["sampled"]), "greedy": encoded(unit["greedy"])}
    found["rounds"] = [{**each, "right": encoded(each["right"])} for each in unit["rounds"]]
    if "diversity" in unit:
        found["diversity"] = {name: encoded(each) for name, each in unit["diversity"].items()}
    return found


def write(output: Path, docs: Path) -> int:
    """Write the document, the figure, and the data that both are made of."""
    results = collect(output)
    document = results.document
    data = docs.parent / "measurements" / f"{docs.stem}.json"
    write_atomically(data, json.dumps(document, separators=(",", ":")) + "\n")
    write_atomically(docs.with_suffix(".svg"), figure(results))
    write_atomically(docs, markdown(results, docs.stem))
    print(f"{docs}, {docs.with_suffix('.svg')} and {data}: {len(document['units'])} units")
    return 0


def compare(output: Path, against: Path) -> int:
    """Whether the accuracies of this folder lie within the intervals of a report's data.

    1 where one does not. Raises DatasetError without a common arm.
    """
    new = collect(output)
    data = read_json(against)
    if not {"plan", "units"} <= {*data}:
        raise DatasetError(f"{against} is not the data of a report; `report` writes such a file")
    if data["plan"] != new.plan.digest:
        print(
            f"note: {against} was measured with another plan ({data['plan']}, here "
            f"{new.plan.digest}): a difference may be one of settings"
        )
    old = Results(new.plan, data)
    lines = list(_compared(new, old))
    if not lines:
        raise DatasetError(f"{output} and {against} have no trained arm in common")
    for line, _ in lines:
        print(line)
    return 0 if all(is_within for _, is_within in lines) else 1


def _compared(new: Results, old: Results) -> Iterator[tuple[str, bool]]:
    for pair in new.plan.pairs:
        for arm in new.arms(pair):
            if arm.mode == "none" or not old.of(pair, arm.name):
                continue
            for metric, title in METRICS.items():
                seeds = ", ".join(map(str, new.of(pair, arm.name)))
                value = new.accuracy(pair, arm.name, metric).value
                before = old.accuracy(pair, arm.name, metric)
                is_within = before.low <= value <= before.high
                word = "within" if is_within else "OUTSIDE"
                yield (
                    f"{pair} {arm.name} seeds {seeds}, {title}: {value:.1%} {word} "
                    f"{_interval(before)}",
                    is_within,
                )


def figure(results: Results) -> str:
    """Accuracy of every arm that all pairs have."""
    pairs = list(results.plan.pairs.values())
    arms = [arm for arm in results.plan.arms.values() if _is_everywhere(results, arm)]
    panels = [
        Panel(
            pair.title,
            [
                Mark(
                    _name(arm),
                    [results.accuracy(pair.name, arm.name, metric) for metric in METRICS],
                )
                for arm in arms
            ],
        )
        for pair in pairs
    ]
    return svg(panels, [f"accuracy, {title}" for title in METRICS.values()])


def _is_everywhere(results: Results, arm: Arm) -> bool:
    return all(results.of(pair, arm.name) for pair in results.plan.pairs)


def markdown(results: Results, stem: str) -> str:
    """The document."""
    parts = [
        text.introduction(results),
        _verdict(results),
        f"![Accuracy after training, with 95% intervals]({stem}.svg)\n",
        "## Accuracy after training\n",
        *(_accuracies(results, pair) for pair in results.plan.pairs),
        "## Differences\n",
        text.DIFFERENCES.format(default=_name(results.plan.arms[results.plan.criteria["default"]])),
        *(_differences(results, pair) for pair in results.plan.pairs),
        "## Sharpness and source\n",
        *(_grid_of_sharpness(results, pair) for pair in results.plan.pairs),
        "## By difficulty\n",
        text.DIFFICULTY,
        *(_difficulty(results, pair) for pair in results.plan.pairs),
        "## The text, and what it cost\n",
        text.COST,
        *(_costs(results, pair) for pair in results.plan.pairs),
        text.measured(results, _trials(results)),
        text.LIMITS,
    ]
    return "\n".join(part for part in parts if part)


def _verdict(results: Results) -> str:
    judgements = results.judgements()
    plan = results.plan
    if not judgements:
        return text.NOT_JUDGED
    confirmed = [each.arm for each in judgements if each.is_confirmed]
    rows = []
    for each in judgements:
        cells = [_signed(estimate) for estimate in each.differences.values()]
        word = "yes" if each.is_confirmed else "no"
        rows.append([_name(plan.arms[each.arm]), *cells, word])
    first = judgements[0].differences
    titles = [
        f"{plan.pairs[pair].title}: to "
        + ("the default" if other == plan.criteria["default"] else "the teacher, equally sharp")
        for pair, other in first
    ]
    table = _table(["text", *titles, "confirmed"], rows)
    judged = {each.arm for each in judgements}
    left = [_name(plan.arms[name]) for name in plan.criteria["candidates"] if name not in judged]
    if left:
        table += f"\nNot judged, as results are missing: {', '.join(left)}.\n"
    return f"{text.verdict(results, [_name(plan.arms[name]) for name in confirmed])}\n{table}"


def _accuracies(results: Results, pair: str) -> str:
    rows = []
    for arm in results.arms(pair):
        units = results.of(pair, arm.name)
        drawn = arm.mode not in ("none", "reference")
        cells = [
            _name(arm),
            len(units) if arm.mode != "none" else "",
            _share_right(results, pair, arm),
        ]
        cells.append(_number(results.mean(pair, arm.name, "tokens"), "{:,.0f}"))
        cells.append(_number(_nll(results, pair, arm), "{:.3f}") if drawn or units else "")
        for metric in METRICS:
            by_seed = [
                f"{100 * each:.1f}" for each in results.matrix(pair, arm.name, metric).mean(1)
            ]
            value = _interval(results.accuracy(pair, arm.name, metric))
            cells.append(f"{value} ({', '.join(by_seed)})" if len(units) > 1 else value)
        cells += _diversity(results, pair, arm)
        rows.append(cells)
    titles = ["text", "seeds", "right before", "tokens", "student NLL", "T = 1", "greedy"]
    titles += ["pass@k", "distinct right"]
    return f"**{results.plan.pairs[pair].title}**\n\n{_table(titles, rows)}"


def _share_right(results: Results, pair: str, arm: Arm) -> str:
    """Of all tries, before any is left out."""
    if arm.mode in ("none", "reference"):
        return ""
    rounds = [unit["rounds"][0] for unit in results.of(pair, arm.name).values()]
    right = sum(sum(decoded(each["right"])) for each in rounds)
    return f"{100 * right / sum(each['completions'] for each in rounds):.1f}"


def _nll(results: Results, pair: str, arm: Arm) -> float | None:
    """Of the first round's text, under the student before training."""
    units = [unit for unit in results.of(pair, arm.name).values() if unit["rounds"]]
    values = [unit["rounds"][0]["student_nll"] for unit in units]
    return sum(values) / len(values) if values else None


def _diversity(results: Results, pair: str, arm: Arm) -> list[str]:
    if not results.has(pair, arm.name, "diversity"):
        return ["", ""]
    passed = _interval(results.accuracy(pair, arm.name, "diversity"))
    units = results.of(pair, arm.name).values()
    counts = [count for unit in units for count in decoded(unit["diversity"]["distinct"])]
    return [passed, f"{sum(counts) / len(counts):.2f}"]


def _differences(results: Results, pair: str) -> str:
    criteria = results.plan.criteria
    rows = []
    for arm in results.arms(pair):
        others = [criteria["default"], criteria["teacher"].get(arm.sharpness)]
        if arm.mode == "none":
            continue
        cells = []
        for other in others:
            for metric in METRICS:
                same = other in (None, arm.name)
                each = None if same else results.difference(pair, arm.name, other, metric)
                cells.append("" if each is None else _signed(each))
        rows.append([_name(arm), *cells])
    titles = [
        f"{metric}, to {other}"
        for other in ("the default", "the teacher")
        for metric in METRICS.values()
    ]
    return f"**{results.plan.pairs[pair].title}**\n\n{_table(['text', *titles], rows)}"


def _grid_of_sharpness(results: Results, pair: str) -> str:
    """Accuracy at T = 1 and greedy, a row per source, a column per way of drawing."""
    found: dict[str, dict[str, str]] = {}
    for arm in results.arms(pair):
        plain = arm.sharpness and not arm.prompt and arm.rounds == 1 and arm.token_share == 1
        if plain:
            values = [results.accuracy(pair, arm.name, metric).value for metric in METRICS]
            cell = " / ".join(f"{100 * value:.1f}" for value in values)
            found.setdefault(arm.title, {})[arm.sharpness] = cell
    rows = [
        [source, *(cells.get(name, "") for name in SHARPNESS)]
        for source, cells in found.items()
        if len(cells) > 1
    ]
    table = _table(["source (T = 1 / greedy accuracy)", *SHARPNESS], rows)
    return f"**{results.plan.pairs[pair].title}**\n\n{table}" if rows else ""


def _difficulty(results: Results, pair: str) -> str:
    if not results.of(pair, "base"):
        return ""
    rows = []
    for arm in results.arms(pair):
        steps = results.by_steps(pair, arm.name, "sampled").values()
        base = results.by_base(pair, arm.name, "sampled")
        cells = [f"{100 * base[name]:.0f}" if name in base else "" for name in BINS]
        rows.append([_name(arm), " / ".join(f"{100 * each:.0f}" for each in steps), *cells])
    titles = ["text", "by steps", *(f"base {name}" for name in BINS)]
    return f"**{results.plan.pairs[pair].title}**\n\n{_table(titles, rows)}"


def _costs(results: Results, pair: str) -> str:
    rows = []
    for arm in results.arms(pair):
        if arm.mode in ("none", "reference"):
            continue
        mean = lambda *path, name=arm.name: results.mean(pair, name, *path)  # noqa: E731
        own = results.coverage_by_own(pair, arm.name)
        rows.append(
            [
                _name(arm),
                _number(mean("problems"), "{:.0f}"),
                _number(results.coverage(pair, arm.name), "{:.0%}"),
                " / ".join(f"{100 * each:.0f}" for each in own.values()),
                *(_tokens(mean("drawn", each), mean("needed", each)) for each in MODELS),
                _number(mean("cpu_seconds"), "{:.1f}"),
                _number(mean("training", "cpu_seconds"), "{:.1f}"),
            ]
        )
    titles = [
        "text",
        "problems",
        "coverage",
        "coverage by own right tries 0 to 4",
        "student tokens",
    ]
    titles += ["teacher tokens", "CPU s, drawing", "CPU s, training"]
    return f"**{results.plan.pairs[pair].title}**\n\n{_table(titles, rows)}"


def _trials(results: Results) -> str:
    """The table of the learning rates."""
    trials = results.plan.tuning.get("trials") or []
    rows = [
        [_name(results.plan.arms[arm]), seed, f"{rate:g}", f"{100 * t1:.1f}", f"{100 * greedy:.1f}"]
        for arm, seed, rate, t1, greedy in trials
    ]
    return _table(["text", "seed", "learning rate", "T = 1", "greedy"], rows) if rows else ""


def _name(arm: Arm) -> str:
    return f"{arm.title}, {arm.sharpness}" if arm.sharpness else arm.title


def _tokens(drawn: float | None, needed: float | None) -> str:
    """Thousands; in brackets those up to the first right try, where they are fewer."""
    if not drawn or needed is None:
        return ""
    more = "" if needed == drawn else f" ({needed / 1000:.0f}k)"
    return f"{drawn / 1000:.0f}k{more}"


def _number(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)


def _interval(estimate: Estimate) -> str:
    low, high = max(estimate.low, 0.0), min(estimate.high, 1.0)
    return f"{100 * estimate.value:.1f} [{100 * low:.1f}, {100 * high:.1f}]"


def _signed(estimate: Estimate) -> str:
    return f"{100 * estimate.value:+.1f} [{100 * estimate.low:+.1f}, {100 * estimate.high:+.1f}]"


def _table(titles: Sequence[object], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table with a line break after it."""
    lines = [titles, ["---"] * len(titles), *rows]
    texts = [" | ".join(str(cell).replace("|", "\\|") for cell in line) for line in lines]
    return "\n".join(f"| {text} |" for text in texts) + "\n"
