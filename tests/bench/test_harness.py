"""Medians, ratios and tables of made-up timings; options; a tiny run of each subcommand."""

import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console

from optimal_sampling.bench import costs, parse_bench, speed
from optimal_sampling.bench.architectures import ARCHITECTURES, Architecture, RandomPair, make_pair
from optimal_sampling.bench.harness import (
    RateTable,
    Report,
    Spent,
    hardware,
    interleave,
    make_table,
    per_second,
    quotients,
)
from optimal_sampling.bench.subcommands import SUBCOMMANDS, Size, parse_size
from optimal_sampling.bench.workload import ModelPair
from optimal_sampling.cli import main
from optimal_sampling.config import ModelConfig
from optimal_sampling.errors import ConfigError

ONE_SHAPE = ["--teacher-shape", "tiny", "--prompt-tokens", "5"]
TINY = [*ONE_SHAPE, "--student-shape", "tiny"]


def printed(table):
    console = Console(width=120, file=io.StringIO())
    console.print(table)
    return console.file.getvalue()


def test_systems_take_turns_and_the_warm_up_is_not_counted():
    """Guards: a machine that slows down while one system runs; a warm-up that is counted."""
    order = []
    rows = {name: lambda name=name: order.append(name) or 10 for name in "ab"}
    timings = interleave(rows, 2)
    assert order == ["a", "b", "b", "a", "a", "b"]
    assert [spent.tokens for spent in timings["a"]] == [10, 10]
    assert all(spent.wall > 0 for spent in timings["b"])


def test_a_slow_system_can_have_fewer_repeats():
    """Guards: hours spent on a system of which one repeat tells enough."""
    timings = interleave({"slow": lambda: 1, "x": lambda: 1}, 3, fewer={"slow": 1})
    assert {name: len(done) for name, done in timings.items()} == {"slow": 1, "x": 3}


def test_a_system_may_report_the_part_that_counts():
    """Guards: prompts that are read inside a figure that is called decoding."""
    timings = interleave({"x": lambda: Spent(10, 2.0, 4.0)}, 2)
    assert per_second(timings, "wall") == {"x": 5.0}
    assert per_second(timings, "cpu") == {"x": 2.5}


def test_medians_ignore_an_outlier():
    """Guards: a mean that one interruption decides; wall clock shown as CPU time."""
    timings = {"x": [Spent(10, wall, 1.0) for wall in (1.0, 100.0, 2.0)]}
    assert per_second(timings, "wall") == {"x": 5.0}
    assert per_second(timings, "cpu") == {"x": 10.0}


def test_rates_ratios_and_bounds_are_rows_of_the_table():
    """Guards: a ratio upside down; the columns of the two clocks swapped; a row that vanishes."""
    timings = {"new": [Spent(30, 1.0, 2.0)], "old": [Spent(20, 2.0, 1.0)]}
    named = [("new / old", "new", ("old",)), ("new / absent", "new", ("absent",))]
    rates = RateTable.of("title", timings, lambda rates: quotients(rates, named))
    assert (rates.ratios_wall, rates.ratios_cpu) == ({"new / old": 3.0}, {"new / old": 0.75})
    cells = [
        [cell.strip() for cell in line.strip("│\n").split("│")]
        for line in printed(rates.table([("bound", 99)])).splitlines()
        if line.startswith("│")
    ]
    assert cells == [
        ["new", "30", "15"],
        ["old", "10", "20"],
        ["bound", "99", ""],
        ["new / old", "3.00", "0.75"],
    ]


def test_the_ideal_is_both_forward_passes():
    """Guards: a ratio to another ideal than 1 / (1 / teacher + 1 / student)."""
    rates = {speed.STUDENT: 300.0, speed.TEACHER: 100.0, speed.LOCKSTEP: 60.0, speed.AUTO: 200.0}
    found = speed.ratios(rates)
    assert found["q* lockstep / ideal lockstep"] == pytest.approx(0.8)
    assert found["q* speculative / teacher alone"] == pytest.approx(2.0)


