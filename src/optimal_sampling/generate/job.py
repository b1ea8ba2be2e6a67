"""The job: a dataset's rows become prompts, and what is owed of them becomes records of q*.

Knows the order of things, and nothing of how a row is rendered, a token drawn or a line written.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import chain, islice
from typing import Any

from optimal_sampling.config import GenerateConfig
from optimal_sampling.errors import EngineError, OptimalSamplingError
from optimal_sampling.generate.dataset import Rows, open_rows
from optimal_sampling.generate.fingerprint import model_facts
from optimal_sampling.generate.progress import Progress
from optimal_sampling.generate.summary import Summary, Tally
from optimal_sampling.records.run_folder import RunFolder
from optimal_sampling.records.schema import (
    Key,
    Prompt,
    Record,
    completion_record,
    failure_record,
    row_id,
)
from optimal_sampling.types import Completion, Request, prompt_id
from optimal_sampling.vocabulary import PromptError, PromptRenderer, RenderedPrompt, Vocabulary

__all__ = ["Interrupted", "generate", "preview"]


class Interrupted(KeyboardInterrupt):
    """The run was interrupted. What was finished is on the disk; `summary` counts it."""

    def __init__(self, summary: Summary) -> None:
        super().__init__(summary)
        self.summary = summary


def generate(config: GenerateConfig, progress: Progress | None = None) -> Summary:
    """Make every sample that the run folder still owes, and say how it went.

    Rows that cannot be rendered and requests that fail become error records; a later call tries them again.
    Raises Interrupted for Ctrl-C, and an OptimalSamplingError where the run as a whole cannot go on; in both cases
    every finished record is on the disk.
    """
    progress = progress or Progress()
    rows, vocabulary, renderer = _open(config)
    facts = model_facts(config.models) if config.engine.loads_models else {}
    with RunFolder(config, facts) as folder:
        job = _Job(config, rows, renderer, vocabulary, folder, progress)
        try:
            with progress:
                notes = job.run()
            folder.close()
        except KeyboardInterrupt:
            folder.close()
            summary = Summary.of(job.tally, folder, {}, interrupted=True)
            summary.save(config.worker)
            raise Interrupted(summary) from None
        summary = Summary.of(job.tally, folder, notes, interrupted=False)
        summary.save(config.worker)
        return summary


def preview(config: GenerateConfig, count: int = 3) -> Iterator[tuple[int, RenderedPrompt | str]]:
    """The first rows as both models would see them, or why they would not. Needs no weights, writes nothing."""
    rows, _, renderer = _open(config)
    for row_index, row in islice(rows, count):
        yield row_index, _render(renderer, row)


def _open(config: GenerateConfig) -> tuple[Rows, Vocabulary, PromptRenderer]:
    rows = open_rows(config.data, config.run.seed)
    models = config.models
    vocabulary = Vocabulary.load(models.student, models.teacher, models.trust_remote_code)
    renderer = PromptRenderer(
        config.prompt,
        vocabulary,
        prompt_column=rows.prompt_column,
        answer_column=rows.answer_column,
        columns=rows.columns,
    )
    return rows, vocabulary, renderer


class _Job:
    """One call. The engine pulls requests as it has room, so only prompts in flight are held."""

    def __init__(
        self,
        config: GenerateConfig,
        rows: Rows,
        renderer: PromptRenderer,
        vocabulary: Vocabulary,
        folder: RunFolder,
        progress: Progress,
    ) -> None:
        self.config = config
        self.rows = rows
        self.renderer = renderer
        self.vocabulary = vocabulary
        self.folder = folder
        self.progress = progress
        self.tally = Tally(len(rows), config.data.samples_per_prompt)
        self._in_flight: dict[Key, Prompt] = {}

    def run(self) -> dict[str, str]:
        """Serve what is owed; the notes of everyone involved. Models are loaded only if something is owed."""
        notes = {
            f"note {n}": text
            for n, text in enumerate((*self.vocabulary.notes, *self.renderer.notes), start=1)
        }
        requests = self._owed_requests()
        first = next(requests, None)
        self.progress.update(self.tally)
        if first is None:
            return notes
        from optimal_sampling.engines import open_engine  # torch is loaded here

        config = self.config
        with open_engine(config.engine, config.models, config.mixture, self.vocabulary) as engine:
            self.tally.restart_clock()
            for completion in engine.generate(chain([first], requests)):
                self._finish(completion)
            if self._in_flight:
                raise EngineError(
                    f"the engine {config.engine.name} ended without {len(self._in_flight)} of its requests"
                )
            return notes | engine.notes()

    def _owed_requests(self) -> Iterator[Request]:
        seen: set[str] = set()
        for row_index, row in self.rows:
            rendered = _render(self.renderer, row)
            prompt = _prompt(row_index, row, rendered)
            if prompt.id in seen:
                self.tally.duplicates += 1
                continue
            seen.add(prompt.id)
            for sample_index in self._owed_samples(prompt.id):
                if isinstance(rendered, str):
                    self._fail(prompt, sample_index, rendered)
                else:
                    yield self._request(prompt, sample_index, rendered)

    def _owed_samples(self, prompt: str) -> Iterator[int]:
        ledger = self.folder.ledger
        for sample_index in range(self.config.data.samples_per_prompt):
            if ledger.owes((prompt, sample_index), self.config.run.max_attempts):
                yield sample_index
            elif (prompt, sample_index) in ledger.good:
                self.tally.already_good += 1
            else:
                self.tally.given_up += 1

    def _request(self, prompt: Prompt, sample_index: int, rendered: RenderedPrompt) -> Request:
        self._in_flight[prompt.id, sample_index] = prompt
        return Request(
            id=prompt.id,
            sample_index=sample_index,
            seed=self.config.run.seed,
            student_prompt_ids=rendered.student_ids,
            teacher_prompt_ids=rendered.teacher_ids,
            max_new_tokens=self.config.run.max_new_tokens,
        )

    def _finish(self, completion: Completion) -> None:
        key = completion.request.id, completion.request.sample_index
        record = completion_record(
            self._in_flight.pop(key),
            completion,
            self.vocabulary.decode(completion.token_ids),
            attempts=self.folder.ledger.attempts(key) + 1,
            token_lists=self.config.run.token_lists,
        )
        self._add(record)

    def _fail(self, prompt: Prompt, sample_index: int, error: str) -> None:
        record = failure_record(
            prompt,
            sample_index,
            self.config.run.seed,
            error,
            attempts=self.folder.ledger.attempts((prompt.id, sample_index)) + 1,
            token_lists=self.config.run.token_lists,
        )
        self._add(record)

    def _add(self, record: Record) -> None:
        self.folder.add(record)
        self.tally.add(record)
        self.progress.update(self.tally)


def _render(renderer: PromptRenderer, row: Mapping[str, Any]) -> RenderedPrompt | str:
    """The row's prompts, or why it has none."""
    try:
        return renderer.render(row)
    except PromptError as error:
        return str(error)
    except OptimalSamplingError:
        raise
    except Exception as error:  # a tokenizer may raise anything on one odd row; the others go on
        return f"the row could not be rendered: {type(error).__name__}: {error}"


def _prompt(row_index: int, row: Mapping[str, Any], rendered: RenderedPrompt | str) -> Prompt:
    if isinstance(rendered, str):
        return Prompt(row_id(row), row_index, row)
    return Prompt(
        id=prompt_id(rendered.student_text, rendered.teacher_text),
        row_index=row_index,
        row=row,
        student_text=rendered.student_text,
        teacher_text=rendered.teacher_text,
        n_student_tokens=len(rendered.student_ids),
        n_teacher_tokens=len(rendered.teacher_ids),
    )
