"""Two servers asked per token and in rounds, beside vLLM's server of q* and the teacher alone."""

from __future__ import annotations

import asyncio
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from optimal_sampling.bench.harness import Report, Timings, interleave, make_table, per_second
from optimal_sampling.bench.subcommands import ServersBenchOptions
from optimal_sampling.bench.workload import ModelPair
from optimal_sampling.config import MixtureConfig, ServersOptions
from optimal_sampling.engines.servers.access import Access
from optimal_sampling.engines.servers.connection import Connection
from optimal_sampling.engines.servers.dialect import Call
from optimal_sampling.engines.servers.engine import ServersEngine
from optimal_sampling.engines.servers.launch import ServersCommand, server_processes, started
from optimal_sampling.engines.servers.pool import ClientPool
from optimal_sampling.engines.servers.replicas import ReplicatedModel
from optimal_sampling.engines.servers.replies import field
from optimal_sampling.engines.servers.server_process import ServerProcess, free_port
from optimal_sampling.engines.servers.statistics import ServerStatistics
from optimal_sampling.errors import EngineError
from optimal_sampling.types import Request

__all__ = ["run"]

NAIVE = "two requests per token"
ROUNDS = "speculative rounds"
MIXTURE = "vLLM's server of q*"
TEACHER = "the teacher alone"
_PATIENCE = 600.0
_LONGEST_REQUEST = 600.0
_FEWEST_PROMPTS = 8
_MOST_PROMPTS = 64
"""More where so many texts are drawn at once; otherwise two for each of them."""


@dataclass(frozen=True)
class Urls:
    """Addresses of the servers."""

    student: str
    teacher: str
    mixture: str | None = None
    """None: not measured."""


@dataclass
class Rounds:
    """What the latest run in rounds took, for its bound."""

    tokens_per_round: float = 0.0
    seconds: float = 0.0
    """Of a round: what the slower server's replies take, on average."""


def run(options: ServersBenchOptions, report: Report) -> None:
    """The subcommand `servers`."""
    pair = ModelPair(options.models)
    report.models = pair.names
    with _servers(options, report) as urls:
        served = ServersOptions(
            student_url=(urls.student,),
            teacher_url=(urls.teacher,),
            server_top_k=options.server_top_k,
        )
        engine = ServersEngine.load(options.models, MixtureConfig(), served, pair.vocabulary)
        with engine:
            for count in options.sequences:
                prompts = max(_FEWEST_PROMPTS, count, min(2 * count, _MOST_PROMPTS))
                requests = pair.workload(prompts).requests
                _measure(options, report, engine, urls, (count, requests))
                report.save()


@contextmanager
def _servers(options: ServersBenchOptions, report: Report) -> Iterator[Urls]:
    """The servers that were named, and those that have to be started."""
    if options.student_url and options.teacher_url:
        yield Urls(options.student_url, options.teacher_url, options.mixture_url)
        return
    with tempfile.TemporaryDirectory() as folder:
        processes = _processes(options, folder)
        with started(processes, _PATIENCE, report.status):
            yield Urls(**{process.name: process.url for process in processes})


def _processes(options: ServersBenchOptions, folder: str) -> list[ServerProcess]:
    command = ServersCommand(
        student=options.models.student,
        teacher=options.models.teacher,
        student_port=free_port(),
        teacher_port=free_port(),
        max_logprobs=options.server_top_k,
        log_dir=folder,
    )
    port = str(free_port())
    words = [sys.executable, "-m", "optimal_sampling", "serve", "--port", port]
    words += ["--student", options.models.student, "--teacher", options.models.teacher]
    log = Path(folder) / "mixture.log"
    mixture = ServerProcess("mixture", words, f"http://127.0.0.1:{port}", log)
    return [*server_processes(command), mixture]


