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


def test_the_rows_are_those_of_the_line_of_json(script):
    """Guards: wall clock for CPU time; two tables of one batch size in one row."""

    def table(natural, rate):
        setting = {"batch_size": 32, "natural_end": natural}
        rates = dict.fromkeys(script.ROWS, rate)
        return {"setting": setting, "per_cpu_second": rates, "per_wall_second": {}}

    found = script.rates({"results": [table(True, 5.0), table(False, 7.0)]})
    assert len(found) == 2 * len(script.ROWS)
    assert found["batch 32: teacher alone"] == 5.0
    assert found["batch 32, equal lengths: teacher alone"] == 7.0


def test_the_report_ends_with_every_ratio(script, capsys):
    """Guards: a ratio upside down in the last line; a row without its interval."""
    script.report({"row": [1.1, 1.1]})
    lines = capsys.readouterr().out.splitlines()
    assert json.loads(lines[-1]) == {"row": [1.1, 1.1]}
    assert lines[1].split() == ["row", "1.100", "1.100", "to", "1.100"]


def test_a_folder_without_the_package_is_refused(tmp_path):
    """Guards: the installed package measured in place of the tree that was named."""
    command = [sys.executable, str(SCRIPT), str(tmp_path), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert str(tmp_path) in done.stderr
