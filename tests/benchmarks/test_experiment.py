"""benchmarks/experiment: the plan, the problems, the statistics, and a tiny run of all of it."""

import contextlib
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml
from benchmarks.experiment import __main__ as command
from benchmarks.experiment.analysis import Results, crossed, decoded, encoded
from benchmarks.experiment.figure import Mark, Panel, svg
from benchmarks.experiment.plan import DEFAULT_PLAN, Unit, claim_folder, load_plan
from benchmarks.experiment.report import markdown
from benchmarks.experiment.streams import Streams, read_rows
from benchmarks.experiment.tuning import choose
from benchmarks.experiment.unit import Experiment
from scipy.stats import t as student_t

from optimal_sampling import toy_pair
from optimal_sampling.errors import ConfigError, RunFolderError
from optimal_sampling.evaluate.statistics import Estimate

# datasets forks no process here, but warns of one; TRL and datasets deprecate their own options
pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.xdist_group("experiment")]

ARMS = ("base", "own_k4", "teacher_t1", "teacher_greedy", "kl_t1", "veto_greedy", "escalate")


def tiny(**changes):
    """The plan with few problems, and arms whose runs take a second each."""
    content = yaml.safe_load(DEFAULT_PLAN.read_text())
    counts = {"evaluation": 10, "validation": 4, "tuning": 20, "train": 40, "second_round": 40}
    for name, count in (counts | {"teacher": 24}).items():
        content["problems"][name]["count"] = count
    content["text"] |= {"tokens": 200, "batch_size": 16}
    content["evaluation"] |= {"base_samples": 2, "diversity_problems": 3, "diversity_samples": 4}
    content["tuning"] |= {"arms": ["teacher_greedy"], "learning_rates": [1e-3, 2e-3], "trials": []}
    content["seeds"] = {"main": [0], "full": [0, 1], "extra": [0]}
    content["pairs"]["one_style"]["teacher"] |= {"epochs": 1}
    content["criteria"]["teacher"] = {"T = 1": "teacher_t1", "greedy": "teacher_greedy"}
    content["criteria"]["candidates"] = ["veto_greedy"]
    content["arms"] = {name: content["arms"][name] for name in ARMS}
    return {**content, **changes}


@pytest.fixture
def plan_file(tmp_path):
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(tiny(), sort_keys=False))
    return path


def tiny_plan(tmp_path, **changes):
    path = tmp_path / "plan.yaml"
    path.write_text(yaml.safe_dump(tiny(**changes), sort_keys=False))
    return load_plan(path)


# ---------------------------------------------------------------- the plan


def test_the_plan_of_the_repository():
    """Guards: an arm or criterion that names what is not there; profiles of another size."""
    plan = load_plan()
    main = [arm for arm in plan.arms.values() if arm.group == "main"]
    assert len(main) == 12  # with the base
    assert len(plan.arms) >= 16 + 1
    assert len(plan.seeds["main"]) >= 3
    assert len(plan.seeds["full"]) >= 5
    assert len([arm for arm in main if arm.diversity and arm.mode != "none"]) == 4
    for name in plan.criteria["candidates"]:
        teacher = plan.arms[plan.criteria["teacher"][plan.arms[name].sharpness]]
        assert (teacher.mode, teacher.sharpness) == ("teacher", plan.arms[name].sharpness)


def test_units_run_what_all_wait_for_first():
    """Guards: a stopped full run without the main arms of the first seeds; the same text twice."""
    plan = load_plan()
    units = plan.units("full")
    assert len(units) == len({*units})
    main = plan.units("main")
    assert {*units[: len(main)]} == {*main}
    own = [unit for unit in main if unit.arm == "own_k4"]
    assert own == [Unit("four_styles", "own_k4", seed) for seed in plan.seeds["main"]]
    assert Unit("one_style", "kl_t1", 0) in main
    assert sum(unit.arm == "base" for unit in units) == 1


def test_arms_and_seeds_of_the_command_line():
    """Guards: a rerun of two arms that runs others, or not on both pairs."""
    units = load_plan().units("main", ["teacher_t1", "own_k4"], [7, 8])
    assert {(unit.arm, unit.seed) for unit in units} == {
        (arm, seed) for arm in ("teacher_t1", "own_k4") for seed in (7, 8)
    }
    assert {unit.pair for unit in units if unit.arm == "teacher_t1"} == {"four_styles", "one_style"}
    with pytest.raises(ConfigError, match="teacher_t1"):
        load_plan().units("main", ["teacher_t2"])


