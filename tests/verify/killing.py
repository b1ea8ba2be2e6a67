"""A command that is killed again and again while it writes verdicts."""

from __future__ import annotations

import random
import signal
import subprocess
import time
from pathlib import Path

from optimal_sampling.records.store import Scan


def kill_repeatedly(
    command: list[str], path: Path, kills: int, rng: random.Random, longest: float
) -> set[tuple[str, str]]:
    """The verdicts in `path` (id, record) after as many kills, none of which lost one.

    Each kill comes up to `longest` seconds after the file has grown.
    """
    known: set[tuple[str, str]] = set()
    for _ in range(kills):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        before = path.stat().st_size if path.exists() else 0
        while process.poll() is None and (not path.exists() or path.stat().st_size == before):
            time.sleep(0.002)
        time.sleep(rng.uniform(0, longest))
        process.kill()
        assert process.wait() == -signal.SIGKILL, "it ended before it was killed"
        found = {(line["id"], line["record"]) for line in Scan(path)}
        assert found >= known
        known = found
    return known
