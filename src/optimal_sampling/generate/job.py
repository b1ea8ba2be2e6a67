"""The `generate` job: rows of a dataset -> requests for the samples that are owed -> records."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING, Any, TypeAlias

from optimal_sampling.config import GenerateConfig, MixtureConfig
from optimal_sampling.errors import ConfigError, EngineError, OptimalSamplingError, PromptError
from optimal_sampling.generate.dataset import Dataset, open_dataset
from optimal_sampling.generate.fingerprint import check_rows, model_facts
from optimal_sampling.generate.progress import Progress, Summary, Tally
from optimal_sampling.prompts import PromptRenderer, RenderedPrompt
from optimal_sampling.records.run_folder import TEMPLATE_DATE, RunFolder, template_date
from optimal_sampling.records.schema import Key, Prompt, Sample, record_of, row_id
from optimal_sampling.types import Completion, Request, prompt_id
from optimal_sampling.verify import resolve_grader
from optimal_sampling.verify.job import Grading, Source, check_columns
from optimal_sampling.vocabulary import Vocabulary

if TYPE_CHECKING:
    from optimal_sampling.engines import Engine

__all__ = ["Interrupted", "generate", "input_notes", "open_inputs", "prompt_of", "render_rows"]


OpenEngine: TypeAlias = Callable[..., "AbstractContextManager[Engine]"]
"""A function with the arguments of `engines.open_engine`."""

_METHOD_OF = {
    "fixed_alpha": "fixed",
    "trust_region": "trust_region",
    "schedule_start": "schedule",
    "schedule_end": "schedule",
    "schedule_tokens": "schedule",
}
"""The alpha method that reads each of these options of MixtureConfig."""


class Interrupted(KeyboardInterrupt):
    """The run was interrupted by Ctrl-C. Finished records are on the disk; see `summary`."""

    def __init__(self, summary: Summary) -> None:
        super().__init__(summary)
        self.summary = summary


def generate(
    config: GenerateConfig,
    progress: Progress | None = None,
    open_with: OpenEngine | None = None,
) -> Summary:
    """Generate every sample that the run folder still owes.

    `open_with` is called in place of `engines.open_engine`, for runs that share an engine.

    Rows that cannot be rendered and requests that fail become records with an error, which later
    calls try again. Raises Interrupted for Ctrl-C, and an OptimalSamplingError where the run as a
    whole cannot go on; in both cases every finished record is on the disk.
    """
    if not isinstance(config, GenerateConfig):
        raise ConfigError(
            f"config must be a GenerateConfig, such as GenerateConfig(run=RunConfig("
            f"output_dir='outputs/run')), got {config!r}"
        )
    progress = progress or Progress()
    dataset, vocabulary, renderer = open_inputs(config)
    facts = model_facts(config.models) if config.engine.loads_models else {}
    if renderer.prints_date:
        facts[TEMPLATE_DATE] = renderer.day.isoformat()
    source = _grading_source(config, dataset, vocabulary)
    with RunFolder(config, facts) as folder, _grading(config, source) as grading:
        check_rows(dataset, folder)
        job = _Job(config, dataset, renderer, vocabulary, folder, progress)
        job.grading = grading
        try:
            with progress:
                notes = job.run(open_with)
                folder.close()
                summary = Summary.of(
                    job.tally, folder, notes, mode=config.run.mode, interrupted=False
                )
                summary = replace(summary, verdicts=job.finish_grading())
                if job.grading is not None:
                    summary = replace(summary, not_graded=job.grading.failed)
        except KeyboardInterrupt:
            folder.close()
            folder.recount()
            summary = Summary.of(job.tally, folder, {}, mode=config.run.mode, interrupted=True)
            summary.save(config.shard)
            raise Interrupted(summary) from None
        summary.save(config.shard)
        return summary


def _grading_source(
    config: GenerateConfig, dataset: Dataset, vocabulary: Vocabulary
) -> Source | None:
    """How completions are graded; None where they are not. Raises ConfigError."""
    if config.verify.verify is None:
        return None
    column = config.verify.reference or dataset.answer_column
    grader = resolve_grader(config.verify.verify)
    if grader.path is None or column is not None:
        check_columns(dataset.columns, column)
    return Source(grader, column, lambda: vocabulary.thinking_blocks)


def _grading(
    config: GenerateConfig, source: Source | None
) -> AbstractContextManager[Grading | None]:
    if source is None:
        return nullcontext()
    return Grading(config.run.output_dir, config.shard, source, config.verify)


def open_inputs(config: GenerateConfig) -> tuple[Dataset, Vocabulary, PromptRenderer]:
    """What rows are read from and rendered with."""
    dataset = open_dataset(config.data, config.run.seed)
    models = config.models
    vocabulary = Vocabulary.load(
        models.student, models.teacher, models.trust_remote_code, revisions=models.revisions
    )
    renderer = PromptRenderer(
        config.prompt,
        vocabulary,
        prompt_column=dataset.prompt_column,
        answer_column=dataset.answer_column,
        columns=dataset.columns,
        day=template_date(config.run.output_dir),
    )
    return dataset, vocabulary, renderer


class _Job:
    """One call. The engine pulls requests as it has room; only prompts in flight are in memory."""

    def __init__(
        self,
        config: GenerateConfig,
        dataset: Dataset,
        renderer: PromptRenderer,
        vocabulary: Vocabulary,
        folder: RunFolder,
        progress: Progress,
    ) -> None:
        self.config = config
        self.dataset = dataset
        self.renderer = renderer
        self.vocabulary = vocabulary
        self.folder = folder
        self.progress = progress
        self.grading: Grading | None = None
        self.tally = Tally(len(dataset), config.data.samples_per_prompt)
        self.tally.already_good = self._recorded()
        self._in_flight: dict[Key, Prompt] = {}

    def _recorded(self) -> int:
        """Good samples of the selected rows by the ledger, before any row is rendered."""
        samples, rows = self.config.data.samples_per_prompt, self.dataset.selection
        good = self.folder.ledger.good.items()
        return sum(sample < samples and row in rows for (_, sample), row in good)

    def run(self, open_with: OpenEngine | None = None) -> dict[str, str]:
        """Generate the owed samples; notes of the vocabulary, the renderer and the engine, by name.

        Models are loaded only if a sample is owed.
        """
        on_rows = self.renderer.row_notes(row for _, row in self.dataset)
        notes = input_notes(self.config, self.vocabulary, self.renderer, on_rows)
        self.progress.show_notes(notes)
        requests = self._owed_requests()
        first = next(requests, None)
        if first is None:
            self.progress.update(self.tally)
            return notes
        if self.grading is not None:
            self.grading.check()
        self.progress.start_loading(self.config)
        config = self.config
        with (open_with or self._opener())(
            config.engine, config.models, config.mixture, self.vocabulary, config.run.mode
        ) as engine:
            self.progress.show_notes(engine.notes())
            self.tally.restart_clock()
            self.progress.update(self.tally)
            for completion in engine.generate(chain([first], requests)):
                self._finish(completion)
            if self._in_flight:
                lost = len(self._in_flight)
                raise EngineError(
                    f"the engine {config.engine.name} ended without {lost} of its requests"
                )
            return notes | engine.notes()

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

    def _owed_requests(self) -> Iterator[Request]:
        """Requests for the owed samples; those of rows without prompts fail at once."""
        seen: set[str] = set()
        good = 0
        for row_index, row, rendered in render_rows(self.renderer, self.dataset):
            prompt = prompt_of(row_index, row, rendered)
            if prompt.id in seen:
                self.tally.duplicates += 1
                continue
            seen.add(prompt.id)
            missing = self._missing_samples(prompt.id)
            good += self.config.data.samples_per_prompt - len(missing)
            # a row of another data slice may have made this prompt's samples
            self.tally.already_good = max(self.tally.already_good, good)
            for sample_index in self._owed_samples(prompt.id, missing):
                request = self._request(prompt.id, sample_index, rendered)
                self._in_flight[prompt.id, sample_index] = prompt
                if isinstance(rendered, str):
                    self._finish(Completion.failed(request, rendered))
                else:
                    yield request
        self.tally.already_good = good

    def _missing_samples(self, prompt: str) -> list[int]:
        """Indices of a prompt's samples that are not good."""
        good = self.folder.ledger.good
        samples = range(self.config.data.samples_per_prompt)
        return [sample for sample in samples if (prompt, sample) not in good]

    def _owed_samples(self, prompt: str, missing: list[int]) -> Iterator[int]:
        """Those of a prompt's missing samples to try again. Counts the others."""
        for sample in missing:
            if self.folder.ledger.owes((prompt, sample), self.config.run.max_attempts):
                yield sample
            else:
                self.tally.given_up += 1

    def _request(self, prompt: str, sample_index: int, rendered: RenderedPrompt | str) -> Request:
        """The request for a sample; without prompt ids where the row could not be rendered."""
        student_ids = () if isinstance(rendered, str) else rendered.student_ids
        teacher_ids = () if isinstance(rendered, str) else rendered.teacher_ids
        return Request(
            id=prompt,
            sample_index=sample_index,
            seed=self.config.run.seed,
            student_prompt_ids=student_ids,
            teacher_prompt_ids=teacher_ids,
            max_new_tokens=self.config.run.max_new_tokens,
        )

    def _finish(self, completion: Completion) -> None:
        """Write the record of a completion and count it."""
        key = completion.request.key
        sample = Sample(
            prompt=self._in_flight.pop(key),
            completion=completion,
            text=self.vocabulary.decode(completion.token_ids),
            raw_text=self.vocabulary.decode_raw(completion.token_ids),
            attempts=self.folder.ledger.attempts(key) + 1,
            mode=self.config.run.mode,
        )
        record = record_of(sample, token_lists=self.config.run.token_lists)
        checksum = self.folder.add(record)
        self.tally.add(record)
        if self.grading is not None:
            self.grading.add(record, checksum)
        self.progress.update(self.tally)

    def finish_grading(self) -> Mapping[str, int]:
        """Grade what is on the disk without a verdict; how many completions have each verdict."""
        if self.grading is None:
            return {}
        self.progress.show("grading the completions that have no verdict yet")
        return self.grading.finish()


