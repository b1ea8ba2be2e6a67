"""A model behind one or several servers: retries, load balancing, fail-over."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Coroutine, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from optimal_sampling.engines.servers.access import Access
from optimal_sampling.engines.servers.connection import AttemptFailed, Connection
from optimal_sampling.engines.servers.dialect import AFFINITY, Call, Dialect
from optimal_sampling.engines.servers.model import (
    DraftedToken,
    Scoring,
    ServedFacts,
    ServedModel,
    TokenList,
)
from optimal_sampling.engines.servers.pool import ClientPool
from optimal_sampling.engines.servers.probe import Probed, probe
from optimal_sampling.engines.servers.replica import Replica
from optimal_sampling.engines.servers.replies import with_chosen
from optimal_sampling.engines.servers.statistics import ServerStatistics
from optimal_sampling.engines.servers.vllm_api import MOST_CHOSEN_IDS
from optimal_sampling.errors import ConfigError, EngineError, ServedModelError, ServerError

if TYPE_CHECKING:
    from tenacity import RetryCallState

__all__ = ["AFFINITY", "ReplicatedModel"]

T = TypeVar("T")

_MOST_ATTEMPTS = 8
"""Of a request that is answered, but never well. One that is not answered is tried for as long as
`Access.retry_seconds` says: a server that is started again takes minutes."""
_FEWEST_ATTEMPTS = 4
"""However long they take: where a server is slow, requests wait for a place in flight."""
_SHORTEST_WAIT = 0.1
_LONGEST_WAIT = 10.0
_WAIT_FOR_BETTER = 1.0
"""Longest, after a reply that was bad."""
_ON_THEIR_WAY = 1.0
"""Seconds after the first failure of a request in which replies to others may have been sent before
it."""
_MORE_LOAD = 0.5
"""How much more load a text's own server may have than the one with the least."""

_ADVICE = {
    "refused": "is the server running, and is the address right?",
    "tls": "the server's certificate is not accepted; is https right, and its name?",
    "reset": "does the server crash (its log says why), or does it want https?",
    "timeout": "the server is too slow or hangs; give it longer (--server-timeout)",
    "rate_limited": "the server wants fewer requests; lower --batch-size",
    "unavailable": "the server says that it cannot serve at the moment; see its log",
    "server_error": "the server has an error of its own; see its log",
    "truncated": "the server or a proxy breaks off its replies; see its log",
    "malformed": "is it the server's own address, and no other service?",
    "invalid": "is it one of the servers that docs/servers.md names?",
    "wrong_model": "another model, or one with other limits, is served at this address; start the "
    "right one",
    "not_found": "the server does not know this path or model; see /v1/models",
    "redirected": "is it the server's own address?",
    "unauthorized": "give its API key, one that it accepts, by environment variable or file "
    "(--student-api-key-env, --teacher-api-key-file ...)",
    "rejected": "the server does not take this request",
}


_GO_ON = "What is finished is safe, and the same call then goes on with the rest"