def test_ratios_are_to_the_best_of_the_rows():
    """Guards: a ratio that looks better because the slower of two teachers was taken."""
    rates = {speed.TEACHER: 100.0, speed.PLAIN_TEACHER: 160.0, speed.LOCKSTEP: 60.0}
    found = speed.ratios({**rates, speed.AUTO: 200.0, "q* speculative, 4": 250.0})
    assert found["q* speculative / teacher alone"] == pytest.approx(1.25)
    assert found["q* speculative / best of lockstep and fixed lengths"] == pytest.approx(0.8)
    assert "q* lockstep / ideal lockstep" not in found  # the student alone was not measured
    alone = {speed.ALONE: 100.0, speed.PLAIN_ALONE: 125.0, "q* lockstep": 100.0}
    assert speed.to_fastest_alone(alone) == {"q* lockstep / fastest alone": 0.8}


@pytest.fixture(scope="module")
def shipped():
    """The shipped pair with short texts."""
    pair = ModelPair(ModelConfig(device="cpu"))
    pair.most_tokens, pair.equal_tokens, pair.bandwidth = 6, 4, 2e9
    return pair


def table_of(measure, *arguments):
    """The result of one table, and the table as it is printed."""
    shown = []
    report = Report(show=shown.append)
    measure(*arguments, 1, report)
    [result], [table] = report.results, shown
    return result, printed(table)


ROWS = (speed.STUDENT, speed.TEACHER, speed.PLAIN_TEACHER, speed.LOCKSTEP, speed.AUTO)


@pytest.mark.filterwarnings("ignore")
def test_a_table_of_speeds_has_its_rows_bounds_and_ratios(shipped):
    """Guards: a row that is dropped unnoticed; a roofline without its bandwidth."""
    one = speed.Setting(1, 2, True, (*ROWS, speed.ASSISTED))
    result, text = table_of(speed.measure_setting, shipped, one)
    assert set(result["per_cpu_second"]) == {*ROWS, speed.ASSISTED}
    assert set(result["bounds"]) == {speed.IDEAL, speed.ROOFLINE}
    assert "natural end of text" in result["title"]
    assert "roofline, lockstep at 2.0 GB/s" in text
    ratio = result["ratios_cpu"]["q* speculative / Transformers assisted generation"]
    rates = result["per_cpu_second"]
    assert ratio == rates[speed.AUTO] / rates[speed.ASSISTED]
    many = speed.Setting(2, 3, False, (*ROWS, *speed.BASELINES))
    result, _ = table_of(speed.measure_setting, shipped, many)
    assert set(result["per_cpu_second"]) == {*ROWS, speed.HF, speed.HF_MIX}
    assert "4 tokens each" in result["title"]


@pytest.mark.filterwarnings("ignore")
def test_the_logits_processor_row_of_a_large_vocabulary(monkeypatch):
    """Guards: "Inplace update to inference tensor", in buffers that the engine left."""
    wide = Architecture("qwen3", 64, 2, 4, 2, 128, 40_000, 4096, head_dim=16)
    monkeypatch.setitem(ARCHITECTURES, "wide", wide)
    pair = RandomPair(ModelConfig(device="cpu"), "wide", "wide", prompt_tokens=5)
    pair.equal_tokens, pair.bandwidth = 3, 1e9
    rows = (speed.LOCKSTEP, speed.HF_MIX)
    result, _ = table_of(speed.measure_setting, pair, speed.Setting(2, 2, False, rows))
    assert all(rate > 0 for rate in result["per_wall_second"].values())
    assert set(result["per_wall_second"]) == set(rows)


def test_self_distillation_shows_what_became_of_the_drafts():
    """Guards: drafts that are not counted; a solution that the student reads as well."""
    pair = ModelPair(ModelConfig(device="cpu", student="toy-teacher"))
    pair.most_tokens = 30
    result, text = table_of(speed.measure_selfdistil, pair, 8, speed.PRIVILEGED)
    assert "shown the solution" in result["title"]
    assert result["drafts"].keys() == speed.LOOKUP_ROWS.keys()
    facts = result["drafts"]["q* prompt lookup, 2"]
    assert 0 < facts["accepted"] <= 1
    assert 1 <= facts["tokens_per_round"] <= 3
    assert "q* prompt lookup, 2: drafts accepted" in text
    equal, _ = table_of(speed.measure_selfdistil, pair, 8, None)
    assert "equal prompts" in equal["title"]
    assert equal["drafts"] == {}


