"""How many requests may be in flight at one server. No HTTP."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from typing import Self

__all__ = ["AdaptiveLimit"]


class AdaptiveLimit:
    """A number of places that follows what a server can take (additive increase, multiplicative
    decrease). `async with` waits for a place, first come, first served.

    It doubles with every round of answers until the server says for the first time that it has
    too much to do, and from then on grows by one per round. Each such word halves it.
    """

    def __init__(self, start: int = 32, most: int = 256) -> None:
        self.value = float(min(start, most))
        self.most = most
        self.in_flight = 0
        self._has_been_cut = False
        self._cut_at = -1.0
        self._waiting: deque[asyncio.Future[None]] = deque()

    @property
    def load(self) -> float:
        """Requests in flight or waiting, per place."""
        return (self.in_flight + len(self._waiting)) / self.value

    async def __aenter__(self) -> Self:
        if self.in_flight < int(self.value) and not self._waiting:
            self.in_flight += 1
            return self
        place = asyncio.get_running_loop().create_future()
        self._waiting.append(place)
        try:
            await place
        except asyncio.CancelledError:
            if place.done() and not place.cancelled():  # given a place and cancelled at once
                self._release()
            raise
        return self

    async def __aexit__(self, *exception: object) -> None:
        self._release()

    def answered(self) -> None:
        """A request was answered: room for more, where the places are used."""
        if 2 * self.in_flight >= self.value:
            step = 1 / self.value if self._has_been_cut else 1.0
            self.value = min(self.most, self.value + step)
            self._wake()

    def overloaded(self, started: float) -> None:
        """A request that was sent at `started` (`time.monotonic()`) was too much.

        Requests that were sent before the last cut say nothing new.
        """
        if started > self._cut_at:
            self.value = max(1.0, self.value / 2)
            self._has_been_cut = True
            self._cut_at = time.monotonic()

    def _release(self) -> None:
        self.in_flight -= 1
        self._wake()

    def _wake(self) -> None:
        while self._waiting and self.in_flight < int(self.value):
            place = self._waiting.popleft()
            if not place.done():
                self.in_flight += 1
                place.set_result(None)
