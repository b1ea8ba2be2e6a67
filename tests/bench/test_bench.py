"""The benchmark's arithmetic, and one tiny run of each table; nothing here is a timed test."""

import io
import json
import subprocess
import sys

import pytest
from rich.console import Console

from optimal_sampling.bench import BenchOptions, command, drafts, run_bench, solver, speed, workload
from optimal_sampling.bench.measure import Contender, interleave
from optimal_sampling.errors import ConfigError


def test_contenders_take_turns_and_the_first_round_is_not_counted():
    """Guards: a machine that slows down while one contender runs, and warming up that is counted."""
    order = []
    contenders = [Contender(name, lambda name=name: order.append(name) or 10) for name in "ab"]
    timings = interleave(contenders, 3)
    assert order == ["a", "b"] * 4
    assert timings["a"].tokens == [10, 10, 10]
    assert timings["b"].per_wall_second > 0


def test_medians_ignore_an_outlier():
    """Guards: a mean that one interruption decides."""
    timing = next(iter(interleave([Contender("x", lambda: 1)], 1).values()))
    timing.tokens, timing.wall, timing.cpu = [10, 10, 10], [1.0, 100.0, 2.0], [1.0, 1.0, 1.0]
    assert timing.per_wall_second == 5.0
    assert timing.per_cpu_second == 10.0


def test_the_ideal_is_both_forward_passes():
    """Guards: a ratio to another ideal than 1 / (1 / teacher + 1 / student)."""
    found = speed.ratios({speed.STUDENT: 300.0, speed.TEACHER: 100.0, speed.LOCKSTEP: 60.0, speed.SPECULATIVE: 200.0})
    assert found["q* lockstep / ideal lockstep"] == pytest.approx(0.8)
    assert found["q* speculative / teacher alone"] == pytest.approx(2.0)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("what", ["speed", "drafts", "scaling", "solver"])
def test_every_table_ends_with_one_line_of_json(what, monkeypatch):
    """Guards: a benchmark that breaks unnoticed; figures that cannot be read by a program."""
    monkeypatch.setattr(workload, "MOST_TOKENS", 6)
    monkeypatch.setattr(speed, "EQUAL_TOKENS", 4)
    monkeypatch.setattr(speed, "settings", lambda n: [speed.Setting(1, 2, peers=False), speed.Setting(2, 3)])
    monkeypatch.setattr(solver, "SIZES", ((50, 2, 1),))
    monkeypatch.setattr(drafts, "draft_settings", lambda n: [speed.Setting(1, 2)])
    console = Console(width=120, file=io.StringIO())
    assert run_bench(BenchOptions(what=what, num_prompts=8, repeats=1), console) == 0
    line = json.loads(console.file.getvalue().strip().splitlines()[-1])
    assert line["benchmark"] == what
    assert line["hardware"]["torch"]
    assert line["results"]


def test_options_that_make_no_sense_are_refused():
    """Guards: a division by zero after minutes of measuring."""
    with pytest.raises(ConfigError):
        BenchOptions(repeats=0)
    assert command.hardware()["cores"] >= 1


def test_importing_the_benchmark_is_left_to_the_command():
    """Guards: `optimal-sampling --help` that takes seconds because it loads torch."""
    code = "import sys, optimal_sampling.cli as c; sys.exit('torch' in sys.modules or c.main(['--help']))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0
