"""Tokens per second of q* by the number of drafted tokens, beside the teacher alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from optimal_sampling.bench.measure import Contender, interleave
from optimal_sampling.bench.peers import transformers_generate
from optimal_sampling.bench.speed import Result, Setting
from optimal_sampling.bench.workload import Bench, Workload, make_workload

__all__ = ["draft_settings", "measure_drafts"]

TEACHER = "teacher alone"
LOCKSTEP, AUTO = "q* lockstep", "q* speculative, auto"
ASSISTED = "Transformers assisted generation, teacher"
LENGTHS = (1, 2, 4, 8, 16)


def draft_settings(prompts: int) -> list[Setting]:
    """Batch 1 to 128, on fewer prompts where it is slow."""
    return [
        Setting(1, max(8, prompts // 16)),
        Setting(8, max(32, prompts // 4), peers=False),
        Setting(32, max(64, prompts // 2), peers=False),
        Setting(128, max(256, prompts), peers=False),
    ]


def measure_drafts(bench: Bench, setting: Setting, repeats: int, tell: Callable[[str], None]) -> Result:
    """Time the teacher alone, plain decoding, fixed draft lengths and `auto` in turn.

    The teacher alone is as fast as our engine runs it: its shapes are not padded (`batch_invariant=False`).
    """
    workload = make_workload(bench, setting.prompts)
    return Result.of(
        bench, workload, setting, interleave(_contenders(bench, workload, setting), repeats, tell), _ratios
    )


def _contenders(bench: Bench, workload: Workload, setting: Setting) -> list[Contender]:
    size = setting.batch_size
    alone = bench.engine(workload, size, batch_invariant=False).with_mixture(mode="teacher")

    def drafting(count: Any) -> Callable[[], int]:
        engine = bench.engine(workload, size).with_mixture(draft_tokens=count)
        return lambda: sum(len(c.token_ids) for c in engine.generate(workload.requests))

    found = [
        Contender(TEACHER, lambda: sum(len(c.token_ids) for c in alone.generate(workload.requests))),
        Contender(LOCKSTEP, drafting(0)),
        *(Contender(f"q* speculative, {k}", drafting(k)) for k in LENGTHS),
        Contender(AUTO, drafting("auto")),
    ]
    if setting.peers:
        found.append(Contender(ASSISTED, lambda: transformers_generate(bench, workload, 1, assisted=True)))
    return found


def _ratios(speed: Mapping[str, float]) -> dict[str, float]:
    fixed = [value for name, value in speed.items() if name.startswith("q*") and name != AUTO]
    found = {
        "auto / teacher alone": speed[AUTO] / speed[TEACHER],
        "auto / best of lockstep and fixed lengths": speed[AUTO] / max(fixed),
    }
    if ASSISTED in speed:
        found["auto / Transformers assisted generation"] = speed[AUTO] / speed[ASSISTED]
    return found