def input_notes(
    config: GenerateConfig,
    vocabulary: Vocabulary,
    renderer: PromptRenderer,
    row_notes: Iterable[str] = (),
) -> dict[str, str]:
    """What is not as the options say, or easily overlooked, by name. Known without any weights."""
    texts = [*vocabulary.notes, *renderer.notes, *row_notes]
    hint, shown_to = config.prompt.hint, config.prompt.hint_to
    if hint != "none" and config.run.mode not in ("mixture", shown_to):
        texts.insert(0, f"hint {hint} does nothing: it is shown to the {shown_to} alone")
    if config.run.mode != "mixture":
        texts.insert(0, f"drawn from the {config.run.mode} alone; the options of alpha do nothing")
    else:
        texts = [*_idle_options(config.mixture), *texts]
    return {f"note {number}": text for number, text in enumerate(texts, start=1)}


def _idle_options(mixture: MixtureConfig) -> Iterator[str]:
    """Notes on options of alpha that were given and belong to another method."""
    default = MixtureConfig()
    for name, method in _METHOD_OF.items():
        value = getattr(mixture, name)
        if value != getattr(default, name) and mixture.alpha_method != method:
            yield (
                f"{name} ({value}) does nothing with alpha_method {mixture.alpha_method}; "
                f"it belongs to alpha_method {method}"
            )


def render_rows(
    renderer: PromptRenderer, dataset: Dataset
) -> Iterator[tuple[int, Mapping[str, Any], RenderedPrompt | str]]:
    """Each row with its index, and its prompts or the reason why it has none."""
    if renderer.needs_following:
        for index, row, following in dataset.with_following():
            yield index, row, _render_row(renderer, row, following)
    else:
        for index, row in dataset:
            yield index, row, _render_row(renderer, row, None)


def _render_row(
    renderer: PromptRenderer, row: Mapping[str, Any], following: Mapping[str, Any] | None
) -> RenderedPrompt | str:
    """The row's prompts, or the reason why it has none."""
    try:
        return renderer.render(row, following)
    except PromptError as error:
        return str(error)
    except OptimalSamplingError:
        raise
    except Exception as error:  # a tokenizer may raise anything on one odd row; the others go on
        return f"the row could not be rendered: {type(error).__name__}: {error}"


def prompt_of(row_index: int, row: Mapping[str, Any], rendered: RenderedPrompt | str) -> Prompt:
    """The row with its prompts, or without where they could not be rendered."""
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
