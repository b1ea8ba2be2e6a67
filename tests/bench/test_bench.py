"""The benchmark's arithmetic and options, and one tiny run of each table; nothing here is a timed test."""

import io
import json
import subprocess
import sys

import pytest
from rich.console import Console

from optimal_sampling.bench import (
    BenchOptions,
    contenders,
    drafts,
    identity,
    memory,
    run_bench,
    solver,
    speed,
    workload,
)
from optimal_sampling.bench.hardware import hardware
from optimal_sampling.bench.measure import Contender, Spent, interleave
from optimal_sampling.bench.options import Size, parse_size
from optimal_sampling.config import ModelConfig
from optimal_sampling.errors import ConfigError

TINY = {"teacher_shape": "tiny", "student_shape": "tiny", "prompt_tokens": 5, "new_tokens": 4}


def test_contenders_take_turns_and_the_first_round_is_not_counted():
    """Guards: a machine that slows down while one contender runs, and warming up that is counted."""
    order = []
    rows = [Contender(name, lambda name=name: order.append(name) or 10) for name in "ab"]
    timings = interleave(rows, 3)
    assert order == ["a", "b"] * 4
    assert timings["a"].tokens == [10, 10, 10]
    assert timings["b"].per_wall_second > 0


def test_a_contender_may_say_what_the_part_that_counts_took():
    """Guards: prompts that are read inside a figure that is called decoding."""
    timing = interleave([Contender("x", lambda: Spent(10, 2.0, 4.0))], 2)["x"]
    assert timing.per_wall_second == 5.0
    assert timing.per_cpu_second == 2.5


def test_medians_ignore_an_outlier():
    """Guards: a mean that one interruption decides."""
    timing = next(iter(interleave([Contender("x", lambda: 1)], 1).values()))
    timing.tokens, timing.wall, timing.cpu = [10, 10, 10], [1.0, 100.0, 2.0], [1.0, 1.0, 1.0]
    assert timing.per_wall_second == 5.0
    assert timing.per_cpu_second == 10.0


def test_the_ideal_is_both_forward_passes():
    """Guards: a ratio to another ideal than 1 / (1 / teacher + 1 / student)."""
    rates = {speed.STUDENT: 300.0, speed.TEACHER: 100.0, speed.LOCKSTEP: 60.0, speed.AUTO: 200.0}
    found = speed.ratios(rates)
    assert found["q* lockstep / ideal lockstep"] == pytest.approx(0.8)
    assert found["q* speculative / teacher alone"] == pytest.approx(2.0)


def test_ratios_are_to_the_best_of_the_rows():
    """Guards: a ratio that looks better because the slower of two teachers was taken."""
    rates = {
        speed.TEACHER: 100.0,
        speed.PLAIN_TEACHER: 160.0,
        speed.LOCKSTEP: 60.0,
        speed.AUTO: 200.0,
    }
    found = speed.ratios({**rates, contenders.drafts(4): 250.0})
    assert found["q* speculative / teacher alone"] == pytest.approx(1.25)
    assert found["q* speculative / best of lockstep and fixed lengths"] == pytest.approx(0.8)
    assert "q* lockstep / ideal lockstep" not in found  # the student alone was not measured


def few(monkeypatch):
    """Every command on next to nothing."""
    rows = (speed.STUDENT, speed.TEACHER, speed.PLAIN_TEACHER, speed.LOCKSTEP, speed.AUTO)
    monkeypatch.setattr(workload, "MOST_TOKENS", 6)
    monkeypatch.setattr(workload.Bench, "equal_tokens", 4)
    natural = [
        speed.Setting(1, 2, True, (*rows, speed.ASSISTED)),
        speed.Setting(2, 3, False, (*rows, *speed.PEERS)),
    ]
    monkeypatch.setattr(speed, "speed_settings", lambda n, natural_end: natural)
    monkeypatch.setattr(
        drafts, "draft_settings", lambda bench, n: [speed.Setting(1, 2, True, rows)]
    )
    monkeypatch.setattr(solver, "SIZES", ((50, 2, 1),))
    monkeypatch.setattr(memory, "SIZES", (Size(2, 4), Size(8, 4)))
    monkeypatch.setattr(workload, "memory_bandwidth", lambda device: 1e9)


