"""Tokens of all texts that wait for a draw at the same moment, drawn in one call."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

from optimal_sampling.engines.servers.mixing import DrawnToken, ListMixer, Place

__all__ = ["DrawQueue"]


@dataclass(frozen=True, slots=True)
class _Waiting:
    places: Sequence[Place]
    drawn: asyncio.Future[list[DrawnToken]]


class DrawQueue:
    """Draws of the tasks of one event loop.

    The busier the client is, the more of them come together, and the less each takes.
    """

    def __init__(self, mixer: ListMixer) -> None:
        self.mixer = mixer
        self._waiting: list[_Waiting] = []

    async def draw(self, places: Sequence[Place]) -> list[DrawnToken]:
        """A token for every place, as of `ListMixer.draw`."""
        loop = asyncio.get_running_loop()
        waiting = _Waiting(places, loop.create_future())
        if not self._waiting:
            loop.call_soon(self._draw_all)
        self._waiting.append(waiting)
        return await waiting.drawn

    def _draw_all(self) -> None:
        waiting, self._waiting = self._waiting, []
        wanted = [each for each in waiting if not each.drawn.done()]  # the others are given up
        try:
            drawn = iter(self.mixer.draw([place for each in wanted for place in each.places]))
        except Exception as error:
            for each in wanted:
                each.drawn.set_exception(error)
            return
        for each in wanted:
            each.drawn.set_result([next(drawn) for _ in each.places])
