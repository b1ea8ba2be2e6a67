"""Which request ends its worker: found by running suspects apart from all others.

The requests that were running when a worker died are a group of suspects. It runs apart: in a
worker that has nothing else. A group that ends that worker too is halved, until a request is alone.
A request is to blame once it has ended a worker twice while it was alone, so that chance, such as
a killed process, blames nobody.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Sequence

from optimal_sampling.records.schema import Key
from optimal_sampling.types import Request

__all__ = ["Suspects"]

LONE_DEATHS = 2
"""Workers that a request has to end, alone in each, to be blamed."""


class Suspects:
    """Groups of requests that have to run apart."""

    def __init__(self) -> None:
        self._groups: deque[list[Request]] = deque()
        self._lone_deaths: Counter[Key] = Counter()

    def __len__(self) -> int:
        return sum(map(len, self._groups))

    def next_group(self) -> list[Request]:
        """A group to run apart; empty where there is none."""
        return self._groups.popleft() if self._groups else []

    def hand_back(self, group: Sequence[Request]) -> None:
        """Suspects that a worker never took; they are no nearer to being cleared."""
        if group:
            self._groups.append(list(group))

    def after_death(self, running: Sequence[Request], *, apart: bool) -> Request | None:
        """Requests that were running in a worker that died; the one that is to blame."""
        if apart and len(running) == 1:
            return self._after_lone_death(running[0])
        half = len(running) // 2 if apart else 0
        self.hand_back(running[:half])
        self.hand_back(running[half:])
        return None

    def _after_lone_death(self, request: Request) -> Request | None:
        self._lone_deaths[request.key] += 1
        if self._lone_deaths[request.key] >= LONE_DEATHS:
            del self._lone_deaths[request.key]
            return request
        self.hand_back([request])
        return None

    def clear(self, request: Request) -> None:
        """The request was completed."""
        self._lone_deaths.pop(request.key, None)

    def drop(self) -> None:
        """Forget all groups."""
        self._groups.clear()
        self._lone_deaths.clear()
