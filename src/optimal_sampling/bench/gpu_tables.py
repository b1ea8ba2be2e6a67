"""What the cells of the table of large shapes are held against, and how they are shown."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from rich.table import Table

from optimal_sampling.bench.contenders import LOCKSTEP, STUDENT, TEACHER
from optimal_sampling.bench.gpu_cells import FAST, ROWS, Cell, Slice
from optimal_sampling.bench.options import Size
from optimal_sampling.bench.roofline import lockstep_bound
from optimal_sampling.bench.shapes import ShapeBench
from optimal_sampling.bench.speed import IDEAL, ROOFLINE, ideal_lockstep

__all__ = ["Target", "bounds", "gpu_table", "slice_table", "target_table", "targets"]


def bounds(
    bench: ShapeBench, sizes: tuple[Size, ...], cells: list[Cell]
) -> dict[str, dict[Size, float]]:
    """Per size, the tokens per second of ideal lockstep and of the roofline."""
    rates = {(cell.row, cell.size): cell.rate for cell in cells if cell.tokens}
    ideal, roofline = {}, {}
    for size in sizes:
        if (TEACHER, size) in rates and (STUDENT, size) in rates:
            ideal[size] = ideal_lockstep({name: rates[name, size] for name in (TEACHER, STUDENT)})
        engine = bench.engine(bench.workload(1), size.batch)
        roofline[size] = lockstep_bound(
            engine, size.batch, bench.prompt_tokens + size.tokens / 2, bench.bandwidth
        )
    return {IDEAL: ideal, ROOFLINE: roofline}


@dataclass(frozen=True)
class Target:
    """A figure that was asked for, and what was found."""

    what: str
    wanted: float
    found: float

    @property
    def met(self) -> bool:
        """Reached."""
        return self.found >= self.wanted


def targets(cells: list[Cell], ideal: dict[Size, float]) -> list[Target]:
    """Those whose rows were measured."""
    rates = {(cell.row, cell.size): cell.rate for cell in cells if cell.tokens}
    found = []
    for size in dict.fromkeys(cell.size for cell in cells):
        lockstep, teacher, fast = (rates.get((row, size), 0.0) for row in (LOCKSTEP, TEACHER, FAST))
        if size == Size(32, 512) and lockstep:
            found.append(Target(f"{size}: q* lockstep, tokens per second", 3000, lockstep))
        if lockstep and size in ideal:
            found.append(
                Target(f"{size}: q* lockstep / ideal lockstep", 0.9, lockstep / ideal[size])
            )
        if size.batch == 8 and fast and teacher:
            found.append(
                Target(f"{size}: q* speculative at 0.9 / teacher alone", 1.2, fast / teacher)
            )
    return found


def gpu_table(
    sizes: tuple[Size, ...], cells: list[Cell], limits: dict[str, dict[Size, float]]
) -> Table:
    """For people: a row per contender, a column per size."""
    table = Table(
        title="Large shapes, random weights", title_justify="left", caption_justify="left"
    )
    table.caption = "* part of the texts, as the time was up, without their prompts; - skipped"
    table.add_column("tokens per second, batch x tokens")
    for size in sizes:
        table.add_column(str(size), justify="right")
    for row in ROWS:
        table.add_row(row, *(_figure(cell) for cell in cells if cell.row == row))
    table.add_section()
    for name, values in limits.items():
        table.add_row(name, *(f"{values[size]:.0f}" if size in values else "-" for size in sizes))
    return table


def _figure(cell: Cell) -> str:
    return "-" if cell.skipped else f"{cell.rate:.0f}" + ("" if cell.complete else "*")


def slice_table(part: Slice) -> Table:
    """For people."""
    table = Table(
        title=f"{part.size} tokens, {part.shape} shape as both models, lockstep",
        title_justify="left",
    )
    table.add_column("by admission")
    table.add_column("", justify="right")
    for name, value in asdict(part).items():
        if name not in ("size", "shape", "skipped"):
            table.add_row(
                name.replace("_", " "), f"{value:.2f}" if isinstance(value, float) else str(value)
            )
    return table


def target_table(found: list[Target]) -> Table:
    """For people."""
    table = Table(title="Targets", title_justify="left")
    table.add_column("target")
    for name in ("wanted", "found", "met"):
        table.add_column(name, justify="right")
    for target in found:
        table.add_row(
            target.what, f"{target.wanted:g}", f"{target.found:.2f}", "yes" if target.met else "no"
        )
    return table
