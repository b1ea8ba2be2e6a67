"""What a server offers, and what it costs: asked at the start, by requests like those of a run."""

from __future__ import annotations

import re
import time
from collections.abc import Awaitable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any, Protocol, TypeVar

from optimal_sampling.engines.servers.access import Access
from optimal_sampling.engines.servers.dialect import Call, Dialect
from optimal_sampling.engines.servers.llama_api import LlamaDialect
from optimal_sampling.engines.servers.model import Scoring, ServedFacts, ServedModel, TokenList
from optimal_sampling.engines.servers.replies import BadReply, shown
from optimal_sampling.engines.servers.replies import field as value_of
from optimal_sampling.engines.servers.scoring import ScoringTime, ScoringTimes
from optimal_sampling.engines.servers.vllm_api import VllmDialect
from optimal_sampling.errors import (
    ConfigError,
    ServerError,
    TokenizerMismatchError,
    did_you_mean,
)

__all__ = [
    "PROBE_TEXTS",
    "Ask",
    "Probed",
    "change_since",
    "check_tokenizers",
    "probe",
    "scoring_times",
]

T = TypeVar("T")

PROBE_TEXTS = (
    "The quick brown fox jumps over the lazy dog; then nothing else happened.",
    "What is 12345 + 6.78?  Two  spaces, a\ttab,\n\na blank line.",
    "don't DON'T camelCase snake_case f(x) = \\frac{a}{b}^{2}; x_1 != y",
    "naïve café, 你好，世界, Привет, 1,000,000 \u2014 \U0001f642",
)
"""Texts whose ids tell two tokenizers apart."""

_END_TEXTS = (
    "</s>",
    "<|im_end|>",
    "<|endoftext|>",
    "<|end_of_text|>",
    "<|eot_id|>",
    "<|end|>",
    "<end_of_turn>",
    "<eos>",
    "<|return|>",
    "<|end▁of▁sentence|>",
)
"""Texts of end tokens. What is one token in the model's tokenizer is tried."""

_WHOLE = "a"
"""A text whose tokens are whole characters."""
_FEW = 4
_MANY = 10**9
_SHORT = 8
"""Tokens of the shorter of the two texts that each way of scoring is tried with."""
_DRAFTS = (1, 7)
"""Tokens of the drafts that it is tried with."""
_REPEATS = 3
_SAME = 0.05
"""By how much log-probabilities of equal weights may differ, in nats: of half precision."""
_PROBE_LENGTH = 128
_LONGEST_COMPARED = 1024
"""Tokens of the list that is asked for, to compare a server with itself: it may have other
limits."""


class Ask(Protocol):
    """Sends a call, with retries. Raises ServerError."""

    def __call__(self, call: Call[T]) -> Awaitable[T]:
        """The reply."""


@dataclass(frozen=True)
class Probed:
    """What was found out about one server."""

    url: str
    facts: ServedFacts
    dialect: Dialect
    prefix: Sequence[int]
    first: TokenList
    """The list after `prefix`, to compare servers by."""
    times: ScoringTimes
    """Of each way to score a draft that is offered."""

    def difference(self, other: TokenList) -> str:
        """How another list after `prefix` differs by more than rounding; "" if it does not."""
        ours = dict(zip(self.first.ids.tolist(), self.first.log_p.tolist(), strict=True))
        theirs = zip(other.ids.tolist(), other.log_p.tolist(), strict=True)
        pairs = [(token, ours[token], value) for token, value in theirs if token in ours]
        if len(pairs) < min(2, len(ours)):
            return "the likeliest tokens of a text are not the same"
        for token, one, two in pairs:
            if abs(one - two) > _SAME:
                return f"the log-probability of token {token} is {one:.3f} and {two:.3f}"
        return ""