def last_line(console):
    return json.loads(console.file.getvalue().strip().splitlines()[-1])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "what", ["speed", "drafts", "selfdistil", "scaling", "memory", "identity", "solver"]
)
def test_every_table_ends_with_one_line_of_json(what, monkeypatch, tmp_path):
    """Guards: a benchmark that breaks unnoticed; figures that cannot be read by a program."""
    few(monkeypatch)
    console = Console(width=120, file=io.StringIO())
    path = tmp_path / "line.json"
    assert (
        run_bench(BenchOptions(what=what, num_prompts=8, repeats=1, output=str(path)), console) == 0
    )
    line = last_line(console)
    assert line["benchmark"] == what
    assert line["hardware"]["torch"]
    assert line["results"]
    assert json.loads(path.read_text()) == line


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("what", ["speed", "drafts", "selfdistil", "scaling", "memory", "identity"])
def test_every_table_takes_shapes(what, monkeypatch):
    """Guards: a command that needs a tokenizer; emulated acceptance that is not labelled."""
    few(monkeypatch)
    equal = [
        speed.Setting(
            2, 2, False, (speed.TEACHER, speed.LOCKSTEP, speed.AUTO, speed.HF, speed.HF_MIX)
        )
    ]
    monkeypatch.setattr(speed, "speed_settings", lambda n, natural_end: equal)
    monkeypatch.setattr(drafts, "draft_settings", lambda bench, n: equal)
    console = Console(width=120, file=io.StringIO())
    assert run_bench(BenchOptions(what=what, num_prompts=8, repeats=1, **TINY), console) == 0
    assert "random weights" in last_line(console)["models"]["teacher"]
    if what in ("speed", "drafts", "memory"):
        assert last_line(console)["models"]["emulated_acceptance"] == 0.9
        assert "emulated acceptance 0.9" in console.file.getvalue()


def test_speed_has_the_rows_and_bounds_that_are_promised():
    """Guards: a contender that is dropped; assisted generation where it cannot run."""
    names = {row for setting in speed.speed_settings(64) for row in setting.rows}
    assert {
        speed.HF,
        speed.HF_MIX,
        speed.ASSISTED,
        speed.AUTO,
        *map(contenders.drafts, (1, 2, 4, 8)),
    } <= names
    bench = workload.Bench(ModelConfig())
    made = contenders.contenders(
        [speed.ASSISTED, speed.TEACHER], bench, bench.workload(1), batch_size=8
    )
    assert [contender.name for contender in made] == [speed.TEACHER]


@pytest.mark.parametrize(
    "options",
    [
        {"repeats": 0},
        {"num_prompts": 0},
        {"acceptance": 1.5},
        {"budget": 0},
        {"sizes": ("8*256",)},
        {"huge": "0x4"},
        {"output": "/nowhere/at/all.json"},
        {"teacher_shape": "tiny"},
        {**TINY, "models": ModelConfig(teacher="a-folder")},
        {**TINY, "student_shape": "Qwen3-0.6B", "same_weights": True},
        {"same_weights": True},
    ],
)
def test_options_that_make_no_sense_are_refused(options):
    """Guards: a division by zero, or a figure of something else, after minutes of measuring."""
    with pytest.raises(ConfigError):
        BenchOptions(**options)


def test_sizes_are_batch_times_tokens():
    """Guards: the two numbers swapped."""
    assert parse_size("32x512") == Size(batch=32, tokens=512)
    assert BenchOptions(sizes=("2x3",)).sizes_or((Size(9, 9),)) == (Size(2, 3),)
    assert BenchOptions().sizes_or((Size(9, 9),)) == (Size(9, 9),)


def test_the_hardware_is_named():
    """Guards: a figure that nobody knows the origin of."""
    facts = hardware(ModelConfig(device="cpu"))
    assert facts["cores"] >= 1
    assert "gpu" not in facts


def test_identity_is_asked_of_float32_only():
    """Guards: a failure that is none, in a precision for which nothing of the kind is promised."""
    with pytest.raises(ConfigError, match="float32"):
        identity.run(
            BenchOptions(what="identity", models=ModelConfig(dtype="bfloat16")), print, print
        )


def test_importing_the_benchmark_is_left_to_the_command():
    """Guards: `optimal-sampling --help` that takes seconds because it loads torch."""
    code = "import sys, optimal_sampling.cli as c; sys.exit('torch' in sys.modules or c.main(['--help']))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0
