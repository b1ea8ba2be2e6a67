"""An engine that needs no tables and no time, and jobs to run on it."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

import optimal_sampling.engines
from optimal_sampling.config import DataConfig, GenerateConfig, RunConfig
from optimal_sampling.engines.base import Engine
from optimal_sampling.types import TRACE_FIELDS, Completion, Request, TokenTrace


class FakeEngine(Engine):
    """Tokens are a function of the request's noise key; finishes `window` requests at a time,
    backwards.
    """

    def __init__(
        self, window: int = 4, fails: Callable[[Request], str] = lambda request: ""
    ) -> None:
        self.window = window
        self.fails = fails
        self.served: list[Request] = []
        self.closed = False

    def generate(self, requests: Iterable[Request]) -> Iterator[Completion]:
        waiting: list[Request] = []
        for request in requests:
            waiting.append(request)
            if len(waiting) == self.window:
                yield from self._serve(waiting)
        yield from self._serve(waiting)

    def _serve(self, waiting: list[Request]) -> Iterator[Completion]:
        while waiting:
            request = waiting.pop()
            self.served.append(request)
            rng = random.Random(request.noise_key)
            ids = tuple(
                rng.randrange(32, 127) for _ in range(rng.randrange(1, request.max_new_tokens + 1))
            )
            rows = [tuple(rng.random() for _ in TRACE_FIELDS) for _ in ids]
            error = self.fails(request)
            yield Completion(
                request,
                ids,
                "error" if error else "stop",
                TokenTrace.from_rows(rows),
                error,
                rng.random(),
            )

    def notes(self) -> dict[str, str]:
        return {"device": "none"}

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def fake_engine(monkeypatch: pytest.MonkeyPatch) -> FakeEngine:
    engine = FakeEngine()
    monkeypatch.setattr(optimal_sampling.engines, "open_engine", lambda *_: engine)
    return engine


@pytest.fixture
def job(tmp_path: Path) -> Callable[..., GenerateConfig]:
    """A config for rows given as a list (written as JSONL) or a dataset's name."""

    def build(
        rows: object = "synthetic", name: str = "run", max_attempts: int = 3, **data: object
    ) -> GenerateConfig:
        if not isinstance(rows, str):
            path = tmp_path / "rows.jsonl"
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
            rows = str(path)
        run = RunConfig(
            output_dir=str(tmp_path / name), max_new_tokens=8, max_attempts=max_attempts
        )
        return replace(GenerateConfig(run=run), data=DataConfig(dataset=rows, **data))

    return build
