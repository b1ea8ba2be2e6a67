"""`ServersEngine`: completions from two models behind servers."""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import Coroutine, Iterable, Iterator, Mapping
from concurrent.futures import Future
from typing import Any, TypeVar

from optimal_sampling.config import EngineOptions, MixtureConfig, ModelConfig, ServersOptions
from optimal_sampling.engines.base import Engine
from optimal_sampling.engines.servers.access import Access, ApiKey
from optimal_sampling.engines.servers.drafting import DraftWidth
from optimal_sampling.engines.servers.mixing import ListMixer, check_mixture
from optimal_sampling.engines.servers.model import ServedModel
from optimal_sampling.engines.servers.probe import PROBE_TEXTS
from optimal_sampling.engines.servers.replicas import ReplicatedModel
from optimal_sampling.engines.servers.row import PairCounts, ServedPair
from optimal_sampling.engines.servers.statistics import figures_text
from optimal_sampling.errors import ConfigError, EngineError, ServerError, TokenizerMismatchError
from optimal_sampling.types import Completion, Mode, Request
from optimal_sampling.vocabulary import Vocabulary

__all__ = [
    "LoopThread",
    "ServersEngine",
    "check_text",
    "check_whole",
    "close_models",
    "served_facts",
    "served_models",
    "start_models",
]

T = TypeVar("T")

_ASK_AGAIN = 0.05  # seconds until the requests are asked for another one


class LoopThread:
    """An event loop that runs in a thread of its own."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self._thread.start()

    def submit(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        """Start work in the loop."""
        return asyncio.run_coroutine_threadsafe(work, self.loop)

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """The result of work in the loop, which is given up where waiting for it is."""
        future = self.submit(work)
        try:
            return future.result()
        finally:
            future.cancel()

    def close(self) -> None:
        """End the loop. Closing twice is safe."""
        if self.loop.is_closed():
            return
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join()
        self.loop.close()


def served_models(
    options: ServersOptions, mode: Mode, vocab_size: int | None = None
) -> dict[str, ServedModel]:
    """The models that take part, by role, not started. Raises ConfigError."""
    roles = ("student", "teacher") if mode == "mixture" else (mode,)
    models: dict[str, ServedModel] = {}
    for role in roles:
        if not options.urls(role):
            raise ConfigError(
                f"the engine servers needs the address of the {role}'s server: --{role}-url "
                "http://HOST:PORT; `optimal-sampling servers` prints commands that start both"
            )
        access = Access(
            urls=tuple(options.urls(role)),
            model=getattr(options, f"{role}_model"),
            key=_key(options, role),
            vocab_size=vocab_size,
            deadline=options.server_timeout,
            retry_seconds=options.server_retry_seconds,
        )
        models[role] = ReplicatedModel(access)
    return models


def _key(options: ServersOptions, role: str) -> ApiKey | None:
    variable = getattr(options, f"{role}_api_key_env")
    file = getattr(options, f"{role}_api_key_file")
    if file is not None:
        return ApiKey.from_file(file)
    return None if variable is None else ApiKey.from_environment(variable)


async def start_models(models: Mapping[str, ServedModel]) -> None:
    """Start all. Raises EngineError where a server does not answer, ConfigError."""
    tasks = {role: asyncio.ensure_future(model.start()) for role, model in models.items()}
    await asyncio.gather(*tasks.values(), return_exceptions=True)
    for role, task in tasks.items():
        error = task.exception()
        if isinstance(error, ServerError | EngineError):
            raise EngineError(f"the {role}'s {error}") from error
        if isinstance(error, ConfigError):
            raise ConfigError(f"the {role}'s server: {error}") from error
        if error is not None:
            raise error


async def check_text(models: Mapping[str, ServedModel], vocabulary: Vocabulary) -> list[str]:
    """Compare the servers' ids of a few texts with those of the tokenizers of the run.

    Roles whose server makes no ids of texts. Raises TokenizerMismatchError.
    """
    unchecked = []
    for role, model in models.items():
        tokenizer = getattr(vocabulary, f"{role}_tokenizer")
        for text in PROBE_TEXTS:
            try:
                served = await model.tokenize(text)
            except ServerError:
                unchecked.append(role)
                break
            ours = list(tokenizer(text, add_special_tokens=False)["input_ids"])
            if served != ours:
                raise TokenizerMismatchError(
                    f"the {role}'s server makes other token ids of {text!r} than the tokenizer "
                    f"given with --{role}: {served[:8]}... and {ours[:8]}...; give --{role} the "
                    "folder or hub id of the model that the server has"
                )
    return unchecked


def served_facts(options: ServersOptions, mode: Mode) -> dict[str, str]:
    """What the servers say of their models, by name: a run goes on with the same ones only.

    Raises ConfigError, EngineError.
    """
    models = served_models(options, mode)
    thread = LoopThread()
    try:
        thread.run(start_models(models))
        return {
            f"{role}_served": fact_text(model) + _shorter(model, options.server_top_k)
            for role, model in models.items()
        }
    finally:
        thread.run(close_models(models))
        thread.close()


def fact_text(model: ServedModel) -> str:
    """Name and context of a served model."""
    context = model.facts.context_length
    return model.facts.name + (f", context {context}" if context is not None else "")


def check_whole(models: Mapping[str, ServedModel], vocab_size: int) -> None:
    """Raises ConfigError where a server does not give lists of all tokens."""
    for role, model in models.items():
        most = model.facts.max_top_k
        if most < min(vocab_size, model.facts.vocab_size or vocab_size):
            raise ConfigError(
                f"lists of all tokens are asked for (top-k -1), and the {role}'s server gives at "
                f"most {most} of them; start vLLM's with --max-logprobs -1"
            )


def _shorter(model: ServedModel, asked: int) -> str:
    """Length of the lists where it is the server's, and not what is asked for."""
    most = model.facts.max_top_k
    return f", lists of {most}" if most < asked else ""