@pytest.mark.parametrize(
    ("arm", "message"),
    [
        ({"title": "x", "sharpnes": "T = 1"}, "sharpnes.*sharpness"),
        ({"title": "x", "sharpness": "T = 2"}, "T = 0.5"),
        ({"title": "x", "mixture": {"alpha_methode": "veto"}}, "alpha_methode"),
        ({"title": "x", "mixture": {"temperature": -1.0}}, "temperature"),
        ({}, "title is missing"),
        (None, "arm odd must be a mapping"),
        ({"title": "x", "mode": "techer"}, "mode must be .*'teacher'.*, got 'techer'"),
        ({"title": "x", "tries": "four"}, "tries must be .*int.*, got 'four'"),
        ({"title": "x", "tries": 0}, r"tries must lie in \[1, 35\], got 0"),
    ],
)
def test_arms_that_cannot_be_run_are_refused(tmp_path, arm, message):
    """Guards: a misspelt option that is found after hours, or never."""
    with pytest.raises(ConfigError, match=message):
        tiny_plan(tmp_path, arms={**tiny()["arms"], "odd": arm})


def section(name, **changes):
    """A section of the tiny plan with other values."""
    return {name: {**tiny()[name], **changes}}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"arms": ["base"]}, "arms must be a mapping"),
        ({"text": None}, "text must be .*Mapping"),
        (section("text", tokns=3), "text: unknown name 'tokns'; did you mean 'tokens'"),
        (section("text", tokens="many"), "text.tokens must be a whole number, got 'many'"),
        (section("sft", learning_rate="1e-3"), "learning_rate must be a number, such as"),
        ({"seeds": {"main": [0], "full": [0]}}, "seeds: extra is missing"),
        (section("evaluation", samples=40), r"evaluation.samples must lie in \[1, 35\], got 40"),
        (section("criteria", metric="sample"), "metric must be one of sampled, greedy"),
        (section("criteria", teacher={"T = 1": "teacher_t1"}), "candidate veto_greedy"),
    ],
)
def test_plans_that_cannot_be_run_are_refused(tmp_path, changes, message):
    """Guards: a traceback; a mistake that is found when hours of results are reported."""
    with pytest.raises(ConfigError, match=message):
        tiny_plan(tmp_path, **changes)


def test_a_file_that_is_no_plan_is_refused(tmp_path):
    """Guards: a traceback for an empty file, a list or a picture."""
    path = tmp_path / "plan.yaml"
    for content in (b"", b"- a", b"\xff\xfe\x00"):
        path.write_bytes(content)
        with pytest.raises(ConfigError, match=r"plan\.yaml"):
            load_plan(path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["run", "--seeds=-1"], "--seeds must be whole numbers from 0"),
        (["tune", "--arms=veto_gredy"], "not chosen with the arm 'veto_gredy'"),
    ],
)
def test_units_that_make_no_sense_are_refused(tmp_path, plan_file, capsys, options, message):
    """Guards: a traceback, or problems of another stream, for a mistake on the command line."""
    common = [f"--output={tmp_path / 'results'}", f"--plan={plan_file}", "--workers=1"]
    assert command.main([*options, *common]) == 2
    assert message in capsys.readouterr().err


def retitled(arms):
    """The same arms with other titles."""
    return {name: {**arm, "title": f"new {name}"} for name, arm in arms.items()}


def test_a_changed_plan_is_refused(tmp_path):
    """Guards: results of two plans in one table."""
    plan = tiny_plan(tmp_path)
    output = tmp_path / "results"
    claim_folder(output, plan, None)
    claim_folder(output, plan, None)
    changed = tiny_plan(tmp_path, sft={**plan.sft, "learning_rate": 2e-3})
    with pytest.raises(RunFolderError, match=r"sft.learning_rate was 0.001, is 0.002"):
        claim_folder(output, changed, None)
    claim_folder(output, tiny_plan(tmp_path, arms=retitled(tiny()["arms"])), None)
    with pytest.raises(RunFolderError, match=r"dataset was None, is 'mine.jsonl'"):
        claim_folder(output, plan, "mine.jsonl")


# ---------------------------------------------------------------- the problems


def problems(streams, name, seed=None):
    return [row["problem"] for row in streams.rows(name, seed)]


