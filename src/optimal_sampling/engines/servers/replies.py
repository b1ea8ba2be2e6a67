"""Strict reading of servers' replies: what is not as expected is an error, never a guess."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal, TypeVar, get_args

import numpy as np

from optimal_sampling.engines.servers.model import TokenList

__all__ = [
    "CUT",
    "BadReply",
    "FailureKind",
    "decoded",
    "field",
    "numbers",
    "shown",
    "token_list",
    "with_chosen",
]

FailureKind = Literal[
    "refused",
    "tls",
    "reset",
    "timeout",
    "rate_limited",
    "unavailable",
    "server_error",
    "truncated",
    "malformed",
    "invalid",
    "wrong_model",
    "not_found",
    "redirected",
    "unauthorized",
    "rejected",
]
"""Why an attempt failed; docs/servers.md has what each means."""

T = TypeVar("T")
CUT = "..."
"""After a text that was cut."""
_SHOWN = 200
_LOWEST = -9999.0
"""What vLLM writes for -inf."""
_MOST_IDS = 1 << 31
_MOST_PADDED = 2
"""Ids with padding, in units of those without."""
_SLACK = 1e-3
"""By how much rounding may lift a sum of probabilities above 1."""


class BadReply(Exception):
    """A reply that cannot be used, and the kind of failure that it is."""

    def __init__(self, message: str, kind: FailureKind = "invalid") -> None:
        super().__init__(message)
        assert kind in get_args(FailureKind)
        self.kind = kind


def shown(value: object) -> str:
    """A value for a message, cut."""
    text = value if isinstance(value, str) else repr(value)
    return text if len(text) <= _SHOWN else text[:_SHOWN] + CUT


def decoded(content: bytes) -> Any:
    """The JSON of a reply. Raises BadReply, also for NaN and for names that occur twice."""
    try:
        return json.loads(content, object_pairs_hook=_distinct, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        text = shown(content.decode(errors="replace"))
        raise BadReply(f"the reply is no JSON ({error}): {text!r}", "malformed") from error


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise BadReply(f"{shown(twice)!r} occurs twice in one object of the reply")
    return values


def _no_constant(text: str) -> float:
    raise BadReply(f"the reply holds {text}")


def field(reply: Any, name: str, kind: type[T]) -> T:
    """A value of an object by name. Raises BadReply where it is missing or of another type."""
    if not isinstance(reply, Mapping):
        raise BadReply(f"expected an object with {name!r}, got {shown(reply)}")
    if name not in reply:
        has = shown(", ".join(reply)) or "nothing"
        raise BadReply(f"the reply has no {name!r}; it has {has}")
    value = reply[name]
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise BadReply(f"{name!r} of the reply must be {kind.__name__}, got {shown(value)}")
    return value


def numbers(reply: Any, name: str) -> list[int]:
    """A list of token ids by name."""
    values = field(reply, name, list)
    if any(type(value) is not int or value < 0 for value in values):
        raise BadReply(f"{name!r} of the reply must be token ids, got {shown(values)}")
    return values


def token_list(
    log_p: Mapping[int, Any], top_k: int, vocab_size: int | None, rows: int | None = None
) -> TokenList:
    """The list of a position, from log-probabilities by id. Raises BadReply.

    `top_k`: how many likeliest tokens were asked for; entries beyond are extra ids. Ids from
    `vocab_size` on are padding and left out. `rows`: number of ids with padding, where all were
    asked for; what is left is then normalised.
    """
    if not all(0 <= token < _MOST_IDS for token in log_p):
        raise BadReply(f"token ids of a list: {shown([*log_p])}")
    ids = np.fromiter(log_p, np.int64, len(log_p))
    values = np.array([_checked(each) for each in log_p.values()], np.float64)
    order = np.lexsort((ids, -values))
    ids, values = ids[order], values[order]
    if len(ids) < top_k:
        raise BadReply(f"asked for {top_k} tokens, got {len(ids)}")
    total = float(np.exp(values).sum())
    if total > 1 + _SLACK:
        raise BadReply(
            f"the probabilities of a list sum to {total:.4g}; the server may give logits, "
            "or probabilities that were changed"
        )
    if top_k:
        _check_others(total, values[top_k - 1], vocab_size)
    is_known = np.ones(len(ids), bool) if vocab_size is None else ids < vocab_size
    listed = int(is_known[:top_k].sum())
    left_out = float(np.exp(values[~is_known]).sum())
    ids, values = ids[is_known], values[is_known]
    if rows is None:
        if top_k and not listed:
            raise BadReply("all tokens of a list are padding; ask for more tokens")
        return TokenList(ids, values, listed, left_out=left_out)
    if len(ids) != (vocab_size or rows):
        raise BadReply(f"asked for all {vocab_size or rows} tokens, got {len(ids)}")
    largest = values[0]
    if not math.isfinite(largest):
        raise BadReply("no token has a probability")
    values = values - (largest + np.log(np.exp(values - largest).sum()))
    return TokenList(ids, values, len(ids), is_full=True)


def _check_others(total: float, last: float, vocab_size: int | None) -> None:
    """Raises BadReply where the ids outside of a list, none above its last one, cannot have the
    mass that the list lacks: the list has left out larger ones."""
    most = 0.0 if last == -math.inf else math.inf
    if vocab_size is not None:
        most = _MOST_PADDED * vocab_size * math.exp(last)
    if total + most < 1 - _SLACK:
        raise BadReply(
            f"the probabilities of a list sum to {total:.4g}, which is too little for its last one "
            f"of {math.exp(last):.3g}; the server may leave out tokens, or change probabilities"
        )


def with_chosen(listed: TokenList, chosen: Mapping[int, float]) -> TokenList:
    """A list and ids that were asked for by name. Those that it has keep the values it has."""
    known = {*listed.ids.tolist()}
    extra = {token: value for token, value in chosen.items() if token not in known}
    ids = np.concatenate([listed.ids, np.fromiter(extra, np.int64, len(extra))])
    values = np.concatenate([listed.log_p, np.fromiter(extra.values(), np.float64, len(extra))])
    return replace(listed, ids=ids, log_p=values)


def _checked(value: Any) -> float:
    """A log-probability."""
    if type(value) not in (int, float) or math.isnan(value) or value > _SLACK:
        raise BadReply(f"a log-probability of the reply is {shown(value)}")
    return -math.inf if value <= _LOWEST else min(float(value), 0.0)
