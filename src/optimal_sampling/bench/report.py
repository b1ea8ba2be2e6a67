"""What a command hands back, and the kind of table that most of them show."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from rich.table import Table

__all__ = ["Report", "Show", "Tell", "add_rates", "rates_table"]

Show: TypeAlias = Callable[[Table | str], None]
"""Prints a table or a line."""
Tell: TypeAlias = Callable[[str], None]
"""Says what is being done, for as long as it is."""


@dataclass(frozen=True)
class Report:
    """For the line of JSON, and for the exit code."""

    models: dict[str, Any]
    results: list[dict[str, Any]]
    failed: bool = False
    """What the command is to show was found to be otherwise."""


def rates_table(title: str, wall: Mapping[str, float], cpu: Mapping[str, float]) -> Table:
    """Tokens per second by name, of wall clock and of CPU time."""
    table = Table(title=title, title_justify="left")
    table.add_column("tokens per second", no_wrap=True)
    table.add_column("wall clock", justify="right")
    table.add_column("CPU time", justify="right")
    add_rates(table, wall, cpu, ".0f")
    return table


def add_rates(table: Table, wall: Mapping[str, float], cpu: Mapping[str, float], form: str) -> None:
    """One more section. What has no CPU time stays empty there."""
    for name, value in wall.items():
        table.add_row(name, format(value, form), format(cpu[name], form) if name in cpu else "")
    table.add_section()
