"""Two source trees of this package on the main rows of `bench speed`, in alternating processes.

    python benchmarks/compare_trees.py OLD_SRC NEW_SRC --pairs 9 --num-prompts 64

Each pair of runs is one process per tree, which runs `python -m optimal_sampling bench speed` with
one repeat and one thread; the order alternates. Prints for each row the geometric mean of the ratio
of CPU time, new over old, with a 95% interval (paired t on the logarithms). Ends with one line of
JSON. Needs SciPy.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev

ROWS = ("teacher alone", "q* lockstep", "q* speculative, auto (the default)")


def measure(tree: str, prompts: int) -> dict[str, float]:
    """Tokens per CPU second of one tree, by table and row. Raises SystemExit where it fails."""
    environment = {**os.environ, "PYTHONPATH": tree, "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "line.json"
        command = [sys.executable, "-m", "optimal_sampling", "bench", "speed"]
        command += ["--threads", "1", "--repeats", "1", "--num-prompts", str(prompts)]
        command += ["--output", str(output)]
        # the folder of the process comes before PYTHONPATH, so it must hold no package
        done = subprocess.run(
            command, env=environment, cwd=folder, capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise SystemExit(f"{tree} failed:\n{done.stderr[-3000:]}")
        return rates(json.loads(output.read_text()))


def rates(line: dict) -> dict[str, float]:
    """The main rows of each table, from the line of JSON of `bench speed`."""
    found = {}
    for table in line["results"]:
        setting = table["setting"]
        ends = "" if setting["natural_end"] else ", equal lengths"
        for row in ROWS:
            name = f"batch {setting['batch_size']}{ends}: {row}"
            found[name] = table["per_cpu_second"][row]
    return found


def interval(ratios: Sequence[float]) -> tuple[float, float, float]:
    """Geometric mean and its 95% interval, by Student's t, of at least two ratios."""
    from scipy import stats

    logs = [math.log(ratio) for ratio in ratios]
    mean = fmean(logs)
    spread = stats.t.ppf(0.975, len(logs) - 1) * stdev(logs) / math.sqrt(len(logs))
    return math.exp(mean), math.exp(mean - spread), math.exp(mean + spread)


def main() -> None:
    """Read the command line, measure, report."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("old", help="folder that holds optimal_sampling/, the denominator")
    parser.add_argument("new", help="folder that holds optimal_sampling/, the numerator")
    parser.add_argument("--pairs", type=int, default=9, help="runs of each tree, at least 2")
    parser.add_argument("--num-prompts", type=int, default=64, help="as of `bench speed`")
    arguments = parser.parse_args()
    trees = [str(Path(tree).resolve()) for tree in (arguments.old, arguments.new)]
    for tree in trees:
        if not (Path(tree) / "optimal_sampling" / "__main__.py").is_file():
            parser.error(f"{tree} holds no optimal_sampling/__main__.py")
    if arguments.pairs < 2:
        parser.error("an interval needs --pairs of at least 2")
    ratios: dict[str, list[float]] = {}
    for pair in range(arguments.pairs):
        runs = []
        for tree in trees[:: -1 if pair % 2 else 1]:
            print(f"pair {pair + 1} of {arguments.pairs}: {tree}", file=sys.stderr, flush=True)
            runs.append(measure(tree, arguments.num_prompts))
        old, new = runs[:: -1 if pair % 2 else 1]
        for name, rate in new.items():
            # CPU time per token is one over the rate
            ratios.setdefault(name, []).append(old[name] / rate)
    report(ratios)


def report(ratios: dict[str, list[float]]) -> None:
    """A table of intervals, and one line of JSON with every ratio."""
    print(f"{'CPU time per token, new / old':62}{'mean':>7}{'95% interval':>18}")
    for name, found in ratios.items():
        mean, low, high = interval(found)
        print(f"{name:62}{mean:7.3f}{f'{low:.3f} to {high:.3f}':>18}")
    print(json.dumps(ratios))


if __name__ == "__main__":
    main()
