"""One completion from two servers, in rounds that ask both at once.

The drafter is the student, or the only model. A path is what it alone would draw with the text's
noise, as far as its likeliest tokens led there. In a round the other server gives the lists of a
path, while the drafter drafts on from its end. Where there is no path, the drafter may be asked for
one first. Tokens are drawn from the lists of both models and the noise, path or no path.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from optimal_sampling.engines.base import prompt_problem
from optimal_sampling.engines.servers.drafting import DraftWidth
from optimal_sampling.engines.servers.draw_queue import DrawQueue
from optimal_sampling.engines.servers.mixing import DrawnToken, ListMixer, Place
from optimal_sampling.engines.servers.model import DraftedToken, ServedModel, TokenList
from optimal_sampling.engines.servers.replicas import AFFINITY
from optimal_sampling.errors import EngineError, ServerError
from optimal_sampling.types import (
    LIST_FIELDS,
    TRACE_FIELDS,
    Completion,
    FinishReason,
    Request,
    TokenTrace,
)

__all__ = ["OnToken", "PairCounts", "ServedPair", "TextRow"]

T = TypeVar("T")

OnToken = Callable[[DrawnToken], Awaitable[bool]]
"""Awaited with every token drawn; True ends the text."""

_WIDENED = 4
"""How many times the tokens of a list to ask for, where its bound is above the tolerance."""


@dataclass(slots=True)
class PairCounts:
    """Counts of the latest `generate` call."""

    rounds: int = 0
    tokens: int = 0
    drafted: int = 0
    """Tokens of paths."""
    accepted: int = 0
    """Of these, drawn."""
    asked_again: int = 0
    """Tokens for which longer lists were asked for."""
    above: int = 0
    """Tokens whose bound is above the tolerance all the same."""
    bounds: float = 0.0
    """Sum over the tokens."""
    largest_bound: float = 0.0

    @property
    def mean_bound(self) -> float:
        """Mean over the tokens."""
        return self.bounds / self.tokens if self.tokens else 0.0


@dataclass(slots=True)
class ServedPair:
    """Two served models, or one, and how to draw from them."""

    models: Mapping[str, ServedModel]
    """By role, the drafter first. Started."""
    mixer: ListMixer
    top_k: int
    tolerance: float | None
    """Bound above which longer lists are asked for."""
    stop_ids: frozenset[int]
    contexts: Mapping[str, int | None]
    """By role, most tokens of a text."""
    rows: Mapping[str, int]
    """By role, ids that prompts may have lie below."""
    width: DraftWidth
    counts: PairCounts = field(default_factory=PairCounts)
    draws: DrawQueue = field(init=False)

    def __post_init__(self) -> None:
        self.draws = DrawQueue(self.mixer)

    def problem(self, request: Request) -> str:
        """Why a request cannot be served; "" if it can."""
        return prompt_problem(
            list(self.models),
            [request.prompt_ids(role) for role in self.models],
            [self.contexts[role] for role in self.models],
            [self.rows[role] for role in self.models],
        )

    def list_length(self, role: str) -> int:
        """Tokens of a list that are asked for at first."""
        most = self.models[role].facts.max_top_k
        return most if self.top_k < 0 else min(self.top_k, most)

    def count(self, drawn: DrawnToken) -> None:
        """Count a token that was drawn."""
        self.counts.tokens += 1
        self.counts.above += self.tolerance is not None and drawn.bound > self.tolerance
        self.counts.bounds += drawn.bound
        self.counts.largest_bound = max(self.counts.largest_bound, drawn.bound)

    async def complete(self, request: Request, on_token: OnToken | None = None) -> Completion:
        """The completion of a request, which may be a failed one."""
        problem = self.problem(request)
        if problem:
            return Completion.failed(request, problem)
        return await TextRow(request, self, on_token).complete()


class TextRow:
    """A request in progress."""

    def __init__(self, request: Request, pair: ServedPair, on_token: OnToken | None = None) -> None:
        self.request = request
        self.pair = pair
        self.on_token = on_token
        self.tokens: list[int] = []
        self.trace: list[tuple[float, ...]] = []
        self.path: list[DraftedToken] = []
        self.reason: FinishReason | Literal[""] = ""
        rooms = [
            context - len(request.prompt_ids(role))
            for role, context in pair.contexts.items()
            if context is not None
        ]
        self.limit = min([request.max_new_tokens, *rooms])

    async def complete(self) -> Completion:
        """All rounds, until the text ends or a server does not answer."""
        started = time.perf_counter()
        AFFINITY.set(self.request.noise_key)
        error = ""
        try:
            while not self.reason:
                await self._round()
        except ServerError as failure:
            self.reason, error = "error", str(failure)
        trace = TokenTrace.from_rows(self.trace, TRACE_FIELDS + LIST_FIELDS)
        seconds = time.perf_counter() - started
        assert self.reason
        return Completion(self.request, tuple(self.tokens), self.reason, trace, error, seconds)

    async def _round(self) -> None:
        """Ask the servers, and draw as far as the lists reach."""
        self.pair.counts.rounds += 1
        drafter, *others = self.pair.models
        width = self.pair.width.choose()
        is_alone = self.pair.width.drafts_alone or not others
        if is_alone and not self.path and min(width, self._room) > 1:
            self.path = self._path(await self._draft(drafter, width))
        path = self.path
        requests: list[Awaitable[Any]] = [*map(self._score, others)]
        if not path or (others and not self._ends):
            requests.append(self._draft(drafter, width))
        answers = await _together(*requests)
        scored, ahead = answers[: len(others)], answers[-1] if len(answers) > len(others) else []
        drafted = [*path, *ahead[:1]]
        lists = [
            [each.choices, *(found[place] for found in scored)]
            for place, each in enumerate(drafted)
        ]
        for place, drawn in enumerate(await self._drawn(lists, [each.token for each in drafted])):
            await self._append(drawn, drafted[place].choices)
            if self.reason:
                return
            if drawn.token != drafted[place].token:
                self.path = []
                return
            self.pair.counts.accepted += place < len(path)
        self.path = self._path(ahead[1:])

    @property
    def _room(self) -> int:
        """Tokens that may still follow the path."""
        return self.limit - len(self.tokens) - len(self.path)

    @property
    def _ends(self) -> bool:
        """Whether nothing follows the path."""
        return bool(self.path) and (not self._room or self.path[-1].token in self.pair.stop_ids)

    async def _draft(self, role: str, width: int) -> list[DraftedToken]:
        """What the drafter finds likeliest after the path, with its lists; at least one token."""
        model = self.pair.models[role]
        prefix = [*self._text(role), *(each.token for each in self.path)]
        count = min(width, self._room)
        top_k = self.pair.list_length(role)
        started = time.perf_counter()
        if count == 1:
            choices = await _of(role, model.next_tokens(prefix, top_k))
            drafted = [DraftedToken(_likeliest(choices), choices)]
        else:
            request = model.draft(prefix, count, top_k, temperature=0.0, seed=0)
            drafted = await _of(role, request)
        self.pair.width.observe_drafting(len(drafted), time.perf_counter() - started)
        return drafted

    async def _score(self, role: str) -> list[TokenList]:
        """The lists of every token of the path, and of the one after it where there is one."""
        model, tokens = self.pair.models[role], [each.token for each in self.path]
        tokens = tokens[:-1] if self._ends else tokens
        top_k = self.pair.list_length(role)
        started = time.perf_counter()
        if tokens:
            lists = await _of(role, model.score(self._text(role), tokens, top_k))
        else:
            lists = [await _of(role, model.next_tokens(self._text(role), top_k))]
        self.pair.width.observe_scoring(len(lists), time.perf_counter() - started)
        return lists

    async def _drawn(
        self, lists: Sequence[Sequence[TokenList]], expected: Sequence[int]
    ) -> list[DrawnToken]:
        """A token for every place as far as they are the expected ones, and the first that is not.

        From longer lists where the bound is above the tolerance: all places are asked for at once.
        """
        places = [self._place(each, before) for before, each in enumerate(lists)]
        drawn = await self.pair.draws.draw(places)
        wanted: dict[int, Mapping[str, _Wanted]] = {}
        while True:
            count = _agreed(drawn, expected) + 1
            wide = [place for place, token in enumerate(drawn[:count]) if self._is_wide(token)]
            for place in wide:
                lengths = {role: self.pair.list_length(role) for role in self.pair.models}
                wanted.setdefault(place, {role: _Wanted(each) for role, each in lengths.items()})
            asked = [
                place
                for place in wide
                if _grow(self.pair.models, wanted[place], drawn[place].missing)
            ]
            if not asked:
                self.pair.counts.asked_again += sum(place < count for place in wanted)
                return drawn[:count]
            again = [self._redrawn(expected[:place], wanted[place]) for place in asked]
            for place, token in zip(asked, await _together(*again), strict=True):
                drawn[place] = token

    def _is_wide(self, drawn: DrawnToken) -> bool:
        tolerance = self.pair.tolerance
        return tolerance is not None and drawn.bound > tolerance

    async def _redrawn(self, before: Sequence[int], wanted: Mapping[str, _Wanted]) -> DrawnToken:
        """A token from longer lists, after tokens that are not part of the text yet."""
        models = self.pair.models
        asked = [self._longer(role, before, wanted[role]) for role in models]
        place = self._place(await _together(*asked), len(before))
        [drawn] = await self.pair.draws.draw([place])
        return drawn

    def _place(self, lists: Sequence[TokenList], before: int) -> Place:
        """The place after some tokens that are not part of the text yet."""
        return Place(lists, self.request.noise_key, len(self.tokens) + before)

    async def _longer(self, role: str, before: Sequence[int], wanted: _Wanted) -> TokenList:
        model, text = self.pair.models[role], [*self._text(role), *before]
        return await _of(role, model.next_tokens(text, wanted.top_k, sorted(wanted.extra)))

    def _text(self, role: str) -> list[int]:
        return [*self.request.prompt_ids(role), *self.tokens]

    async def _append(self, drawn: DrawnToken, drafter: TokenList) -> None:
        self.tokens.append(drawn.token)
        self.trace.append(drawn.trace)
        self.pair.count(drawn)
        self.pair.width.observe_token(drawn.token == _likeliest(drafter))
        asked_to_end = self.on_token is not None and await self.on_token(drawn)
        if drawn.token in self.pair.stop_ids or asked_to_end:
            self.reason = "stop"
        elif len(self.tokens) == self.limit:
            self.reason = "length"

    def _path(self, drafted: Sequence[DraftedToken]) -> list[DraftedToken]:
        """What the drafter alone would draw, as far as it drafted that."""
        listed = enumerate(drafted[: self.limit - len(self.tokens)])
        places = [self._place([each.choices], before) for before, each in listed]
        tokens = self.pair.mixer.draft(places)
        path: list[DraftedToken] = []
        for token, each in zip(tokens, drafted, strict=False):
            path.append(DraftedToken(token, each.choices))
            if token != each.token or token in self.pair.stop_ids:
                break
        self.pair.counts.drafted += len(path)
        return path


def _agreed(drawn: Sequence[DrawnToken], expected: Sequence[int]) -> int:
    """Number of first tokens that are the expected ones."""
    for place, (each, token) in enumerate(zip(drawn, expected, strict=True)):
        if each.token != token:
            return place
    return len(drawn)


@dataclass(slots=True)
class _Wanted:
    """What a list has to hold."""

    top_k: int
    extra: set[int] = field(default_factory=set)


def _grow(
    models: Mapping[str, ServedModel],
    wanted: Mapping[str, _Wanted],
    missing: Sequence[Sequence[int]],
) -> bool:
    """Want more of the models; False where they have no more.

    First the ids that stand in the other list alone: a few numbers, which say more than the many
    that a longer list adds.
    """
    has_grown = False
    for (role, model), ids in zip(models.items(), missing, strict=True):
        new = {*ids} - wanted[role].extra
        if model.facts.can_choose_ids and new:
            wanted[role].extra |= new
            has_grown = True
    if has_grown:
        return True
    for role, model in models.items():
        top_k = min(_WIDENED * wanted[role].top_k, model.facts.max_top_k)
        has_grown = has_grown or top_k > wanted[role].top_k
        wanted[role].top_k = top_k
    return has_grown


def _likeliest(tokens: TokenList) -> int:
    return int(tokens.ids[tokens.log_p.argmax()])


async def _of(role: str, request: Awaitable[T]) -> T:
    """The answer to a request. Raises ServerError or EngineError that says whose server failed."""
    try:
        return await request
    except ServerError as failure:
        raise ServerError(f"the {role}'s {failure}", failure.kind) from failure
    except EngineError as failure:
        raise type(failure)(f"the {role}'s {failure}") from failure


async def _together(*requests: Awaitable[Any]) -> list[Any]:
    """The answers of requests in flight at once; where one fails, the others are given up."""
    tasks = [asyncio.ensure_future(request) for request in requests]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