def test_what_is_held_out_is_in_no_other_stream(tmp_path):
    """Guards: training on the problems of the evaluation."""
    streams = Streams(tmp_path, load_plan())
    evaluation, validation = problems(streams, "evaluation"), problems(streams, "validation")
    held_out = {*evaluation, *validation}
    assert len(held_out) == len(evaluation) + len(validation) == 900
    for name, seed in (("train", 0), ("train", 4), ("tuning", 0), ("second_round", 1)):
        found = problems(streams, name, seed)
        assert len({*found}) == len(found) == streams.plan.problems[name]["count"]
        assert not held_out & {*found}
    assert problems(streams, "train", 0) != problems(streams, "train", 1)


def test_a_dataset_is_divided(tmp_path):
    """Guards: a problem of a user's dataset in two streams, or lost; a seed without problems."""
    path = tmp_path / "mine.jsonl"
    rows = [{"question": f"what is {n}?", "answer": str(n)} for n in range(60)]
    path.write_text("".join(json.dumps(row) + "\n" for row in [*rows, rows[0]]))
    plan = tiny_plan(tmp_path)
    streams = Streams(tmp_path / "problems", plan, str(path))
    parts = [problems(streams, "evaluation"), problems(streams, "validation")]
    parts += [problems(streams, "tuning", 0)]
    parts += [problems(streams, name, s) for name in ("train", "second_round") for s in (0, 1)]
    assert len(parts[0]) == 10
    assert len(parts[1]) == 4
    assert sorted(problem for part in parts for problem in part) == sorted(
        row["question"] for row in rows
    )
    with pytest.raises(ConfigError, match="7 is none of train: 0, 1"):
        streams.path("train", 7)


# ---------------------------------------------------------------- the statistics


def test_intervals_by_hand():
    """Guards: a wrong variance, degrees of freedom or quantile."""
    values = np.array([[1.0, 0.0, 1.0, 1.0], [0.0, 0.0, 1.0, 0.0]])
    # means of problems .5 0 1 .5: variance 1/6, over 4; of seeds .75 .25: variance 1/8, over 2
    variance = 1 / 24 + 1 / 16
    freedom = variance**2 / ((1 / 24) ** 2 / 3 + (1 / 16) ** 2 / 1)
    assert freedom == pytest.approx(2.4193548)
    half = student_t.ppf(0.975, freedom) * math.sqrt(variance)
    found = crossed(values)
    assert (found.value, found.low) == pytest.approx((0.5, 0.5 - half), abs=1e-4)
    assert found.high - found.value == pytest.approx(half, abs=1e-4)
    one = crossed(values[:1])
    assert one.high - one.value == pytest.approx(3.18245 * math.sqrt(0.25 / 4), abs=1e-4)


@pytest.mark.parametrize("spread", [0.0, 0.02])
def test_intervals_cover_new_seeds_and_problems(spread):
    """Guards: intervals that leave the seeds out, which then cover 89% at a spread of 2 points.

    At 2,000 repeats a coverage of 95% is known to ±1 point; too wide ones cover more than 99%.
    """
    draw = np.random.default_rng(0)
    covered = []
    for _ in range(2000):
        by_problem, by_seed = draw.normal(0, 0.25, 200), draw.normal(0, spread, 3)
        noise = draw.choice([-0.5, 0.0, 0.5], size=(3, 200), p=[0.25, 0.5, 0.25])
        found = crossed(by_problem[None] + by_seed[:, None] + noise)
        covered.append(found.low <= 0 <= found.high)
    assert 0.94 <= np.mean(covered) <= 0.99


def test_counts_come_back():
    """Guards: counts of 10 or more that take two characters."""
    assert decoded(encoded([0, 9, 10, 16, 35])) == [0, 9, 10, 16, 35]


def fabricated(tmp_path):
    """Results of two pairs: the greedy veto is better than both others on the first alone."""
    plan = tiny_plan(tmp_path)
    scores = {
        ("four_styles", "kl_t1"): "0000000000",
        ("four_styles", "teacher_greedy"): "1100000000",
        ("four_styles", "veto_greedy"): "2222221222",
        ("one_style", "kl_t1"): "0000000000",
        ("one_style", "teacher_greedy"): "1111111112",
        ("one_style", "veto_greedy"): "1111111110",
    }
    units = [unit_of(*key, seed, sampled) for key, sampled in scores.items() for seed in (0, 1)]
    own = unit_of("four_styles", "own_k4", 0, "1000000001", right="4210", tries=4)
    base = unit_of("four_styles", "base", 0, "0000011222") | {"rounds": []}
    document = {
        "plan": plan.digest,
        "steps": [1, 1, 1, 1, 1, 2, 2, 2, 2, 2],
        "teachers": {},
        "units": [base, own, *units],
    }
    return Results(plan, document)


