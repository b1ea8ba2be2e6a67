"""Requests in flight -> records on the disk, which are counted, shown and graded."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, TypeAlias

from optimal_sampling.config import GenerateConfig
from optimal_sampling.errors import EngineError
from optimal_sampling.generate.dataset import Dataset
from optimal_sampling.generate.progress import Progress, Tally
from optimal_sampling.generate.workers import NO_WORKERS, WorkersFile
from optimal_sampling.prompts import PromptRenderer, RenderedPrompt
from optimal_sampling.records.run_folder import RunFolder
from optimal_sampling.records.schema import Key, Prompt, Sample, record_of
from optimal_sampling.types import Completion, Mode, Request
from optimal_sampling.verify.job import Grading
from optimal_sampling.vocabulary import Vocabulary

if TYPE_CHECKING:
    from optimal_sampling.engines import Engine

__all__ = ["OpenEngine", "Origin", "Recorder", "Work"]

OpenEngine: TypeAlias = Callable[..., "AbstractContextManager[Engine]"]
"""A function with the arguments of `engines.open_engine`."""


@dataclass
class Work:
    """What a call works with."""

    config: GenerateConfig
    dataset: Dataset
    renderer: PromptRenderer
    vocabulary: Vocabulary
    folder: RunFolder
    progress: Progress
    grading: Grading | None
    """None where completions are not graded."""
    open_with: OpenEngine | None
    """In place of `engines.open_engine`."""

    @contextmanager
    def engine(self, config: GenerateConfig) -> Iterator[Engine]:
        """An engine for a config, its models loaded; says so, and shows its notes."""
        self.progress.start_loading(config)
        arguments = config.engine, config.models, config.mixture, self.vocabulary, config.run.mode
        with (self.open_with or self._opener())(*arguments) as engine:
            self.progress.show_notes(engine.notes())
            self.progress.workers = engine.workers
            try:
                yield engine
            finally:
                self.progress.workers = NO_WORKERS

    def _opener(self) -> OpenEngine:
        """What opens the engine, or the fleet of engines."""
        from optimal_sampling import engines  # torch is loaded here

        if not self.config.fleet.is_used:
            return engines.open_engine
        from optimal_sampling.engines.fleet import open_fleet

        return partial(
            open_fleet,
            fleet=self.config.fleet,
            logs=self.folder.path / "logs",
            report=self.progress.show,
        )


@dataclass(frozen=True)
class Origin:
    """What records say about where their completions come from."""

    mode: Mode
    stage: str = ""
    tries: int = 0


class Recorder:
    """Writes a record for every completion. Only prompts in flight are in memory."""

    def __init__(self, work: Work, *tallies: Tally) -> None:
        """`tallies` count every record; the first of them is shown."""
        self.work = work
        self.tallies = tallies
        self.origin = Origin(work.config.run.mode)
        self._in_flight: dict[Key, Prompt] = {}

    def request(
        self, prompt: Prompt, sample_index: int, rendered: RenderedPrompt | str
    ) -> Request | None:
        """The request for a sample. None for a row without prompts, whose record says why."""
        student_ids = () if isinstance(rendered, str) else rendered.student_ids
        teacher_ids = () if isinstance(rendered, str) else rendered.teacher_ids
        request = Request(
            id=prompt.id,
            sample_index=sample_index,
            seed=self.work.config.run.seed,
            student_prompt_ids=student_ids,
            teacher_prompt_ids=teacher_ids,
            max_new_tokens=self.work.config.run.max_new_tokens,
        )
        self._in_flight[request.key] = prompt
        if isinstance(rendered, str):
            self._finish(Completion.failed(request, rendered))
            return None
        return request

    def serve(self, engine: Engine, requests: Iterable[Request]) -> None:
        """Have requests completed. Raises EngineError where some are not."""
        self.show()
        with WorkersFile(self.work.folder.path, self.work.config.shard) as file:

            def tick() -> None:
                self.show()
                file.update(engine.workers())

            engine.watch(tick)
            for completion in engine.generate(requests):
                self._finish(completion)
        if self._in_flight:
            lost, name = len(self._in_flight), self.work.config.engine.name
            raise EngineError(f"the engine {name} ended without {lost} of its requests")

    def _finish(self, completion: Completion) -> None:
        """Write the record of a completion and count it."""
        work, key = self.work, completion.request.key
        text, raw_text = self._texts(completion)
        sample = Sample(
            prompt=self._in_flight.pop(key),
            completion=completion,
            text=text,
            raw_text=raw_text,
            attempts=work.folder.ledger.attempts(key) + 1,
            mode=self.origin.mode,
            granularity=work.vocabulary.granularity_of(self.origin.mode),
            stage=self.origin.stage,
            tries=self.origin.tries,
        )
        options = work.config.run
        record = record_of(sample, token_lists=options.token_lists, byte_lists=options.byte_lists)
        checksum = work.folder.add(record)
        for tally in self.tallies:
            tally.add(record)
        if work.grading is not None:
            work.grading.add(record, checksum)
        self.show()

    def _texts(self, completion: Completion) -> tuple[str, str]:
        """Text of a completion, without its special tokens and with them."""
        if completion.byte_level is not None:
            return completion.byte_level.text, completion.byte_level.text
        vocabulary, ids = self.work.vocabulary, completion.token_ids
        return vocabulary.decode(ids), vocabulary.decode_raw(ids)

    def show(self) -> None:
        """Show the counts."""
        self.work.progress.update(self.tallies[0])