class ReplicatedModel(ServedModel):
    """The model at the servers of an `Access`. See `ServedModel`.

    A request fails with EngineError where no server has answered any request for as long as the
    request was tried, or all refuse every request: no other could go on.
    """

    def __init__(self, access: Access) -> None:
        self.access = access
        self.statistics = ServerStatistics()
        self.replicas: list[Replica] = []
        self.answered_at = 0.0
        """When a server has answered last, by `time.monotonic()`."""
        self._dialect: Dialect | None = None

    async def start(self) -> None:
        """As in `ServedModel`. All servers have to answer, and to serve the same model."""
        self._pool = ClientPool()
        self.replicas = [self._replica(url) for url in self.access.urls]
        found = [await self._probed(replica) for replica in self.replicas]
        for other in found[1:]:
            _check_same(found[0], other)
        self.facts: ServedFacts = found[0].facts
        self._dialect = found[0].dialect
        self._times = found[0].times
        for replica, each in zip(self.replicas, found, strict=True):
            replica.watch(each)
        self.statistics.clear()  # what the start has tried is none of the run

    def _replica(self, url: str) -> Replica:
        connection = Connection(url, self._pool, self.access, self.statistics)
        return Replica(connection, self.access, self.statistics)

    async def _probed(self, replica: Replica) -> Probed:
        """What one server offers. Raises ServerError, ConfigError."""
        seconds = min(self.access.start_seconds, self.access.retry_seconds)
        ask = partial(self._retried, among=[replica], seconds=seconds)
        return await probe(ask, self.access, replica.url)

    async def next_tokens(
        self, prefix: Sequence[int], top_k: int, extra_ids: Sequence[int] = ()
    ) -> TokenList:
        """As in `ServedModel`. The extra ids are asked for at the same time, by other requests, or
        afterwards, where their log-probabilities are relative."""
        likeliest = self.dialect.next_tokens(prefix, top_k)
        if not (extra_ids and self.facts.can_choose_ids):
            return await self._retried(likeliest)
        if self.dialect.chosen_are_relative:
            [listed] = await self.score(prefix, (), top_k)  # where the text is kept
            return await self._with_relative(listed, prefix, extra_ids)
        wanted = sorted({*extra_ids})
        parts = [
            wanted[start : start + MOST_CHOSEN_IDS]
            for start in range(0, len(wanted), MOST_CHOSEN_IDS)
        ]
        chosen = [self._retried(self.dialect.chosen(prefix, part)) for part in parts]
        listing = asyncio.create_task(self._retried(likeliest))
        try:
            values = await _all(chosen)
            listed = await listing
        finally:
            listing.cancel()
        return with_chosen(listed, {token: each for part in values for token, each in part.items()})

    async def _with_relative(
        self, listed: TokenList, prefix: Sequence[int], extra_ids: Sequence[int]
    ) -> TokenList:
        """A list and extra ids, by their log-probabilities relative to the likeliest one's."""
        known, likeliest = {*listed.ids.tolist()}, int(listed.ids[0])
        wanted = [token for token in sorted({*extra_ids}) if token not in known]
        values: dict[int, float] = {}
        for start in range(0, len(wanted), MOST_CHOSEN_IDS):
            part = [likeliest, *wanted[start : start + MOST_CHOSEN_IDS]]
            found = await self._retried(self.dialect.chosen(prefix, part))
            if likeliest in found:
                shift = float(listed.log_p[0]) - found[likeliest]
                values |= {token: min(0.0, value + shift) for token, value in found.items()}
        return with_chosen(listed, values)

    async def draft(
        self, prefix: Sequence[int], count: int, top_k: int, temperature: float, seed: int
    ) -> list[DraftedToken]:
        """As in `ServedModel`. The likeliest token, where the server gives no list of its own."""
        call = self.dialect.draft(prefix, count, top_k, temperature, seed)
        if drafted := await self._retried(call):
            return drafted
        choices = await self.next_tokens(prefix, top_k)
        return [DraftedToken(int(choices.ids[0]), choices)]

    async def score(
        self,
        prefix: Sequence[int],
        continuation: Sequence[int],
        top_k: int,
        way: Scoring | None = None,
    ) -> list[TokenList]:
        """As in `ServedModel`, in the given way or the fastest."""
        lists = len(continuation) + 1
        way = way or self._times.best(len(prefix) + len(continuation), lists, top_k)
        assert way is not None
        return await self._retried(self.dialect.score(prefix, continuation, top_k, way))

    async def tokenize(self, text: str) -> list[int]:
        """As in `ServedModel`."""
        return await self._retried(self.dialect.tokenize(text))

    async def detokenize(self, ids: Sequence[int]) -> str:
        """As in `ServedModel`."""
        return await self._retried(self.dialect.detokenize(ids))

    def figures(self) -> dict[str, float]:
        """As in `ServedModel`."""
        return self.statistics.figures()

    def left_out(self) -> list[str]:
        """As in `ServedModel`."""
        return [str(each.left_out) for each in self.replicas if each.left_out]

    async def aclose(self) -> None:
        """As in `ServedModel`."""
        if self.replicas:
            await self._pool.aclose()

    @property
    def dialect(self) -> Dialect:
        """How the servers are asked. After `start`."""
        assert self._dialect is not None, "start() has not been called"
        return self._dialect

    async def _retried(
        self, call: Call[T], among: Sequence[Replica] = (), seconds: float | None = None
    ) -> T:
        """The reply to a request, at whichever server gives it. Raises ServerError.

        `seconds`: how long to try where none answers; None: `Access.retry_seconds`.
        """
        longest = self.access.retry_seconds if seconds is None else seconds
        return await _Retries(self, call, among or self.replicas, longest).run()

    def next_replica(self, among: Sequence[Replica], tried: Sequence[Replica]) -> Replica:
        """The server for the next attempt: one that was not tried, that answers, with room."""
        now = time.monotonic()
        rest = [each for each in among if each not in tried] or [*among]
        well = [each for each in rest if each.rests_until <= now] or rest
        idlest = min(well, key=lambda each: each.connection.limit.load)
        number = AFFINITY.get()
        if number < 0:
            return idlest
        own = among[number % len(among)]
        has_room = own.connection.limit.load <= idlest.connection.limit.load + _MORE_LOAD
        return own if own in well and has_room else idlest


