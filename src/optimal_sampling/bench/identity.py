"""Speculative decoding against lockstep: the same tokens and diagnostics, bit for bit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, astuple, dataclass

import numpy as np
import torch

from optimal_sampling.bench.architectures import make_pair
from optimal_sampling.bench.harness import Report, make_table
from optimal_sampling.bench.subcommands import IdentityOptions
from optimal_sampling.bench.workload import ModelPair, Variant, Workload
from optimal_sampling.errors import ConfigError
from optimal_sampling.types import Completion, Request

__all__ = ["run"]

BATCH = 32
CAPTURED = frozenset({"student_logits", "teacher_logits", "log_q"})
LOGIT_PROMPTS = 32
Texts = Mapping[Request, Completion]


@dataclass(frozen=True)
class Comparison:
    """Differences between two ways to draw the same texts."""

    what: str
    prompts: int
    tokens: int
    """Compared."""
    other_tokens: int
    """Texts whose tokens differ."""
    other_bits: int
    """Texts whose diagnostics, or logits, differ in any bit."""

    @classmethod
    def of(cls, what: str, plain: Texts, other: Texts) -> Comparison:
        """Compare the texts of the same requests."""
        tokens = other_tokens = other_bits = 0
        for request, text in plain.items():
            in_tokens, in_bits = differences(text, other[request])
            tokens += len(text.token_ids)
            other_tokens += in_tokens
            other_bits += in_bits
        return cls(what, len(plain), tokens, other_tokens, other_bits)

    @property
    def identical(self) -> bool:
        """No difference, and something was compared."""
        return self.tokens > 0 and not self.other_tokens and not self.other_bits


def differences(plain: Completion, other: Completion) -> tuple[bool, bool]:
    """Whether tokens differ, and whether a bit of diagnostics or captured rows does.

    NaN equals NaN.
    """
    tokens = plain.token_ids != other.token_ids
    ends = plain.finish_reason != other.finish_reason
    return tokens or ends, _bits(plain) != _bits(other)


def _bits(text: Completion) -> dict[str, bytes]:
    columns = list(text.trace.columns.values())
    bits = {"trace": np.array(columns).tobytes()}
    for name, rows in text.captured.items():
        bits[name] = rows.numpy().tobytes()
    return bits


def compare(pair: ModelPair, prompts: int, report: Report) -> list[Comparison]:
    """Drafts against lockstep; then logits and log q of a few prompts.

    Those are drawn one row at a time in lockstep, against drafts in a batch.
    """

    def draw(workload: Workload, batch: int, variant: Variant) -> Texts:
        report.status(f"{len(workload.requests)} prompts, batch {batch}, {variant.draft_tokens}")
        texts = pair.engine(workload, batch, variant).generate(workload.requests)
        return {text.request: text for text in texts}

    many, few = pair.workload(prompts), pair.workload(min(LOGIT_PROMPTS, prompts))
    lockstep = draw(many, BATCH, Variant(draft_tokens=0))
    auto = draw(many, BATCH, Variant())
    four = draw(many, BATCH, Variant(draft_tokens=4))
    alone = draw(few, 1, Variant(draft_tokens=0, capture=CAPTURED))
    together = draw(few, BATCH, Variant(capture=CAPTURED))
    return [
        Comparison.of("drafts auto / lockstep", lockstep, auto),
        Comparison.of("drafts 4 / lockstep", lockstep, four),
        Comparison.of("logits: drafts auto / lockstep, one by one", alone, together),
    ]


def run(options: IdentityOptions, report: Report) -> None:
    """The subcommand `identity`. Raises ConfigError unless the models run in float32."""
    pair = make_pair(options)
    if pair.dtype != torch.float32:
        raise ConfigError("equal bits are a promise of float32 only; add --dtype float32")
    measure(pair, options.num_prompts, report)


def measure(pair: ModelPair, prompts: int, report: Report) -> None:
    """Compare, and show the table; the report fails where anything differs."""
    comparisons = compare(pair, prompts, report)
    title = f"Texts drawn in two ways, batch {BATCH}: how many differ"
    columns = ("", "prompts", "tokens", "in tokens", "in bits")
    report.show(make_table(title, columns, map(astuple, comparisons)))
    report.models = pair.names
    report.results = list(map(asdict, comparisons))
    report.failed = not all(c.identical for c in comparisons)
