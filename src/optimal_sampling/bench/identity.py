"""Speculation changes nothing: the same tokens and diagnostics as plain decoding, bit for bit, on many prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import torch
from rich.table import Table

from optimal_sampling.bench.options import BenchOptions
from optimal_sampling.bench.pairs import make_bench
from optimal_sampling.bench.report import Report, Show, Tell
from optimal_sampling.bench.workload import Bench, Workload
from optimal_sampling.engines.device import resolve_dtype
from optimal_sampling.errors import ConfigError
from optimal_sampling.types import Completion, Request

__all__ = ["Comparison", "compare_logits", "compare_texts", "differences", "identity_table", "run"]

PROMPTS = 1000
CHUNK = 128
"""Prompts whose texts are held at once."""
BATCH = 32
DRAFTS: tuple[int | Literal["auto"], ...] = ("auto", 4)
CAPTURED = frozenset({"student_logits", "teacher_logits", "log_q"})
LOGIT_PROMPTS = 32


@dataclass
class Comparison:
    """Two ways to draw the same texts."""

    what: str
    prompts: int = 0
    tokens: int = 0
    """Compared."""
    other_tokens: int = 0
    """Texts whose tokens differ."""
    other_bits: int = 0
    """Texts whose diagnostics, or logits, differ in any bit."""

    @property
    def identical(self) -> bool:
        """No difference, and something was compared."""
        return self.tokens > 0 and not self.other_tokens and not self.other_bits

    def add(self, plain: Completion, other: Completion) -> None:
        """One text drawn both ways."""
        self.prompts += 1
        self.tokens += len(plain.token_ids)
        tokens, bits = differences(plain, other)
        self.other_tokens += tokens
        self.other_bits += bits

    def as_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


def differences(plain: Completion, other: Completion) -> tuple[bool, bool]:
    """Whether the tokens differ, and whether a bit of the diagnostics or of captured rows does. NaN equals NaN."""
    tokens = plain.token_ids != other.token_ids or plain.finish_reason != other.finish_reason
    traces = [np.array(list(c.trace.columns.values())).tobytes() for c in (plain, other)]
    same = traces[0] == traces[1] and plain.captured.keys() == other.captured.keys()
    return tokens, not (
        same and all(_same_bits(plain.captured[k], other.captured[k]) for k in plain.captured)
    )


def _same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and torch.equal(a.view(torch.int32), b.view(torch.int32))


def compare_texts(bench: Bench, workload: Workload, tell: Tell) -> list[Comparison]:
    """Every kind of drafting against lockstep, in chunks of prompts."""
    found = {k: Comparison(f"drafts {k} / lockstep") for k in DRAFTS}
    engines = {k: bench.engine(workload, BATCH, draft_tokens=k) for k in (0, *DRAFTS)}
    for first in range(0, len(workload.requests), CHUNK):
        requests = workload.requests[first : first + CHUNK]
        tell(f"{first} of {len(workload.requests)} prompts compared")
        texts = {k: _by_request(engine.generate(requests)) for k, engine in engines.items()}
        for k, comparison in found.items():
            for request in requests:
                comparison.add(texts[0][request], texts[k][request])
    return list(found.values())


def compare_logits(bench: Bench, workload: Workload, tell: Tell) -> Comparison:
    """Logits of both models and log q of every token: one row at a time in lockstep, against drafts in a batch."""
    tell("logits")
    alone = bench.engine(workload, 1, draft_tokens=0, capture=CAPTURED)
    together = bench.engine(workload, BATCH, draft_tokens="auto", capture=CAPTURED)
    found = Comparison("logits: drafts auto / lockstep, one by one")
    plain, other = (_by_request(engine.generate(workload.requests)) for engine in (alone, together))
    for request in workload.requests:
        found.add(plain[request], other[request])
    return found


def _by_request(completions: Any) -> dict[Request, Completion]:
    return {completion.request: completion for completion in completions}


def identity_table(comparisons: Sequence[Comparison]) -> Table:
    """For people."""
    title = f"Texts drawn in two ways, batch {BATCH}: how many differ"
    table = Table(title=title, title_justify="left")
    table.add_column("", no_wrap=True)
    for name in ("prompts", "tokens", "in tokens", "in bits"):
        table.add_column(name, justify="right")
    for c in comparisons:
        table.add_row(c.what, *map(str, (c.prompts, c.tokens, c.other_tokens, c.other_bits)))
    return table


def run(options: BenchOptions, show: Show, tell: Tell) -> Report:
    """The command `bench identity`. Fails where anything differs. Raises ConfigError unless models run in float32."""
    bench = make_bench(options)
    bench.acceptance = None
    if resolve_dtype(options.models.dtype, bench.device) != torch.float32:
        raise ConfigError("equal bits are a promise of float32 only; add --dtype float32")
    workload = bench.workload(options.prompts(PROMPTS))
    few = bench.workload(min(LOGIT_PROMPTS, options.prompts(PROMPTS)))
    comparisons = [*compare_texts(bench, workload, tell), compare_logits(bench, few, tell)]
    show(identity_table(comparisons))
    failed = not all(c.identical for c in comparisons)
    return Report(bench.names, [c.as_json() for c in comparisons], failed)