def test_the_mixture_alone_has_a_column_per_method():
    """Guards: a method that is not timed; a share of clamped rows that is another column."""
    cost = costs.measure_solver((50, 16, 1), 1, Report())
    assert set(cost["milliseconds"]) == {"noise", *costs.MIXTURES}
    assert all(x > 0 for x in cost["milliseconds"].values())
    generator = torch.Generator().manual_seed(0)
    student = 3 * torch.randn(16, 50, generator=generator).double()
    teacher = 1.2 * student + torch.randn(16, 50, generator=generator)
    student, teacher = student.log_softmax(-1), teacher.log_softmax(-1)
    # F' grows with alpha: where it is positive at 1/2, the root lies below the bound
    half = ((student + teacher) / 2).softmax(-1)
    clamped = (half * (teacher - student)).sum(-1) > 0
    assert cost["clamped"] == clamped.double().mean()


def run_line(capsys, *arguments):
    """Run a command line; what it printed, and its line of JSON."""
    assert main(["bench", *arguments]) == 0
    text = capsys.readouterr().out
    return text, json.loads(text.splitlines()[-1])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("speed", [*TINY, "--num-prompts", "8", "--new-tokens", "2", "--repeats", "1"]),
        pytest.param(
            "drafts",
            [*TINY, "--num-prompts", "8", "--new-tokens", "2", "--repeats", "1"],
            marks=pytest.mark.slow,
        ),
        ("selfdistil", [*ONE_SHAPE, "--num-prompts", "8", "--repeats", "1"]),
        ("scaling", [*TINY, "--num-prompts", "8", "--new-tokens", "2"]),
        ("memory", [*TINY, "--sizes", "2x4", "8x4"]),
        ("identity", [*TINY, "--num-prompts", "8", "--new-tokens", "4"]),
        ("solver", ["--repeats", "1"]),
        pytest.param(
            "methods",
            ["--batches", "4", "--num-prompts", "4", "--repeats", "1"],
            marks=pytest.mark.slow,
        ),
        pytest.param("top-tokens", ["--repeats", "1"], marks=pytest.mark.slow),
        ("host", ["--batches", "2", "--new-tokens", "16", "--repeats", "1"]),
    ],
)
def test_every_subcommand_ends_with_one_line_of_json(name, options, tmp_path, capsys):
    """Guards: a benchmark that breaks unnoticed; figures that no program can read."""
    path = tmp_path / "line.json"
    text, line = run_line(capsys, name, *options, "--output", str(path))
    assert json.loads(path.read_text()) == line
    assert line["benchmark"] == name
    assert line["hardware"]["torch"]
    assert line["results"]
    if name not in ("solver", "host", "methods", "top-tokens"):
        assert "random weights" in line["models"]["teacher"]
    if name in ("speed", "drafts", "memory"):
        assert line["models"]["emulated_acceptance"] == 0.9
        assert "emulated acceptance 0.9" in text


