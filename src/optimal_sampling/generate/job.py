"""The `generate` job: rows of a dataset -> requests for the samples that are owed -> records."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from itertools import chain

from optimal_sampling.config import GenerateConfig
from optimal_sampling.errors import ConfigError
from optimal_sampling.generate.fingerprint import check_rows, engine_facts, model_facts
from optimal_sampling.generate.inputs import (
    grading_source,
    input_notes,
    open_inputs,
    prompt_of,
    render_rows,
)
from optimal_sampling.generate.progress import Progress, Summary, Tally
from optimal_sampling.generate.recorder import OpenEngine, Recorder, Work
from optimal_sampling.generate.stage_counts import StageCounts
from optimal_sampling.generate.stages import StagedJob
from optimal_sampling.records.run_folder import GRADED_BY, TEMPLATE_DATE, RunFolder
from optimal_sampling.types import Request
from optimal_sampling.verify.job import Grading, Source

__all__ = ["Interrupted", "generate"]


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
    """Generate every sample that the run folder still owes; with stages, see `stages.py`.

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
    elsewhere = config.fleet.has_other_machines
    facts = model_facts(config.models, elsewhere=elsewhere) if config.engine.loads_models else {}
    facts |= engine_facts(config)
    if renderer.prints_date:
        facts[TEMPLATE_DATE] = renderer.day.isoformat()
    source = grading_source(config, dataset, vocabulary)
    if source is not None and config.stages:
        facts[GRADED_BY] = f"{source.grader.name}, {source.reference or 'by its usual name'}"
    with RunFolder(config, facts) as folder, _grading(config, source) as grading:
        check_rows(dataset, folder)
        work = Work(config, dataset, renderer, vocabulary, folder, progress, grading, open_with)
        return _finish(work, StagedJob(work) if config.stages else _Job(work))


def _finish(work: Work, job: _Job | StagedJob) -> Summary:
    """Run a job, and sum it up in `summary.json`. Raises Interrupted."""
    config, folder = work.config, work.folder
    try:
        with work.progress:
            notes = job.run()
            folder.close()
            summary = Summary.of(job.tally, folder, notes, mode=config.run.mode, interrupted=False)
            summary = _graded(work, summary)
    except KeyboardInterrupt:
        folder.close()
        folder.recount()
        summary = Summary.of(job.tally, folder, {}, mode=config.run.mode, interrupted=True)
        summary.save(config.shard)
        raise Interrupted(summary) from None
    if isinstance(job, StagedJob):
        summary = _with_stages(summary, job)
    summary.save(config.shard)
    return summary


def _with_stages(summary: Summary, job: StagedJob) -> Summary:
    """The summary with what the folder holds of each stage."""
    counts = StageCounts.of(summary.run_folder)
    seconds = job.seconds
    stages = {
        name: {**numbers, "seconds": seconds[name]}
        for name, numbers in counts.numbers([*seconds]).items()
    }
    return replace(summary, stages=stages, prompts=len(counts.prompts), solved=len(counts.solved))


def _graded(work: Work, summary: Summary) -> Summary:
    """The summary with the verdicts, once all that is on the disk is graded."""
    if work.grading is None:
        return summary
    if not work.config.stages:  # whose passes have ended with the verdicts
        work.progress.show("grading the completions that have no verdict yet")
    verdicts = work.grading.finish()
    return replace(summary, verdicts=verdicts, not_graded=work.grading.failed)


def _grading(
    config: GenerateConfig, source: Source | None
) -> AbstractContextManager[Grading | None]:
    if source is None:
        return nullcontext()
    return Grading(config.run.output_dir, config.shard, source, config.verify)


class _Job:
    """One call without stages. The engine pulls requests as it has room."""

    def __init__(self, work: Work) -> None:
        self.work = work
        self.tally = Tally(len(work.dataset), work.config.data.samples_per_prompt)
        self.tally.already_good = self._recorded()
        self._recorder = Recorder(work, self.tally)

    def _recorded(self) -> int:
        """Good samples of the selected rows by the ledger, before any row is rendered."""
        samples, rows = self.work.config.data.samples_per_prompt, self.work.dataset.selection
        good = self.work.folder.ledger.good.items()
        return sum(sample < samples and row in rows for (_, sample), row in good)

    def run(self) -> dict[str, str]:
        """Generate the owed samples; notes of the vocabulary, the renderer and the engine, by name.

        Models are loaded only if a sample is owed.
        """
        work = self.work
        notes = input_notes(work.config, work.vocabulary, work.renderer, work.dataset)
        work.progress.show_notes(notes)
        requests = self._owed_requests()
        first = next(requests, None)
        if first is None:
            self._recorder.show()
            return notes
        if work.grading is not None:
            work.grading.check()
        with work.engine(work.config) as engine:
            self.tally.restart_clock()
            self._recorder.serve(engine, chain([first], requests))
            return notes | engine.notes()

    def _owed_requests(self) -> Iterator[Request]:
        """Requests for the owed samples; those of rows without prompts fail at once."""
        seen: set[str] = set()
        good = 0
        for row_index, row, rendered in render_rows(self.work.renderer, self.work.dataset):
            prompt = prompt_of(row_index, row, rendered)
            if prompt.id in seen:
                self.tally.duplicates += 1
                continue
            seen.add(prompt.id)
            missing = self._missing_samples(prompt.id)
            good += self.work.config.data.samples_per_prompt - len(missing)
            # a row of another data slice may have made this prompt's samples
            self.tally.already_good = max(self.tally.already_good, good)
            for sample_index in self._owed_samples(prompt.id, missing):
                request = self._recorder.request(prompt, sample_index, rendered)
                if request is not None:
                    yield request
        self.tally.already_good = good

    def _missing_samples(self, prompt: str) -> list[int]:
        """Indices of a prompt's samples that are not good."""
        good = self.work.folder.ledger.good
        samples = range(self.work.config.data.samples_per_prompt)
        return [sample for sample in samples if (prompt, sample) not in good]

    def _owed_samples(self, prompt: str, missing: list[int]) -> Iterator[int]:
        """Those of a prompt's missing samples to try again. Counts the others."""
        for sample in missing:
            if self.work.folder.ledger.owes((prompt, sample), self.work.config.run.max_attempts):
                yield sample
            else:
                self.tally.given_up += 1