def _measure(
    options: ServersBenchOptions,
    report: Report,
    engine: ServersEngine,
    urls: Urls,
    work: tuple[int, Sequence[Request]],
) -> None:
    """One table: so many texts at once."""
    count, requests = work
    rounds = Rounds()
    naive, drafting = (
        engine.view(options=replace(engine.options, draft_tokens=drafts, batch_size=count))
        for drafts in (0, "auto")
    )
    systems: dict[str, Callable[[], int]] = {
        NAIVE: partial(_drawn, naive, requests),
        ROUNDS: partial(_drawn_in_rounds, drafting, requests, rounds),
        TEACHER: partial(_completed, urls.teacher, options.models.teacher, requests, count),
    }
    if urls.mixture:
        model = options.models.teacher
        systems[MIXTURE] = partial(_completed, urls.mixture, model, requests, count)
    timings = interleave(systems, options.repeats, lambda text: report.status(f"{count}: {text}"))
    _show(report, count, timings, rounds)


def _drawn(engine: ServersEngine, requests: Sequence[Request]) -> int:
    """Tokens of all completions."""
    done = list(engine.generate(requests))
    failed = [each.error for each in done if each.error]
    if failed or len(done) < len(requests):
        raise EngineError(f"{len(done)} of {len(requests)} completions; errors: {failed[:3]}")
    return sum(len(each.token_ids) for each in done)


def _drawn_in_rounds(engine: ServersEngine, requests: Sequence[Request], rounds: Rounds) -> int:
    models = [model for model in engine.models.values() if isinstance(model, ReplicatedModel)]
    for model in models:
        model.statistics.clear()
    tokens = _drawn(engine, requests)
    rounds.tokens_per_round = tokens / engine.counts.rounds
    slower = max(model.statistics.latencies.total for model in models)
    rounds.seconds = slower / engine.counts.rounds
    return tokens


def _completed(url: str, model: str, requests: Sequence[Request], count: int) -> int:
    """Tokens of texts that a server draws, a request each, `count` at once."""
    return asyncio.run(_completions(url, model, requests, count))


async def _completions(url: str, model: str, requests: Sequence[Request], count: int) -> int:
    access = Access((url,), deadline=_LONGEST_REQUEST, most_in_flight=count)
    pool = ClientPool()
    connection = Connection(url, pool, access, ServerStatistics())
    room = asyncio.Semaphore(count)

    async def ask(request: Request) -> int:
        body = {
            "model": model,
            "prompt": list(request.teacher_prompt_ids),
            "max_tokens": request.max_new_tokens,
            "temperature": 1.0,
        }
        async with room:
            return await connection.attempt(Call("/v1/completions", _tokens, body))

    try:
        return sum(await asyncio.gather(*map(ask, requests)))
    finally:
        await pool.aclose()


def _tokens(reply: Any) -> int:
    return field(field(reply, "usage", dict), "completion_tokens", int)


def _show(report: Report, count: int, timings: Timings, rounds: Rounds) -> None:
    rates = per_second(timings, "wall")
    naive = count / rates[NAIVE]
    bound = rounds.tokens_per_round * naive / rounds.seconds
    rows = []
    for name, rate in rates.items():
        is_rounds = name == ROUNDS
        row: Mapping[str, Any] = {
            "sequences": count,
            "system": name,
            "tokens_per_second": rate,
            "ms_per_token": 1e3 * count / rate,
            "of_naive": rate / rates[NAIVE],
            "tokens_per_round": rounds.tokens_per_round if is_rounds else None,
            "bound": bound if is_rounds else None,
            "repeats": [repeat.rate() for repeat in timings[name]],
        }
        report.results.append(dict(row))
        rows.append([name, *[row[column] for column in list(row)[2:-1]]])
    repeats = [[spent.rate() for spent in each] for each in timings.values()]
    spread = max(max(each) / min(each) for each in repeats)
    columns = (
        f"{count} at once",
        "tokens/s",
        "ms per token of a text",
        f"/ {NAIVE}",
        "tokens per round",
        "bound",
    )
    report.show(make_table(f"repeats differ by up to a factor of {spread:.2f}", columns, rows))
