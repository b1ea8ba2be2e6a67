"""Speculative decoding against lockstep: the same tokens and diagnostics, bit for bit."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, astuple, dataclass

import numpy as np
import torch
from rich.table import Table

from optimal_sampling.bench.architectures import make_pair
from optimal_sampling.bench.harness import SILENT, Display, Report, make_table
from optimal_sampling.bench.subcommands import IdentityOptions
from optimal_sampling.bench.workload import ModelPair, Variant, Workload
from optimal_sampling.engines.device import resolve_dtype
from optimal_sampling.errors import ConfigError
from optimal_sampling.types import Completion, Request

__all__ = ["Comparison", "compare", "differences", "run"]

CHUNK = 128
"""Prompts whose texts are held at once."""
BATCH = 32
DRAFTS = {
    "drafts auto / lockstep": Variant(draft_tokens="auto"),
    "drafts 4 / lockstep": Variant(draft_tokens=4),
}
CAPTURED = frozenset({"student_logits", "teacher_logits", "log_q"})
LOGIT_PROMPTS = 32


@dataclass
class Comparison:
    """Differences between two ways to draw the same texts."""

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
        """Compare one more text."""
        self.prompts += 1
        self.tokens += len(plain.token_ids)
        tokens, bits = differences(plain, other)
        self.other_tokens += tokens
        self.other_bits += bits


def differences(plain: Completion, other: Completion) -> tuple[bool, bool]:
    """Whether tokens differ, and whether a bit of diagnostics or captured rows does.

    NaN equals NaN.
    """
    tokens = plain.token_ids != other.token_ids or plain.finish_reason != other.finish_reason
    traces = [np.array(list(c.trace.columns.values())).tobytes() for c in (plain, other)]
    if traces[0] != traces[1] or plain.captured.keys() != other.captured.keys():
        return tokens, True
    return tokens, not all(_same_bits(x, other.captured[k]) for k, x in plain.captured.items())


def _same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and torch.equal(a.view(torch.int32), b.view(torch.int32))


def compare(pair: ModelPair, prompts: int, display: Display = SILENT) -> list[Comparison]:
    """Every kind of drafting against lockstep; then the logits of a few prompts."""
    workload, few = pair.workload(prompts), pair.workload(min(LOGIT_PROMPTS, prompts))
    return [*_compare_texts(pair, workload, display), _compare_logits(pair, few, display)]


def _compare_texts(pair: ModelPair, workload: Workload, display: Display) -> list[Comparison]:
    found = {name: Comparison(name) for name in DRAFTS}
    lockstep = pair.engine(workload, BATCH, Variant(draft_tokens=0))
    engines = {name: pair.engine(workload, BATCH, variant) for name, variant in DRAFTS.items()}
    for first in range(0, len(workload.requests), CHUNK):
        requests = workload.requests[first : first + CHUNK]
        display.status(f"{first} of {len(workload.requests)} prompts compared")
        plain = _by_request(lockstep.generate(requests))
        for name, engine in engines.items():
            _add_all(found[name], plain, _by_request(engine.generate(requests)))
    return list(found.values())


def _compare_logits(pair: ModelPair, workload: Workload, display: Display) -> Comparison:
    """Logits and log q of every token: one row at a time in lockstep, against drafts in a batch."""
    display.status("logits")
    found = Comparison("logits: drafts auto / lockstep, one by one")
    alone = pair.engine(workload, 1, Variant(draft_tokens=0, capture=CAPTURED))
    together = pair.engine(workload, BATCH, Variant(capture=CAPTURED))
    plain, other = (_by_request(e.generate(workload.requests)) for e in (alone, together))
    _add_all(found, plain, other)
    return found


def _by_request(completions: Iterable[Completion]) -> dict[Request, Completion]:
    return {completion.request: completion for completion in completions}


def _add_all(
    comparison: Comparison, plain: dict[Request, Completion], other: dict[Request, Completion]
) -> None:
    for request, completion in plain.items():
        comparison.add(completion, other[request])


def identity_table(comparisons: Sequence[Comparison]) -> Table:
    """The table to be printed."""
    title = f"Texts drawn in two ways, batch {BATCH}: how many differ"
    columns = ("", "prompts", "tokens", "in tokens", "in bits")
    return make_table(title, columns, [astuple(c) for c in comparisons])


def run(options: IdentityOptions, display: Display) -> Report:
    """The subcommand `identity`. Fails where anything differs.

    Raises ConfigError unless the models run in float32.
    """
    pair = make_pair(options)
    if resolve_dtype(options.models.dtype, pair.device) != torch.float32:
        raise ConfigError("equal bits are a promise of float32 only; add --dtype float32")
    return report(pair, compare(pair, options.num_prompts, display), display)


def report(pair: ModelPair, comparisons: Sequence[Comparison], display: Display) -> Report:
    """Show the comparisons; the report fails where anything differs."""
    display.show(identity_table(comparisons))
    failed = not all(c.identical for c in comparisons)
    return Report(pair.names, [asdict(c) for c in comparisons], failed)
