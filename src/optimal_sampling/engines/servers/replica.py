"""One server of a model: attempts at it, and whether it still is what it was at the start."""

from __future__ import annotations

import asyncio
import time
from typing import TypeVar

from optimal_sampling.engines.servers.access import Access
from optimal_sampling.engines.servers.connection import AttemptFailed, Connection
from optimal_sampling.engines.servers.dialect import Call
from optimal_sampling.engines.servers.probe import Probed, change_since
from optimal_sampling.engines.servers.statistics import ServerStatistics

__all__ = ["Replica"]

T = TypeVar("T")

_REST = 1.0
"""Seconds in which a server that did not answer is left alone, where there are others."""
_LONG_REST = 30.0
"""Likewise one that refuses all requests, or has another model."""
_SAME_ANSWER = 0.5
"""Seconds in which a comparison that failed is not made again."""
_MOST_BAD_REPLIES = 2
"""To a request of a comparison, before it has failed."""
_RECENT_SECONDS, _RECENT_REPLIES = 10.0, 20
"""After a comparison, in which a timeout, a new connection, or (no more than so many replies) an
idle one that the server has closed, is no reason for another one."""


class Replica:
    """A server, which is compared with what it was at the start after each time that it was lost
    sight of: a new process may have other weights under the same name.

    Requests wait for the comparison, one is made for all, and no reply is used before it.
    """

    def __init__(
        self, connection: Connection, access: Access, statistics: ServerStatistics
    ) -> None:
        self.connection = connection
        connection.on_open = self._opened
        self.url = connection.url
        self.rests_until = 0.0
        """By `time.monotonic()`; until then others are asked, where there are any."""
        self.left_out: AttemptFailed | None = None
        """Why none of its replies can be used, for all requests alike; None: they can."""
        self._access = access
        self._statistics = statistics
        self._found: Probed | None = None
        self._turn = asyncio.Lock()
        self._doubts = self._settled = 0
        self._compared_at = self._failed_at = 0.0
        self._replies = 0
        """Answered before the last comparison."""
        self._failure: AttemptFailed | None = None

    def watch(self, found: Probed) -> None:
        """Compare with this from now on, and at once where it was lost sight of meanwhile."""
        self._found = found
        self._compared_at = time.monotonic()

    async def attempt(self, call: Call[T]) -> T:
        """The reply to one request, in one attempt. Raises AttemptFailed, `of_server` where the
        server answers no request, or is another one than at the start."""
        await self._settle()
        try:
            answer = await self.connection.attempt(call)
        except AttemptFailed as failure:
            self._note(failure)
            if failure.is_final or failure.may_be_of_server:
                await self._settle()  # raises where it fails all requests
            raise
        await self._settle()  # it may have been started again since the request was sent
        return answer

    async def answers(self, kind: str) -> bool:
        """Whether it answers anything; after `rate_limited`, a request such as those of a run."""
        is_model_asked = kind == "rate_limited" and self._found is not None
        try:
            if is_model_asked:
                await self._compare()
            else:
                await self.connection.attempt(Call("/v1/models", lambda reply: reply))
        except AttemptFailed:
            return False
        return True

    def _opened(self, was_closed: bool) -> None:
        self._doubt_unless_recent(_RECENT_REPLIES if was_closed else None)

    def _note(self, failure: AttemptFailed) -> None:
        if failure.is_down:
            self.rests_until = time.monotonic() + _REST
        is_watched = self._found is not None
        if failure.is_lost_sight or (is_watched and failure.may_be_of_server):
            self._doubts += 1
        elif failure.kind == "timeout":
            self._doubt_unless_recent()

    def _doubt_unless_recent(self, most_replies: int | None = None) -> None:
        """What a restart may show itself by, and often is none: not soon after a comparison, nor
        within so many replies."""
        if self._found is None:
            return
        replies = self.connection.answered - self._replies
        is_old = time.monotonic() - self._compared_at > _RECENT_SECONDS
        self._doubts += is_old or (most_replies is not None and replies > most_replies)

    async def _settle(self) -> None:
        """Compare, where there is a doubt. Raises AttemptFailed."""
        if self._found is None:
            return
        while self._settled < self._doubts:
            async with self._turn:
                if self._settled < self._doubts:
                    await self._compared_once()

    async def _compared_once(self) -> None:
        """The turn of one request; those that waited for it share what it found."""
        if self._failure and time.monotonic() - self._failed_at < _SAME_ANSWER:
            raise self._failure.with_traceback(None)
        doubts = self._doubts  # those that come while it is compared are not settled by it
        try:
            await self._compare()
        except AttemptFailed as failure:
            self._failure, self._failed_at = failure, time.monotonic()
            self._leave_out(failure)
            raise
        self._settled = doubts
        self._failure = self.left_out = None
        self._compared_at, self._replies = time.monotonic(), self.connection.answered

    async def _compare(self) -> None:
        """Raises AttemptFailed where it refuses what it answered at the start, or differs."""
        assert self._found is not None
        try:
            change = await change_since(self._found, self._asked, self._access)
        except AttemptFailed as failure:
            if failure.kind != "rejected":
                raise
            change = failure.reason
        self._statistics.comparisons += 1
        if change:
            reason = f"it is not what it was when the run began: {change}"
            raise AttemptFailed(self.url, "wrong_model", reason)

    async def _asked(self, call: Call[T]) -> T:
        """The reply to a request of a comparison. A bad one says little, and is asked for again."""
        for _ in range(_MOST_BAD_REPLIES):
            try:
                return await self.connection.attempt(call, is_counted=False)
            except AttemptFailed as failure:
                if not failure.is_bad_reply:
                    raise
        return await self.connection.attempt(call, is_counted=False)

    def _leave_out(self, failure: AttemptFailed) -> None:
        self._note(failure)
        failure.of_server = failure.may_be_of_server
        if failure.of_server:
            self._statistics.left_out += self.left_out is None
            self.left_out = failure
            self.rests_until = time.monotonic() + _LONG_REST
        elif failure.is_down:
            self.left_out = None
