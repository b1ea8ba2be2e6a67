"""Interleaved repeats and their medians. Knows nothing of what is measured."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from statistics import median

__all__ = ["Contender", "Spent", "Timing", "interleave", "timed"]


@dataclass(frozen=True)
class Spent:
    """Tokens, and the seconds they took."""

    tokens: int = 0
    wall: float = 0.0
    cpu: float = 0.0
    """Of all threads of this process."""

    def __add__(self, other: Spent) -> Spent:
        return Spent(self.tokens + other.tokens, self.wall + other.wall, self.cpu + other.cpu)


@dataclass(frozen=True)
class Contender:
    """Something to be timed: `run` does the work once and says how many tokens it made.

    Where only a part of its work counts, it says what that part took.
    """

    name: str
    run: Callable[[], int | Spent]


@dataclass
class Timing:
    """The repeats of one contender."""

    tokens: list[int] = field(default_factory=list)
    wall: list[float] = field(default_factory=list)
    """Seconds."""
    cpu: list[float] = field(default_factory=list)
    """Seconds of all threads of this process."""

    def add(self, spent: Spent) -> None:
        """One repeat."""
        self.tokens.append(spent.tokens)
        self.wall.append(spent.wall)
        self.cpu.append(spent.cpu)

    @property
    def per_wall_second(self) -> float:
        """Median tokens per second of wall clock."""
        return median(n / s for n, s in zip(self.tokens, self.wall, strict=True))

    @property
    def per_cpu_second(self) -> float:
        """Median tokens per second of CPU time."""
        return median(n / s for n, s in zip(self.tokens, self.cpu, strict=True))


def interleave(
    contenders: Iterable[Contender], repeats: int, tell: Callable[[str], None] = lambda text: None
) -> dict[str, Timing]:
    """Run every contender once, in turn, `repeats` times over, after one run of each that is not counted.

    In turn, so that a machine that gets slower or busier meanwhile does so for all of them.
    """
    contenders = list(contenders)
    timings = {contender.name: Timing() for contender in contenders}
    for repeat in range(-1, repeats):
        for contender in contenders:
            tell(
                f"{contender.name}: {'warming up' if repeat < 0 else f'repeat {repeat + 1} of {repeats}'}"
            )
            spent = timed(contender.run)
            if repeat >= 0:
                timings[contender.name].add(spent)
    return timings


def timed(work: Callable[[], int | Spent]) -> Spent:
    """Do it, and what it took; or what it says that the part that counts took."""
    wall, cpu = time.perf_counter(), time.process_time()
    made = work()
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    return made if isinstance(made, Spent) else Spent(made, wall, cpu)
