"""CPU time of two source trees of this package on the same texts, new over old.

    python benchmarks/compare_trees.py OLD_SRC NEW_SRC --pairs 9 --num-prompts 32

Each tree runs in a process of its own that loads the shipped pair once and draws the same
completions through `OptimalSamplingModel`, whose arguments do not change between versions. The
trees take turns, in alternating order. Prints per row the geometric mean of the ratio with a 95%
interval (paired t on the logarithms), and whether both trees drew the same tokens. Ends with one
line of JSON. Needs SciPy.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

ROWS = {
    "q* speculative, batch 1": {"draft_tokens": "auto", "batch_size": 1},
    "q* speculative, batch 32": {"draft_tokens": "auto", "batch_size": 32},
    "q* lockstep, batch 1": {"draft_tokens": 0, "batch_size": 1},
    "q* lockstep, batch 32": {"draft_tokens": 0, "batch_size": 32},
}
"""Options of each row. At batch 1 an eighth of the prompts is drawn."""


def problems(count: int) -> list[str]:
    """Prompts of the shipped pair's kind."""
    draw = random.Random(0)
    return [
        f"{draw.randint(2, 99)}*{draw.randint(2, 9)}+{draw.randint(2, 99)}=?" for _ in range(count)
    ]


def serve(num_prompts: int) -> None:
    """The process of one tree: a row's name per line in, its CPU seconds and tokens out."""
    from optimal_sampling import OptimalSamplingModel

    model: Any = None
    drafts = None
    for line in sys.stdin:
        row = ROWS[line.strip()]
        if row["draft_tokens"] != drafts:
            drafts = row["draft_tokens"]
            model = OptimalSamplingModel(
                "toy-student",
                "toy-teacher",
                device="cpu",
                enable_chat_template=True,
                draft_tokens=drafts,
            )
            model.generate(problems(2), max_new_tokens=8)
        batch = row["batch_size"]
        prompts = problems(num_prompts if batch > 1 else max(1, num_prompts // 8))
        started = time.process_time()
        output = model.generate(prompts, max_new_tokens=160, batch_size=batch)
        seconds = time.process_time() - started
        tokens = output.generated_ids.tolist()
        print(json.dumps({"seconds": seconds, "tokens": tokens}), flush=True)


class Tree:
    """A running process of one source tree."""

    def __init__(self, source: str, num_prompts: int) -> None:
        # the working folder comes before PYTHONPATH, so it must hold no package
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--serve", str(num_prompts)],
            env={**os.environ, "PYTHONPATH": source, "OMP_NUM_THREADS": "1"},
            cwd=tempfile.gettempdir(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def measure(self, row: str) -> dict[str, Any]:
        """CPU seconds and tokens of one row. Raises SystemExit where the process failed."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(row + "\n")
        self.process.stdin.flush()
        for line in self.process.stdout:
            if line.startswith('{"seconds"'):
                result: dict[str, Any] = json.loads(line)
                return result
        raise SystemExit(f"the process of a tree failed in the row {row!r}; its error is above")


def interval(ratios: Sequence[float]) -> tuple[float, float, float]:
    """Geometric mean and its 95% interval, by Student's t, of at least two ratios."""
    from scipy import stats

    logs = [math.log(ratio) for ratio in ratios]
    mean = fmean(logs)
    spread = stats.t.ppf(0.975, len(logs) - 1) * stdev(logs) / math.sqrt(len(logs))
    return math.exp(mean), math.exp(mean - spread), math.exp(mean + spread)


def compare(trees: Sequence[Tree], pairs: int) -> tuple[dict[str, list[float]], dict[str, bool]]:
    """Ratios of CPU time, second tree over first, and whether the tokens were the same."""
    ratios: dict[str, list[float]] = {row: [] for row in ROWS}
    same = dict.fromkeys(ROWS, True)
    for row in ROWS:
        for tree in trees:
            tree.measure(row)  # the first time loads and warms up
        for pair in range(pairs):
            order = (0, 1) if pair % 2 else (1, 0)
            found = {place: trees[place].measure(row) for place in order}
            ratios[row].append(found[1]["seconds"] / found[0]["seconds"])
            same[row] &= found[1]["tokens"] == found[0]["tokens"]
        print(f"{row}: {pairs} pairs done", file=sys.stderr, flush=True)
    return ratios, same


def report(ratios: dict[str, list[float]], same: dict[str, bool]) -> None:
    """A table of intervals, and one line of JSON with every ratio."""
    print(f"{'CPU time, new / old':28}{'mean':>7}{'95% interval':>18}{'same tokens':>13}")
    for row, found in ratios.items():
        mean, low, high = interval(found)
        text = f"{low:.3f} to {high:.3f}"
        print(f"{row:28}{mean:7.3f}{text:>18}{'yes' if same[row] else 'NO':>13}")
    print(json.dumps({"ratios": ratios, "same_tokens": same}))


def main() -> None:
    """Read the command line, measure, report."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("old", help="folder that holds optimal_sampling/, the denominator")
    parser.add_argument("new", help="folder that holds optimal_sampling/, the numerator")
    parser.add_argument("--pairs", type=int, default=9, help="turns of each tree, at least 2")
    parser.add_argument("--num-prompts", type=int, default=32, help="prompts per turn at batch 32")
    arguments = parser.parse_args()
    sources = [str(Path(tree).resolve()) for tree in (arguments.old, arguments.new)]
    for source in sources:
        if not (Path(source) / "optimal_sampling" / "__main__.py").is_file():
            parser.error(f"{source} holds no optimal_sampling/__main__.py")
    if arguments.pairs < 2:
        parser.error("an interval needs --pairs of at least 2")
    report(*compare([Tree(source, arguments.num_prompts) for source in sources], arguments.pairs))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--serve"]:
        serve(int(sys.argv[2]))
    else:
        main()
