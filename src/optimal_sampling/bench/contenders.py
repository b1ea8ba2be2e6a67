"""What is timed, by name: our engine in each of its modes, and what a user of Transformers would write."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from optimal_sampling.bench.measure import Contender, Spent, timed
from optimal_sampling.bench.peers import transformers_generate
from optimal_sampling.bench.workload import Bench, Workload

__all__ = [
    "ASSISTED",
    "AUTO",
    "HF",
    "HF_MIX",
    "LOCKSTEP",
    "PLAIN_TEACHER",
    "STUDENT",
    "TEACHER",
    "contenders",
    "drafts",
]

STUDENT, TEACHER = "student alone", "teacher alone"
PLAIN_TEACHER = "teacher alone, shapes not padded"
LOCKSTEP = "q* lockstep"
AUTO = "q* speculative, auto (the default)"
HF, HF_MIX = "Transformers generate, teacher", "Transformers generate + logits processor, q*"
ASSISTED = "Transformers assisted generation, teacher"


def drafts(count: int) -> str:
    """The name of q* with this fixed draft length."""
    return f"q* speculative, {count}"


OURS: dict[str, dict[str, Any]] = {
    STUDENT: {"mode": "student"},
    TEACHER: {"mode": "teacher"},
    PLAIN_TEACHER: {"mode": "teacher", "batch_invariant": False},
    LOCKSTEP: {"draft_tokens": 0},
    **{drafts(k): {"draft_tokens": k} for k in (1, 2, 4, 8, 16)},
    AUTO: {"draft_tokens": "auto"},
}
PEERS: dict[str, dict[str, Any]] = {HF: {}, HF_MIX: {"mix": True}, ASSISTED: {"assisted": True}}


def contenders(
    names: Iterable[str], bench: Bench, workload: Workload, batch_size: int
) -> list[Contender]:
    """Those of the named that this pair has: shapes whose padding changes nothing run once, for instance."""
    return [
        _contender(name, bench, workload, batch_size)
        for name in names
        if _applies(name, bench, batch_size)
    ]


def _applies(name: str, bench: Bench, batch_size: int) -> bool:
    if name == PLAIN_TEACHER:
        return bench.padded
    return name != ASSISTED or (bench.has_assistant and batch_size == 1)


def _contender(name: str, bench: Bench, workload: Workload, batch_size: int) -> Contender:
    if name in PEERS:
        return Contender(
            name, lambda: transformers_generate(bench, workload, batch_size, **PEERS[name])
        )
    engine = bench.engine(workload, batch_size, **OURS[name])

    def once() -> int:
        return sum(len(c.token_ids) for c in engine.generate(workload.requests))

    def warmed() -> Spent:
        once()  # records anew what the contender before it made the engine forget
        return timed(once)

    return Contender(name, once if engine.pair.recorded_graphs is None else warmed)