async def close_models(models: Mapping[str, ServedModel]) -> None:
    """Close connections."""
    for model in models.values():
        await model.aclose()


class ServersEngine(Engine):
    """Rows of requests as tasks of an event loop, which runs in a thread of its own.

    `models`: by role, started in `thread`.
    """

    options: ServersOptions

    def __init__(
        self,
        models: Mapping[str, ServedModel],
        mixture: MixtureConfig,
        options: ServersOptions,
        thread: LoopThread,
        vocab_size: int,
        stop_ids: frozenset[int] = frozenset(),
        vocabulary: Vocabulary | None = None,
    ) -> None:
        self.models = models
        self.mixture = mixture
        self.options = options
        self.thread = thread
        self.vocab_size = vocab_size
        self.stop_ids = stop_ids
        self.vocabulary = vocabulary
        self.mode: Mode = "mixture"
        self.start_notes: dict[str, str] = {}
        self.counts = PairCounts()
        self._closed = threading.Event()
        self._width: DraftWidth | None = None

    @classmethod
    def load(
        cls,
        models: ModelConfig,
        mixture: MixtureConfig,
        options: ServersOptions,
        vocabulary: Vocabulary,
        mode: Mode = "mixture",
    ) -> ServersEngine:
        """Connect to the servers; the two models give their tokenizers only.

        Raises ConfigError, EngineError, TokenizerMismatchError.
        """
        served = served_models(options, mode, vocabulary.size)
        thread = LoopThread()
        try:
            thread.run(start_models(served))
            unchecked = thread.run(check_text(served, vocabulary))
            engine = cls(
                served, mixture, options, thread, vocabulary.size, vocabulary.stop_ids, vocabulary
            )
            for role in unchecked:
                engine.start_notes[f"{role}_tokenizer"] = (
                    "not compared: the server makes no token ids of a text"
                )
            return engine.view(mode=mode)
        except BaseException:
            thread.run(close_models(served))
            thread.close()
            raise

    def _check_settings(self, loaded: EngineOptions) -> None:
        """As in `Engine`. Raises ConfigError too for what lists do not give."""
        super()._check_settings(loaded)
        missing = [role for role in self.roles if role not in self.models]
        if missing:
            raise ConfigError(f"no {missing[0]} was connected; open another engine")
        self._width = None
        if self.mode == "mixture" and not self._is_exact:
            check_mixture(self.mixture)
        if self.options.server_top_k == -1:
            check_whole({role: self.models[role] for role in self.roles}, self.vocab_size)

    @property
    def _is_exact(self) -> bool:
        """Whether the lists are the whole vocabulary."""
        asked = self.options.server_top_k
        least = min(self.models[role].facts.max_top_k for role in self.roles)
        return self.vocab_size <= (least if asked == -1 else min(asked, least))

    def pair(self) -> ServedPair:
        """The served models of this mode, with new counts."""
        models = {role: self.models[role] for role in self.roles}
        drafter, *others = models.values()
        can_draft = drafter.facts.can_draft and all(each.facts.scoring for each in others)
        if self._width is None:
            self._width = DraftWidth(self.options.draft_tokens, can_draft)
        self.counts = PairCounts()
        return ServedPair(
            models=models,
            mixer=ListMixer(
                self.mixture,
                self.mode,
                self.vocab_size,
                {role: self._rows(role) for role in models},
            ),
            top_k=self.options.server_top_k,
            tolerance=self.options.tv_tolerance,
            stop_ids=self.stop_ids,
            contexts={role: self._context(role) for role in models},
            rows={role: self._rows(role) or self.vocab_size for role in models},
            width=self._width,
            counts=self.counts,
        )

    def _context(self, role: str) -> int | None:
        """Most tokens of a text by the server's and the model's own account."""
        own = getattr(self.vocabulary, f"{role}_context", None)
        known = [each for each in (self.models[role].facts.context_length, own) if each is not None]
        return min(known, default=None)

    def _rows(self, role: str) -> int | None:
        """Number of ids of a model, padding included; None: unknown."""
        own: int | None = getattr(self.vocabulary, f"{role}_rows", None)
        return own or self.models[role].facts.vocab_size

    def generate(self, requests: Iterable[Request | None]) -> Iterator[Completion]:
        """As in `Engine`."""
        if self._closed.is_set():
            raise EngineError("this engine was closed; open another one")
        pair = self.pair()
        done: queue.SimpleQueue[Future[Completion]] = queue.SimpleQueue()
        in_flight: set[Future[Completion]] = set()
        source = iter(requests)
        try:
            while True:
                is_waiting = self._admit(source, pair, in_flight, done)
                if not in_flight:
                    return
                try:
                    future = done.get(timeout=_ASK_AGAIN if is_waiting else None)
                except queue.Empty:
                    continue
                in_flight.remove(future)
                yield future.result()
        finally:
            self._give_up(in_flight)

    def _admit(
        self,
        source: Iterator[Request | None],
        pair: ServedPair,
        in_flight: set[Future[Completion]],
        done: queue.SimpleQueue[Future[Completion]],
    ) -> bool:
        """Start requests while there is room; whether room is left, and no request."""
        while len(in_flight) < self.options.batch_size:
            request = next(source, None)
            if request is None:
                return True
            future = self.thread.submit(pair.complete(request))
            in_flight.add(future)
            future.add_done_callback(done.put)
        return False

    def _give_up(self, in_flight: set[Future[Completion]]) -> None:
        """Cancel rows, and wait until their requests are given up."""
        if not in_flight:
            return
        for future in in_flight:
            future.cancel()
        self.thread.run(asyncio.sleep(0))

    @property
    def rounds(self) -> int:
        """As in `Engine`."""
        return self.counts.rounds

    def notes(self) -> dict[str, str]:
        """As in `Engine`: the served models, and what the latest run asked of them."""
        notes = dict(self.start_notes)
        for role in self.roles:
            model = self.models[role]
            notes[f"{role}_server"] = f"{fact_text(model)} ({model.facts.kind})"
            most = model.facts.max_top_k
            if most < min(self.options.server_top_k, self.vocab_size):
                notes[f"{role}_lists"] = f"of {most} tokens, the most that the server gives"
            if self.counts.rounds:
                notes[f"{role}_requests"] = figures_text(model.figures())
            if left_out := model.left_out():
                notes[f"{role}_left_out"] = f"not used any more: {'; '.join(left_out)}"
        return notes | self._count_notes()

    def _count_notes(self) -> dict[str, str]:
        counts = self.counts
        if not counts.tokens:
            return {}
        notes = {
            "rounds": f"{counts.rounds}, {counts.tokens / counts.rounds:.2f} tokens each",
            "tv_bound": f"mean {counts.mean_bound:.3g}, largest {counts.largest_bound:.3g}",
        }
        if counts.drafted:
            notes["drafts"] = f"{counts.accepted} of {counts.drafted} drafted tokens accepted"
        if counts.asked_again:
            notes["longer lists"] = (
                f"asked for at {counts.asked_again} tokens; {counts.above} stayed above the "
                "tolerance"
            )
        return notes

    def close(self) -> None:
        """As in `Engine`."""
        if self._closed.is_set():
            return
        self._closed.set()
        self.thread.run(close_models(self.models))
        self.thread.close()