def unit_of(pair, arm, seed, sampled, right="1101", tries=1):
    """A unit as `collect` gives it."""
    facts = {"problems": 4, "right": right, "completions": 4 * tries}
    facts |= {"drawn": {"student": 1800, "teacher": 0}, "needed": {"student": 1500, "teacher": 0}}
    facts |= {"cpu_seconds": 2.0 + seed, "training": {"cpu_seconds": 3.0}, "tokens": 120}
    facts["resumed"] = seed == 1
    return {
        "pair": pair,
        "arm": arm,
        "seed": seed,
        "samples": 2,
        "sampled": sampled,
        "greedy": "1" * 9 + "0",
        "rounds": [facts | {"student_nll": 0.05}],
        "hardware": {"processor": "p", "cores": 2},
    }


def test_results_by_hand(tmp_path):
    """Guards: problems or seeds mixed up; wrong pass rates, steps, coverage or criteria."""
    results = fabricated(tmp_path)
    assert results.accuracy("four_styles", "veto_greedy", "sampled").value == pytest.approx(0.95)
    assert results.accuracy("one_style", "veto_greedy", "greedy").value == pytest.approx(0.9)
    difference = results.difference("four_styles", "veto_greedy", "teacher_greedy", "sampled")
    assert difference.value == pytest.approx(0.95 - 0.1)
    assert results.by_steps("four_styles", "veto_greedy", "sampled") == {1: 1.0, 2: 0.9}
    assert results.by_base("four_styles", "veto_greedy", "sampled") == {
        "0": 1.0,
        "(0.25, 0.75]": pytest.approx(0.75),
        "above 0.75": 1.0,
    }
    assert results.coverage("four_styles", "veto_greedy") == 0.75
    assert results.mean("one_style", "veto_greedy", "cpu_seconds") == 2.0  # seed 1 was cut short
    # right tries of own samples at the first four problems: 4 2 1 0; of the veto: 1 1 0 1
    assert results.coverage_by_own("one_style", "veto_greedy") == {0: 1, 1: 0, 2: 1, 4: 1}
    (judgement,) = results.judgements()
    assert not judgement.is_confirmed
    low = {key: each.low > 0 for key, each in judgement.differences.items()}
    assert low == {
        ("four_styles", "kl_t1"): True,
        ("four_styles", "teacher_greedy"): True,
        ("one_style", "kl_t1"): True,
        ("one_style", "teacher_greedy"): False,
    }
    kept = {key: each for key, each in judgement.differences.items() if low[key]}
    assert replace(judgement, differences=kept).is_confirmed


def test_the_criteria_are_for_all_main_seeds(tmp_path):
    """Guards: a recommendation from one seed of three, whose interval knows no other seed."""
    whole = fabricated(tmp_path)
    plan = replace(whole.plan, seeds={**whole.plan.seeds, "main": [0, 1]})
    assert len(replace(whole, plan=plan).judgements()) == 1
    one = [each for each in whole.document["units"] if each["seed"] == 0 or each["arm"] == "kl_t1"]
    results = Results(plan, {**whole.document, "units": one})
    assert results.judgements() == []
    assert "cannot be applied yet" in markdown(results, "experiment")


def test_candidates_without_results_are_named(tmp_path):
    """Guards: candidates that nobody has run, among those that are not confirmed."""
    whole = fabricated(tmp_path)
    criteria = {**whole.plan.criteria, "candidates": ["veto_greedy", "escalate"]}
    text = markdown(replace(whole, plan=replace(whole.plan, criteria=criteria)), "experiment")
    title = whole.plan.arms["escalate"].title
    assert f"Not judged, as results are missing: {title}" in text


