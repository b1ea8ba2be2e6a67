"""The likeliest tokens of a record -> columns that other tools read."""

from __future__ import annotations

from base64 import b64decode
from typing import TYPE_CHECKING, Any

import numpy as np

from optimal_sampling.errors import RunFolderError
from optimal_sampling.records.export.options import SoftLayout
from optimal_sampling.records.schema import Record

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = ["read_top_tokens", "soft_columns", "soft_schema"]

NO_TOKEN = -1e4
"""In place of -inf, whose product with a probability of 0 is no number."""


def read_top_tokens(record: Record, distribution: str) -> tuple[np.ndarray, np.ndarray]:
    """Ids and log-probabilities, [tokens, k] each, of `student`, `teacher` or `mixture`.

    Raises RunFolderError where the record does not have them.
    """
    top = record.get("top_tokens")
    names: list[str] = top["distributions"] if top else []
    if record.get("granularity") == "byte":
        raise RunFolderError(
            f"record {record['id']} was drawn byte by byte, so that q is no law of tokens: soft "
            "targets need two models with one tokenizer"
        )
    if top is None or distribution not in names:
        raise RunFolderError(
            f"record {record['id']} has no top tokens of the {distribution} "
            f"(it has: {', '.join(names) or 'none'}); generate with --top-tokens 20"
        )
    shape = -1, len(names), top["k"]
    ids = np.frombuffer(b64decode(top["ids"]), "<i4").reshape(shape)
    log_p = np.frombuffer(b64decode(top["log_p"]), "<f2").reshape(shape)
    place = names.index(distribution)
    return ids[:, place], log_p[:, place].astype(np.float32)


def soft_schema(layout: SoftLayout) -> dict[str, pa.DataType]:
    """Names and types of the columns."""
    import pyarrow as pa

    ids, values = pa.list_(pa.list_(pa.int32())), pa.list_(pa.list_(pa.float32()))
    if layout == "distillkit":
        return {"token_ids": ids, "top_values": values}
    names = "logprob_token_ids", "logprobs", "actual_token_ids", "actual_logprobs"
    return dict(zip(names, (ids, values) * 2, strict=True))


def soft_columns(
    record: Record, distribution: str, layout: SoftLayout, prompt_ids: list[int]
) -> dict[str, Any]:
    """The columns of a record.

    `distillkit`: a row per position of `input_ids`, that of the token after it. Positions of the
    prompt, and the last one, have their own token with probability 1. `trl`: a row per token of
    the completion; `actual_logprobs` is -inf where the token drawn is not among the k.
    """
    ids, log_p = read_top_tokens(record, distribution)
    if layout == "distillkit":
        return _by_position(ids, log_p, prompt_ids + record["completion_ids"])
    drawn = np.array(record["completion_ids"])[:, None]
    actual = np.where(ids == drawn, log_p, -np.inf).max(1, keepdims=True)
    return {
        "logprob_token_ids": ids.tolist(),
        "logprobs": log_p.tolist(),
        "actual_token_ids": drawn.tolist(),
        "actual_logprobs": actual.tolist(),
    }


def _by_position(ids: np.ndarray, log_p: np.ndarray, text: list[int]) -> dict[str, Any]:
    first = len(text) - len(ids)
    all_ids = np.zeros((len(text), ids.shape[1]), np.int32)
    values = np.full(all_ids.shape, NO_TOKEN, np.float32)
    all_ids[:, 0], values[:, 0] = text, 0.0
    all_ids[first - 1 : -1] = ids
    values[first - 1 : -1] = np.maximum(log_p, NO_TOKEN)
    return {"token_ids": all_ids.tolist(), "top_values": values.tolist()}