class _Retries(Generic[T]):
    """The attempts of one request."""

    def __init__(
        self, model: ReplicatedModel, call: Call[T], among: Sequence[Replica], seconds: float
    ) -> None:
        self.model = model
        self.call = call
        self.among = among
        self.seconds = seconds
        self.tried: list[Replica] = []
        self.started = time.monotonic()
        self.failed_at = 0.0
        """When the first attempt failed."""
        self.failures: dict[str, AttemptFailed] = {}
        """The latest of each server."""

    async def run(self) -> T:
        """The reply. Raises ServerError, and EngineError where no other request could go on."""
        import tenacity

        self.backoff = tenacity.wait_random_exponential(_SHORTEST_WAIT, _LONGEST_WAIT)
        retrying = tenacity.AsyncRetrying(
            retry=tenacity.retry_if_exception(
                lambda error: isinstance(error, AttemptFailed) and not error.is_final
            ),
            wait=self._wait,
            stop=self._is_last,
            before_sleep=self._count,
            reraise=True,
        )
        try:
            return await retrying(self._attempt)
        except AttemptFailed as failure:
            self.model.statistics.failed += 1
            raise await self._error(failure) from failure

    async def _attempt(self) -> T:
        replica = self.model.next_replica(self.among, self.tried)
        try:
            answer = await replica.attempt(self.call)
        except AttemptFailed as failure:
            self.failed_at = self.failed_at or time.monotonic()
            self.failures[replica.url] = failure
            self.tried.append(replica)
            raise
        self.model.answered_at = time.monotonic()
        return answer

    async def _error(self, failure: AttemptFailed) -> ServerError | EngineError:
        """The error after the last attempt."""
        advice = _ADVICE[failure.kind]
        texts = "; ".join(map(_text, self.failures.values()))
        if self._are_left_out:
            text = f"{texts}. No server of this model can be used; {advice}. {_GO_ON}"
            return ServedModelError(text)
        if self._may_take_long(failure) and await self._is_lost(failure.kind):
            return EngineError(f"{texts}. No server of this model answers; {advice}")
        return ServerError(f"{_text(failure)}; {advice}", failure.kind)

    @property
    def _are_left_out(self) -> bool:
        """Whether every server refuses all requests, or has another model."""
        return all(each.left_out for each in self.among)

    async def _is_lost(self, kind: str) -> bool:
        """Whether no server has answered anything since this request failed, nor does now."""
        if self.model.answered_at > self.failed_at + _ON_THEIR_WAY:
            return False
        for replica in self.among:
            if replica.left_out is None and await replica.answers(kind):
                return False
        return True

    def _wait(self, state: RetryCallState) -> float:
        """Seconds until the next attempt: none, where another server was not tried yet."""
        if len({*self.tried}) < len(self.among):
            return 0.0
        self.tried.clear()
        failure = _failure(state)
        longest = min(_LONGEST_WAIT, self.seconds / _MOST_ATTEMPTS)
        if not self._may_take_long(failure):
            longest = min(longest, _WAIT_FOR_BETTER)
        return (failure.retry_after or 0.0) + min(longest, float(self.backoff(state)))

    def _is_last(self, state: RetryCallState) -> bool:
        failure = _failure(state)
        if (failure.retry_after or 0.0) > self.seconds:
            return not self.tried  # else there is a server that was not asked
        if self._may_take_long(failure):
            seconds = time.monotonic() - self.started + state.upcoming_sleep
            has_waited = seconds >= self.seconds
            return has_waited and state.attempt_number >= _FEWEST_ATTEMPTS
        return state.attempt_number >= _MOST_ATTEMPTS

    def _may_take_long(self, failure: AttemptFailed) -> bool:
        """Whether to wait as for a server that is started again."""
        return failure.may_take_long or (failure.of_server and not self._are_left_out)

    def _count(self, state: RetryCallState) -> None:
        self.model.statistics.retries += 1


async def _all(calls: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
    """The results of requests that are in flight at once. Where one fails, none stays."""
    tasks = [asyncio.create_task(call) for call in calls]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()


def _failure(state: RetryCallState) -> AttemptFailed:
    assert state.outcome is not None
    failure = state.outcome.exception()
    assert isinstance(failure, AttemptFailed)
    return failure


def _text(failure: AttemptFailed) -> str:
    asked = f" (wait {failure.retry_after:.0f} s)" if failure.retry_after else ""
    return f"server {failure.url}: {failure.kind}: {failure.reason}{asked}"


def _check_same(first: Probed, other: Probed) -> None:
    """Raises ConfigError where two servers do not serve the same model."""
    for name in ("kind", "name", "context_length", "max_top_k", "vocab_size"):
        one, two = getattr(first.facts, name), getattr(other.facts, name)
        if one != two:
            raise ConfigError(
                f"servers of one model differ: {name} is {one} at {first.url} "
                f"and {two} at {other.url}"
            )
    if difference := first.difference(other.first):
        raise ConfigError(
            f"servers of one model differ: {difference} at {first.url} and {other.url}; "
            "do they have the same weights?"
        )