def test_the_tables_show_the_results(tmp_path):
    """Guards: a column of another number; a report that claims what is not confirmed."""
    text = markdown(fabricated(tmp_path), "experiment")
    assert "Confirmed: **none of the candidates**" in text
    row = next(line for line in text.splitlines() if line.startswith("| veto, greedy | 2 |"))
    cells = [cell.strip() for cell in row.split("|")[1:-1]]
    assert cells[:5] == ["veto, greedy", "2", "75.0", "120", "0.050"]
    assert re.fullmatch(r"95\.0 \[[\d.]+, 100\.0\] \(95\.0, 95\.0\)", cells[5])
    own = next(
        line for line in text.splitlines() if line.startswith("| own samples") and "k" in line
    )
    assert "| 2k (2k) |  |" in own
    assert "What this does not show" in text


def test_the_figure_has_a_dot_at_each_value():
    """Guards: a figure that no browser reads, or with marks at other places than its scale says."""
    marks = [Mark("a & b", [Estimate(0.5, 0.4, 0.6), Estimate(0.9, 0.8, 1.0)])]
    root = ElementTree.fromstring(svg([Panel("p", marks)], ["x", "y"]))
    name = "{http://www.w3.org/2000/svg}"
    texts = {each.text: float(each.get("x")) for each in root.iter(f"{name}text")}
    dots = [float(each.get("cx")) for each in root.iter(f"{name}circle")]
    assert "a & b" in texts
    assert dots[0] == pytest.approx(texts["50%"], abs=0.1)
    assert dots[1] == pytest.approx(texts["90%"], abs=0.1)


def test_the_learning_rate_is_that_of_the_best_mean():
    """Guards: the best of one arm, or of one accuracy, in place of the mean."""
    trials = [
        {"arm": arm, "seed": 0, "learning_rate": rate, "sampled": sampled, "greedy": greedy}
        for arm, rate, sampled, greedy in [
            ("a", 1e-3, 0.5, 0.5),
            ("a", 2e-3, 0.9, 0.2),
            ("b", 1e-3, 0.5, 0.6),
            ("b", 2e-3, 0.4, 0.5),
        ]
    ]
    assert choose(trials) == 1e-3
    assert choose(trials[:2]) == 2e-3


# ---------------------------------------------------------------- a tiny run


def stable(facts):
    """Results without times and machine."""
    if isinstance(facts, dict):
        varying = {"seconds", "cpu_seconds", "resumed", "last_call", "hardware"}
        return {name: stable(each) for name, each in facts.items() if name not in varying}
    return [stable(each) for each in facts] if isinstance(facts, list) else facts


def test_a_tiny_run_from_problems_to_the_report(tmp_path, plan_file, capsys):
    """Guards: a stage that does not fit the next; finished units that are run again; a report that
    cannot be made; what a killed call left that another one cannot go on from.
    """
    output, docs = tmp_path / "results", tmp_path / "docs" / "experiment.md"
    common = ["--output", str(output), "--plan", str(plan_file), "--workers", "1"]
    arms = ["--arms", "base,own_k4,veto_greedy"]
    assert command.main(["run", *common, *arms]) == 0
    assert "4 units, 4 owed" in capsys.readouterr().out
    paths = sorted(output.glob("units/*/*/*/unit.json"))
    whole = {path: json.loads(path.read_text()) for path in paths}
    for facts in whole.values():
        assert len(facts["greedy"]) == 10
        for each in facts["rounds"]:
            assert 0 < each["tokens"] <= 200
    path = output / "units" / "one_style" / "veto_greedy" / "seed-0"
    cut_short(path)
    assert command.main(["run", *common, *arms]) == 0
    assert "4 units, 1 owed" in capsys.readouterr().out
    again = json.loads((path / "unit.json").read_text())
    assert stable(again) == stable(whole[path / "unit.json"])
    assert command.main(["report", *common[:2], "--docs", str(docs)]) == 0
    assert docs.read_text().count("| veto, greedy | 1 |") == 2
    data = docs.parent / "measurements" / "experiment.json"
    assert command.main(["compare", *common[:2], "--against", str(data)]) == 0
    ElementTree.parse(docs.with_suffix(".svg"))
    capsys.readouterr()
    data.write_text(json.dumps(json.loads(data.read_text()) | {"plan": "another"}))
    assert command.main(["compare", *common[:2], "--against", str(data)]) == 0
    assert "measured with another plan (another, here " in capsys.readouterr().out
    data.write_text("{}")
    assert command.main(["compare", *common[:2], "--against", str(data)]) != 0
    assert "is not the data of a report" in capsys.readouterr().err


