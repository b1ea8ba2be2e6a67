"""The arithmetic of benchmarks/compare_trees.py, on made-up figures."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "compare_trees.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("compare_trees", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_interval_is_that_of_a_paired_t_test(script):
    """Guards: an arithmetic mean of ratios; the narrower interval of a normal distribution."""
    mean, low, high = script.interval([1.0, 2.0, 4.0])
    assert mean == pytest.approx(2.0)
    # t(0.975, 2) = 4.302653; standard error = log(2) / sqrt(3)
    assert high / mean == pytest.approx(2 ** (4.302653 / 3**0.5))
    assert mean / low == pytest.approx(high / mean)


class Scripted:
    """A tree whose turns are written down: CPU seconds, and the tokens drawn."""

    def __init__(self, seconds, tokens):
        self.turns, self.seconds, self.tokens = [], seconds, tokens

    def measure(self, row):
        self.turns.append(row)
        return {"seconds": self.seconds, "tokens": self.tokens}


def test_the_trees_take_turns_and_the_ratio_is_new_over_old(script):
    """Guards: a ratio upside down, a first turn that is counted, other tokens unnoticed."""
    old, new = Scripted(2.0, [[1]]), Scripted(3.0, [[1]])
    ratios, same = script.compare([old, new], pairs=2)
    assert ratios == {row: [1.5, 1.5] for row in script.ROWS}
    assert same == dict.fromkeys(script.ROWS, True)
    assert old.turns == new.turns == [row for row in script.ROWS for _ in range(3)]
    _, same = script.compare([old, Scripted(3.0, [[2]])], pairs=1)
    assert same == dict.fromkeys(script.ROWS, False)


def test_the_report_ends_with_every_ratio(script, capsys):
    """Guards: a row without its interval, and one whose tokens differ without a word."""
    script.report({"row": [1.1, 1.1]}, {"row": False})
    lines = capsys.readouterr().out.splitlines()
    assert json.loads(lines[-1]) == {"ratios": {"row": [1.1, 1.1]}, "same_tokens": {"row": False}}
    assert lines[1].split() == ["row", "1.100", "1.100", "to", "1.100", "NO"]


def test_a_folder_without_the_package_is_refused(tmp_path):
    """Guards: the installed package measured in place of the tree that was named."""
    command = [sys.executable, str(SCRIPT), str(tmp_path), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert str(tmp_path) in done.stderr