async def probe(ask: Ask, access: Access, url: str) -> Probed:
    """All that a run has to know about one server. Raises ServerError, ConfigError."""
    card, names = await ask(Call("/v1/models", lambda reply: _card(reply, access.model)))
    context, slots = await _limits(ask, card, url)
    dialect: Dialect = VllmDialect(card["id"], names, access.vocab_size)
    if _kind(card) == LlamaDialect.kind:
        llama = LlamaDialect(card["id"], names, access.vocab_size, slots=slots)
        whole = await ask(llama.tokenize(_WHOLE))
        dialect = replace(llama, whole=next(iter(whole), None))
    prefix = (await _text_ids(ask, dialect))[: max(1, (context or _PROBE_LENGTH) // 2)]
    if isinstance(dialect, LlamaDialect):
        facts = _llama_facts(card, context)
    else:
        facts = await _vllm_facts(ask, card, prefix, url)
    rows = await _rows(ask, dialect, facts, prefix)
    dialect = replace(dialect, rows=rows)
    most = min(facts.max_top_k, rows or access.vocab_size or facts.max_top_k)
    first = await ask(dialect.next_tokens(prefix, min(_FEW, most)))
    facts = replace(
        facts,
        max_top_k=most,
        vocab_size=rows,
        stop_ids=await _stop_ids(ask, dialect, prefix),
        can_choose_ids=await _can_choose(ask, dialect, prefix),
        can_draft=await _offers(ask, dialect.draft(prefix, 2, 1, 0.0, 0)),
    )
    times = await scoring_times(ask, dialect, prefix, min(20, facts.max_top_k))
    facts = replace(facts, scoring=times.general())
    return Probed(url, facts, dialect, prefix, first, times)


async def change_since(found: Probed, ask: Ask, access: Access) -> str:
    """How a server differs from what was found at the start; "" if it does not.

    Two requests, three to llama.cpp's server. Where log-probabilities differ they are asked for
    again: under load, those of half precision vary. `ask` raises what its attempt does.
    """
    try:
        card, _ = await ask(Call("/v1/models", lambda reply: _card(reply, access.model)))
        context, _ = await _limits(ask, card, found.url)
    except ConfigError as error:
        return str(error)
    now = {"kind": _kind(card), "name": card["id"], "context_length": context}
    for name, value in now.items():
        if value != (before := getattr(found.facts, name)):
            return f"its {name.replace('_', ' ')} is {value}, and was {before}"
    call = found.dialect.next_tokens(found.prefix, min(_LONGEST_COMPARED, found.facts.max_top_k))
    for _ in range(_REPEATS):
        change = found.difference(await ask(call))
        if not change:
            return ""
    return f"{change}, then and now"


async def check_tokenizers(models: Mapping[str, ServedModel]) -> None:
    """Raises TokenizerMismatchError where two served models give a text different ids.

    `models`: by role. Raises ServerError where a server does not tokenize.
    """
    for text in PROBE_TEXTS:
        ids = {role: await model.tokenize(text) for role, model in models.items()}
        if len({tuple(each) for each in ids.values()}) > 1:
            given = "; ".join(f"{role}: {shown(each)}" for role, each in ids.items())
            raise TokenizerMismatchError(
                f"the tokenizers of the servers differ: of {text!r} they make {given}. "
                "Both models have to have the same token ids; serve two models of one family"
            )


async def scoring_times(
    ask: Ask, dialect: Dialect, prefix: Sequence[int], top_k: int
) -> ScoringTimes:
    """The time of each way to score a draft that the server offers: the best of `_REPEATS`."""
    ways: dict[Scoring, ScoringTime] = {}
    ends = [*prefix[: max(_DRAFTS)]]
    for way in dialect.scorings:
        if not await _offers(ask, dialect.score(prefix, ends[:1], top_k, way)):
            continue
        tried: dict[tuple[int, int], float] = {}
        for length, drafts in product((min(_SHORT, len(prefix)), len(prefix)), _DRAFTS):
            draft = ends[:drafts]
            call = dialect.score(prefix[:length], draft, top_k, way)
            size = (length + len(draft), len(draft) + 1)
            tried[size] = min([await _seconds(ask, call) for _ in range(_REPEATS)])
        ways[way] = ScoringTime.fitted(tried)
    return ScoringTimes(ways, len(prefix) + len(ends))


async def _seconds(ask: Ask, call: Call[Any]) -> float:
    started = time.perf_counter()
    await ask(call)
    return time.perf_counter() - started


def _card(reply: Any, wanted: str | None) -> tuple[Mapping[str, Any], frozenset[str]]:
    """The model's entry in /v1/models, and all names of it. Raises BadReply, ConfigError."""
    cards = {value_of(card, "id", str): card for card in value_of(reply, "data", list)}
    roots = {card.get("root") or name for name, card in cards.items()}
    if wanted is None and len(roots) != 1:
        raise ConfigError(
            f"the server has {len(cards)} models ({shown(', '.join(cards))}); name one of them"
        )
    if wanted is not None and wanted not in cards:
        raise ConfigError(
            f"the server has no model {wanted!r}{did_you_mean(wanted, cards)}; "
            f"it has: {shown(', '.join(cards))}"
        )
    name = wanted or next(iter(cards))
    root = cards[name].get("root") or name
    names = {other for other, card in cards.items() if (card.get("root") or other) == root}
    return cards[name], frozenset(names)


def _kind(card: Mapping[str, Any]) -> str:
    """Kind of server. An unknown one is taken for vLLM's."""
    kinds = {"llamacpp": LlamaDialect.kind, "optimal-sampling": "fake"}
    return kinds.get(card.get("owned_by", ""), VllmDialect.kind)


def _context(card: Mapping[str, Any]) -> int | None:
    """Most tokens of a text, by vLLM's name."""
    value = card.get("max_model_len")
    return value if isinstance(value, int) and value > 0 else None


async def _limits(ask: Ask, card: Mapping[str, Any], url: str) -> tuple[int | None, int]:
    """Most tokens of a text, and how many texts the server keeps at once."""
    if _kind(card) != LlamaDialect.kind:
        return _context(card), 1
    return await ask(Call("/props", lambda reply: _slots(reply, url)))


def _slots(reply: Any, url: str) -> tuple[int, int]:
    """Of llama.cpp's server, most tokens of a text, and how many texts it keeps at once.

    By /props, as /v1/models has the context of the model in training in its place, in older
    versions. Raises BadReply, ConfigError.
    """
    if isinstance(reply, Mapping) and reply.get("role") == "router":
        raise ConfigError(
            f"{url} is a llama-server without a model of its own, which starts others; start one "
            "with --model MODEL.gguf and give its address"
        )
    context = value_of(value_of(reply, "default_generation_settings", dict), "n_ctx", int)
    slots = value_of(reply, "total_slots", int)
    if min(context, slots) < 1:
        raise BadReply(f"{slots} slots of {context} tokens")
    return context, slots


async def _text_ids(ask: Ask, dialect: Dialect) -> list[int]:
    """Ids of a text, as the server makes them, repeated to the length of a prompt."""
    try:
        ids = await ask(dialect.tokenize(PROBE_TEXTS[0]))
    except ServerError as error:
        if error.kind not in ("not_found", "rejected", "invalid"):
            raise
        ids = []
    ids = ids or [0, 1]
    return (ids * _PROBE_LENGTH)[:_PROBE_LENGTH]


def _llama_facts(card: Mapping[str, Any], context: int | None) -> ServedFacts:
    rows = (card.get("meta") or {}).get("n_vocab")
    if not isinstance(rows, int) or rows < 1:
        raise ConfigError(
            "llama-server does not say how many tokens its model has; it may be loading the model, "
            "or too old"
        )
    return ServedFacts(
        name=card["id"],
        kind=LlamaDialect.kind,
        context_length=context,
        max_top_k=rows,
        vocab_size=rows,
    )


async def _vllm_facts(
    ask: Ask, card: Mapping[str, Any], prefix: Sequence[int], url: str
) -> ServedFacts:
    return ServedFacts(
        name=card["id"],
        kind=_kind(card),
        context_length=_context(card),
        max_top_k=await _most_logprobs(ask, card["id"], prefix, url),
        vocab_size=None,
    )


async def _most_logprobs(ask: Ask, name: str, prefix: Sequence[int], url: str) -> int:
    """The server's --max-logprobs, which it names where too many are asked for."""
    try:
        await ask(VllmDialect(name).next_tokens(prefix, _MANY))
    except ServerError as error:
        most = re.search(r"max allowed: (\d+)", str(error))
        if error.kind != "rejected" or most is None:
            raise ConfigError(
                f"{url} is no server that gives log-probabilities by token id: asked for more "
                f"than any server has, it says: {error}"
            ) from error
        if int(most[1]) < 1:
            raise ConfigError(f"{url} gives no log-probabilities: --max-logprobs is 0") from error
        return int(most[1])
    raise ConfigError(f"{url} answers a request for {_MANY} log-probabilities")


async def _rows(ask: Ask, dialect: Dialect, facts: ServedFacts, prefix: list[int]) -> int | None:
    """Number of ids with padding, where the server gives lists of all of them."""
    if facts.vocab_size is not None or facts.max_top_k < (dialect.vocab_size or 1):
        return facts.vocab_size
    try:
        return await ask(dialect.count_rows(prefix))
    except ServerError as error:
        if error.kind == "rejected":  # its limit is below its vocabulary
            return None
        raise


async def _offers(ask: Ask, call: Call[Any]) -> bool:
    try:
        await ask(call)
    except ServerError as error:
        if error.kind in ("rejected", "not_found", "invalid", "server_error"):
            return False
        raise
    return True


async def _can_choose(ask: Ask, dialect: Dialect, prefix: Sequence[int]) -> bool:
    return await _offers(ask, dialect.chosen(prefix, sorted({*prefix})[:2]))


async def _stop_ids(ask: Ask, dialect: Dialect, prefix: Sequence[int]) -> frozenset[int]:
    """Ids at which the server ends a text, among the usual end tokens."""
    found = set()
    for text in _END_TEXTS:
        try:
            ids = await ask(dialect.tokenize(text))
        except ServerError as error:
            if error.kind in ("not_found", "rejected", "invalid"):
                return frozenset()
            raise
        if len(ids) == 1 and await ask(dialect.ends_text(prefix, ids[0])):
            found.add(ids[0])
    return frozenset(found)