def test_speed_has_the_rows_that_are_documented(shipped):
    """Guards: a system that is dropped; assisted generation where it cannot run."""
    names = {row for setting in speed.speed_settings(shipped, 64) for row in setting.rows}
    assert {speed.HF, speed.HF_MIX, speed.ASSISTED, speed.AUTO} <= names
    assert {f"q* speculative, {count}" for count in (1, 2, 4, 8)} <= names
    names = [speed.ASSISTED, speed.TEACHER]
    made = speed.systems(names, shipped, shipped.workload(1), batch_size=8)
    assert list(made) == [speed.TEACHER]
    assert [s.batch_size for s in speed.draft_settings(shipped, 128)] == [1, 8, 32, 128]


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        (["gpu", "--acceptance", "0.2"], "--acceptance"),
        (["gpu", "--repeats", "50"], "--repeats"),
        (["gpu", "--teacher", "a-folder"], "--teacher"),
        (["memory", "--num-prompts", "256"], "--num-prompts"),
        (["scaling", "--repeats", "3"], "--repeats"),
        (["identity", "--acceptance", "0.5"], "--acceptance"),
        (["solver", "--teacher", "a-folder"], "--teacher"),
        (["selfdistil", "--student-shape", "tiny"], "--student-shape"),
        (["speed", "--budget", "20"], "--budget"),
        (["--sizes", "2x2"], "--sizes"),
    ],
)
def test_an_option_of_another_subcommand_is_refused(arguments, name, capsys):
    """Guards: options that are accepted and ignored."""
    with pytest.raises(SystemExit) as refused:
        main(["bench", *arguments])
    assert refused.value.code == 2
    assert name in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["speed", "--repeats", "0"], "repeats must be at least 1"),
        (["speed", "--num-prompts", "0"], "num_prompts must be at least 1"),
        (["speed", *TINY, "--acceptance", "1.5"], "acceptance must lie in [0, 1]"),
        (["speed", "--acceptance", "0.5"], "acceptance has no effect without"),
        (["speed", "--new-tokens", "7"], "new_tokens has no effect without"),
        (["identity", "--same-weights"], "same_weights has no effect without"),
        (["speed", *TINY, "--same-weights", "--acceptance", "0.5"], "no effect with same_weights"),
        (["gpu", "--budget", "0"], "budget must be larger than 0"),
        (["memory", "--sizes", "8*256"], "'8*256'"),
        (["gpu", "--huge", "0x4"], "'0x4'"),
        (["solver", "--output", "/nowhere/at/all.json"], "/nowhere/at"),
        (["solver", "--repeats", "1", "--output", "/tmp"], "'/tmp' is a folder"),
        (["speed", "--teacher-shape", "tiny"], "give both or none"),
        (["speed", *TINY, "--teacher", "a-folder"], "exclude each other"),
        (["speed", *TINY, "--load-in-4bit"], "exclude each other"),
        (["drafts", *TINY[:-1], "Qwen3-0.6B", "--same-weights"], "needs the same shape"),
        (["selfdistil", "--student", "a-folder"], "leave --student out"),
        (["identity", "--dtype", "bfloat16"], "--dtype float32"),
    ],
)
def test_options_that_make_no_sense_are_refused(arguments, message, capsys):
    """Guards: a division by zero, or a figure of something else, after minutes of measuring."""
    with pytest.raises(SystemExit) as refused:
        raise SystemExit(main(["bench", *arguments]))
    assert refused.value.code == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_an_output_that_cannot_be_written_is_refused_before_the_run(tmp_path, monkeypatch):
    """Guards: a measurement that runs before the message. Root passes `access`: replaced."""
    path = tmp_path / "line.json"
    monkeypatch.setattr("os.access", lambda *_: False)
    with pytest.raises(ConfigError, match=r"line\.json' cannot be written"):
        SUBCOMMANDS["solver"](output=str(path))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_an_output_on_a_full_disk_is_a_message(capsys):
    """Guards: a traceback after minutes of measuring; the line of JSON is printed all the same."""
    assert main(["bench", "solver", "--repeats", "1", "--output", "/dev/full"]) == 1
    shown = capsys.readouterr()
    assert "cannot write the output '/dev/full'" in " ".join(shown.err.split())
    assert '"benchmark": "solver"' in shown.out


def test_without_a_subcommand_it_is_speed():
    """Guards: `optimal-sampling bench` and `bench --threads 1` that stop working."""
    assert parse_bench([], "bench") == SUBCOMMANDS["speed"]()
    assert parse_bench(["--repeats", "3"], "bench") == SUBCOMMANDS["speed"](repeats=3)
    assert type(parse_bench(["drafts"], "bench")) is SUBCOMMANDS["drafts"]


def test_options_reach_the_pair():
    """Guards: an option that is parsed and not used."""
    options = parse_bench(["speed", *TINY, "--new-tokens", "7", "--acceptance", "0.25"], "bench")
    pair = make_pair(options)
    assert (pair.prompt_tokens, pair.equal_tokens, pair.acceptance) == (5, 7, 0.25)
    options = parse_bench(["speed", *TINY, "--same-weights"], "bench")
    assert make_pair(options).acceptance is None


def test_sizes_are_batch_times_tokens():
    """Guards: the two numbers swapped."""
    assert parse_size("32x512") == Size(batch=32, tokens=512)


def test_the_hardware_is_named():
    """Guards: a figure that nobody knows the origin of."""
    facts = hardware(ModelConfig(device="cpu"))
    assert facts["cores"] >= 1
    assert "gpu" not in facts


def test_sections_of_a_table_are_separated():
    """Guards: ratios that read as rates."""
    lines = printed(make_table("t", ("a", "b"), [("x", "1")], [("y", "2")])).splitlines()
    assert sum(line.startswith("├") for line in lines) == 1


def test_importing_the_benchmark_is_left_to_the_command():
    """Guards: `--help` that takes seconds because it loads torch."""
    code = (
        "import sys, optimal_sampling.bench, optimal_sampling.cli as c\n"
        "sys.exit(c.main(['--help']) or 'torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0
