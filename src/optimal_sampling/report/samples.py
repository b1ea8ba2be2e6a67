"""Samples as the page has them: a short entry each, and their texts and top tokens in chunks.

The page opens a chunk when one of its samples is scrolled to.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import numpy as np

from optimal_sampling.records.schema import Record
from optimal_sampling.records.verdicts import Graded
from optimal_sampling.spans import METRICS, SpannedText, TokenReader

__all__ = ["metrics_data", "sample_entry", "sample_text", "sample_top"]

_SCALES = {
    "alpha": 1000,
    "kl_student": 10_000,
    "kl_teacher": 10_000,
    "vetoed": 10_000,
    "log_ratio": 100,
    "acceptance": 1000,
}
"""The page has whole numbers: a value times its scale."""

_SHARES = 10_000  # the scale of the probabilities of top tokens


def sample_entry(run: int, record: Record, graded: Graded | None) -> list[Any]:
    """What filters, sorting and the line above a sample need. `report.js` has the names."""
    kept = record.get("mode", "mixture") == "mixture"  # absent in old records
    return [
        run,
        record["row_index"],
        record["sample_index"],
        record["id"][:12],
        record.get("stage", ""),
        graded["verdict"] if graded else "",
        graded["answer"] if graded else None,
        graded["reference"] if graded else None,
        record["finish_reason"],
        record["n_completion_tokens"],
        record.get("alpha_weighted") if kept and not _is_constant(record) else None,
        record.get("kl_student") if kept else None,
        record.get("kl_teacher") if kept else None,
        record.get("vetoed") or None,
        record["error"],
        len(record["completion"]),
    ]


def _is_constant(record: Record) -> bool:
    """Whether alpha is 0 at every token, or 1, and says nothing."""
    return record["alpha_min"] == record["alpha_max"] and record["alpha_min"] in (0.0, 1.0)


def sample_text(record: Record, text: SpannedText, graded: Graded | None) -> dict[str, Any]:
    """Prompts, pieces and their diagnostics."""
    teacher = record["teacher_prompt"]
    student = record["student_prompt"]
    entry: dict[str, Any] = {
        "student": student,
        "teacher": "" if teacher == student else teacher,
        "pieces": [piece.text for piece in text.pieces],
        "counts": [[i, p.count] for i, p in enumerate(text.pieces) if p.count > 1],
        "unit": text.unit,
        "columns": {
            name: [_scaled(name, value) for value in column]
            for name, column in text.columns.items()
        },
    }
    if text.end:
        ends = {name: _scaled(name, value) for name, value in text.end_values.items()}
        entry |= {"end": text.end, "end_values": ends}
    if text.note:
        entry["note"] = text.note
    if graded and graded["detail"]:
        entry["detail"] = graded["detail"]
    return entry


def sample_top(
    record: Record, text: SpannedText, reader: TokenReader | None, most: int
) -> Mapping[str, Any] | None:
    """The top tokens of every token: names of the distributions, a table of the texts, and per
    token, distribution and rank a place in the table and a probability.
    """
    top = text.top
    if top is None or reader is None or not most:
        return None
    ids, log_p = top.ids[:, :, :most], top.log_p[:, :, :most]
    table, places = np.unique(ids, return_inverse=True)
    drawn = np.searchsorted(table, record["completion_ids"])
    is_kept = table[drawn.clip(0, len(table) - 1)] == record["completion_ids"]
    shares = np.where(np.isfinite(log_p), np.exp(log_p), 0.0)
    return {
        "distributions": top.distributions,
        "k": ids.shape[2],
        "texts": [reader.text(int(token)) for token in table],
        "places": places.ravel().tolist(),
        "shares": np.rint(shares * _SHARES).astype(int).ravel().tolist(),
        "drawn": np.where(is_kept, drawn, -1).tolist(),
    }


def _scaled(name: str, value: float | None) -> int | None:
    return None if value is None else round(value * _SCALES[name])


def metrics_data() -> list[dict[str, Any]]:
    """METRICS with their scales."""
    return [{"name": name, "scale": _SCALES[name], **asdict(METRICS[name])} for name in METRICS]