def cut_short(folder):
    """A unit as a call leaves it that was killed while it wrote its records."""
    (folder / "unit.json").unlink()
    shutil.rmtree(folder / "scores")
    shutil.rmtree(folder / "round-1" / "student")
    for name in ("drawn.json", "trained.json"):
        (folder / "round-1" / name).unlink()
    (records,) = (folder / "round-1" / "run" / "records").glob("*.jsonl")
    text = records.read_bytes()
    records.write_bytes(text[: len(text) // 2])


def test_a_pair_and_a_dataset_of_the_users_own(tmp_path, plan_file):
    """Guards: --teacher, --student and --dataset that reach only a part of the stages."""
    models = {name: tmp_path / name for name in ("teacher", "student")}
    for name, folder in models.items():
        shutil.copytree(toy_pair.path(f"toy-{name}"), folder)
    rows = read_rows(Streams(tmp_path / "problems", load_plan(plan_file)).path("train", 3))
    dataset = tmp_path / "mine.jsonl"
    kept = [{"question": row["problem"], "answer": row["answer"]} for row in rows]
    dataset.write_text("".join(json.dumps(row) + "\n" for row in kept))
    options = ["--teacher", str(models["teacher"]), "--student", str(models["student"])]
    options += ["--dataset", str(dataset), "--plan", str(plan_file), "--workers", "1"]
    options += ["--output", str(tmp_path / "results"), "--arms", "escalate"]
    assert command.main(["run", *options]) == 0
    path = tmp_path / "results" / "units" / "given" / "escalate" / "seed-0" / "unit.json"
    facts = json.loads(path.read_text())
    assert len(facts["sampled"]) == 10
    run = json.loads((path.parent / "round-1" / "run" / "config.json").read_text())["compared"]
    assert run["teacher"] == str(models["teacher"])
    assert run["student"] == str(models["student"])
    (drawn,) = facts["rounds"]
    # own tries alone make all the student's tokens but those of the veto, which are both models'
    assert drawn["drawn"]["student"] > drawn["drawn"]["teacher"]
    assert drawn["drawn"] == drawn["needed"]
    assert sum(drawn["right"]) == sum(count > 0 for count in drawn["right"]) > 0


def test_the_learning_rate_is_tried(tmp_path, plan_file, capsys):
    """Guards: trials on the problems of the evaluation; a choice that is not printed."""
    output = tmp_path / "results"
    options = ["--output", str(output), "--plan", str(plan_file), "--workers", "1"]
    assert command.main(["tune", *options]) == 0
    assert re.search(r"learning_rate: 0\.00[12]$", capsys.readouterr().out.strip())
    asked = (output / "tuning/teacher_greedy/seed-0").glob("*-sampled/runs/*/*/records/*.jsonl")
    questions = {json.loads(line)["row"]["problem"] for p in asked for line in p.open()}
    streams = Experiment(output, load_plan(plan_file)).streams
    assert questions == {*problems(streams, "validation")}


@pytest.mark.slow
def test_a_killed_run_ends_with_the_same_results(tmp_path):
    """Guards: results that depend on where two processes were killed; processes left behind."""
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(tiny(pairs={"four_styles": tiny()["pairs"]["four_styles"]})))

    def start(output):
        line = [sys.executable, "-m", "benchmarks.experiment", "run", "--plan", str(path)]
        line += ["--output", str(output), "--arms", "teacher_greedy,kl_t1", "--workers", "2"]
        return subprocess.Popen(line, cwd=Path(__file__).parents[2], start_new_session=True)

    def kill(process):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()

    def finish(output):
        process = start(output)
        try:
            assert process.wait() == 0
        finally:
            kill(process)

    whole, killed = tmp_path / "whole", tmp_path / "killed"
    finish(whole)
    for made in ("run/records/*.jsonl", "drawn.json", "train.parquet", "trained.json"):
        process = start(killed)
        try:
            while not [*killed.glob(f"units/*/*/*/round-1/{made}")]:
                assert process.poll() is None
                time.sleep(0.05)
        finally:
            kill(process)
    finish(killed)
    units = [
        {
            str(path.relative_to(output)): stable(json.loads(path.read_text()))
            for path in output.glob("units/*/*/*/unit.json")
        }
        for output in (whole, killed)
    ]
    assert len(units[0]) == 2
    assert units[1] == units[0]
