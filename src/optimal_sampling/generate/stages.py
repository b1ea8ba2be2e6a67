"""A run of stages: each is a pass over the prompts that have no correct completion yet.

    for stage in stages:
        for sample_index in range(stage.tries):
            one more try of every open prompt; then the verdicts, which close prompts

The tries of a prompt are one sequence, through all stages, that ends with its first correct
completion. What is on the disk is always the beginning of that sequence, so that a call goes on
wherever another one ended. A try waits for its last verdict: batches are full until then.

A try that fails (no prompt, or an error of the engine) ends its stage for the prompt in this call,
which goes on with the next stage. A later call tries it again if the prompt is still open.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from itertools import chain
from typing import TYPE_CHECKING

from optimal_sampling.config import GenerateConfig, Stage
from optimal_sampling.generate.inputs import (
    idle_options,
    nothing_to_grade,
    numbered,
    prompt_of,
    render_rows,
    renderer_of,
    ungradable_note,
)
from optimal_sampling.generate.progress import Tally
from optimal_sampling.generate.recorder import Origin, Recorder, Work
from optimal_sampling.prompts import PromptRenderer
from optimal_sampling.records.run_folder import stage_options, stage_text
from optimal_sampling.records.schema import Key, stage_id
from optimal_sampling.types import Request
from optimal_sampling.verify.job import Grading

if TYPE_CHECKING:
    from optimal_sampling.engines import Engine

__all__ = ["StagedJob", "stage_config"]


def stage_config(config: GenerateConfig, stage: Stage) -> GenerateConfig:
    """The config of a run that is this stage alone."""
    hint = config.prompt.hint if stage.hint is None else stage.hint
    return replace(
        config,
        mixture=stage.mixture,
        prompt=replace(config.prompt, hint=hint),
        run=replace(config.run, mode=stage.mode),
        stages=(),
    )


class _StageRun:
    """A stage, with what all its tries share."""

    def __init__(self, work: Work, stage: Stage, earlier_tries: int) -> None:
        self.stage = stage
        self.config = stage_config(work.config, stage)
        self.earlier_tries = earlier_tries
        """Those that the stages before have for a prompt."""
        self.renderer: PromptRenderer = work.renderer
        if self.config.prompt != work.config.prompt:
            day = work.renderer.day
            self.renderer = renderer_of(self.config, work.dataset, work.vocabulary, day)
        self.engine: Engine | None = None
        self.seconds = 0.0
        """In the engine and its graders, in this call."""

    def origin(self, sample_index: int) -> Origin:
        """What the records of a try say; `sample_index` counts from 0."""
        return Origin(self.stage.mode, self.stage.name, self.earlier_tries + sample_index + 1)

    def title(self, sample_index: int) -> str:
        """Names a try."""
        return f"{self.stage.name}, try {sample_index + 1} of {self.stage.tries}"


class StagedJob:
    """One call. `tally` counts tries: those that the folder holds, and those owed so far."""

    def __init__(self, work: Work) -> None:
        assert work.grading is not None, "GenerateConfig checks it"
        self.work = work
        self.grading: Grading = work.grading
        self.tally = Tally(0, 1)
        self.stage_runs: list[_StageRun] = []
        for stage in work.config.stages:
            earlier = sum(each.stage.tries for each in self.stage_runs)
            self.stage_runs.append(_StageRun(work, stage, earlier))
        self._open: dict[int, str] = {}
        """Rows whose prompt has too few correct completions, and the prompt's content hash."""
        self._correct: Counter[int] = Counter()
        """Correct completions by row."""

    @property
    def seconds(self) -> dict[str, float]:
        """Time of each stage in this call, without the loading of models."""
        return {each.stage.name: round(each.seconds, 3) for each in self.stage_runs}

    def run(self) -> dict[str, str]:
        """Make the tries that are owed; notes by name."""
        notes = self._notes(self._survey())
        self.work.progress.show_notes(notes)
        self._read_verdicts()
        for each in self.stage_runs:
            for name, text in self._run_stage(each).items():
                if notes.setdefault(name, text) != text:
                    notes[f"{each.stage.name}, {name}"] = text
        return notes

    def _notes(self, ungradable: int) -> dict[str, str]:
        """The stages, and what there is to note on them and on the rows."""
        work = self.work
        on_rows = work.renderer.row_notes(row for _, row in work.dataset)
        plan = {
            f"stage {each.stage.name}": stage_text(stage_options(each.stage))
            for each in self.stage_runs
        }
        texts = [
            text
            for each in self.stage_runs
            for text in (*idle_options(each.config), *each.renderer.notes)
        ]
        left_out = [ungradable_note(ungradable)] if ungradable else []
        texts += [*work.vocabulary.notes, *on_rows, *left_out]
        return plan | numbered(texts)

    def _survey(self) -> int:
        """Find the prompts; rows without any fail. The number of rows that cannot be graded.

        Raises ConfigError where none can.
        """
        first, ungradable = self.stage_runs[0], 0
        recorder = Recorder(self.work, self.tally)
        recorder.origin = first.origin(0)
        seen: set[str] = set()
        for row_index, row, rendered in render_rows(self.work.renderer, self.work.dataset):
            prompt = prompt_of(row_index, row, rendered)
            if prompt.id in seen:
                self.tally.rows += 1
                self.tally.duplicates += 1
            elif isinstance(rendered, str):
                failed = replace(prompt, id=stage_id(first.stage.name, prompt.id))
                if self._take((failed.id, 0)):
                    recorder.request(failed, 0, rendered)
            elif self.grading.source.can_grade(row):
                self._open[row_index] = prompt.id
            else:
                ungradable += 1
            seen.add(prompt.id)
        if ungradable and not self._open:
            raise nothing_to_grade(self.work.dataset)
        return ungradable

    def _take(self, key: Key) -> bool:
        """Count a try that is not good; whether it is owed, and has not failed too often."""
        self.tally.rows += 1
        is_owed = self.work.folder.ledger.owes(key, self.work.config.run.max_attempts)
        self.tally.given_up += not is_owed
        return is_owed

    def _read_verdicts(self) -> None:
        """Close the prompts that earlier calls have solved; grades what they left ungraded."""
        owners = {
            stage_id(each.stage.name, prompt): row
            for each in self.stage_runs
            for row, prompt in self._open.items()
        }
        recorded = sum(identity in owners for identity, _ in self.work.folder.ledger.good)
        self.tally.rows += recorded
        self.tally.already_good += recorded
        for (identity, _), verdict in self.grading.settle(owners).items():
            self._correct[owners[identity]] += verdict == "correct"
        self._close_solved()

    def _close_solved(self) -> None:
        wanted = self.work.config.data.samples_per_prompt
        kept = {row: each for row, each in self._open.items() if self._correct[row] < wanted}
        self._open = kept

    def _run_stage(self, each: _StageRun) -> dict[str, str]:
        """All tries of a stage; the notes of its engine. Loads models only if a try is owed."""
        with ExitStack() as opened:
            for sample_index in range(each.stage.tries):
                owed = self._owed(each, sample_index)
                if owed:
                    self._try(each, sample_index, owed, opened)
            notes = {} if each.engine is None else each.engine.notes()
            each.engine = None
        return notes

    def _owed(self, each: _StageRun, sample_index: int) -> dict[int, Key]:
        """The rows that are owed a try: those whose tries before it are good. Counts them."""
        good, owed = self.work.folder.ledger.good, {}
        for row, prompt in self._open.items():
            identity = stage_id(each.stage.name, prompt)
            is_next = sample_index == 0 or (identity, sample_index - 1) in good
            key = identity, sample_index
            if is_next and key not in good and self._take(key):
                owed[row] = key
        return owed

    def _try(
        self, each: _StageRun, sample_index: int, owed: dict[int, Key], opened: ExitStack
    ) -> None:
        """One more try of the rows that are owed it, and the verdicts on them."""
        tally = Tally(len(owed), 1, title=each.title(sample_index))
        recorder = Recorder(self.work, tally, self.tally)
        recorder.origin = each.origin(sample_index)
        requests = _requests(each, self.work, owed, recorder)
        first = next(requests, None)
        if first is not None:
            engine = self._engine(each, opened)
            started = time.monotonic()
            tally.restart_clock()
            recorder.serve(engine, chain([first], requests))
            each.seconds += time.monotonic() - started
        started = time.monotonic()
        self._judge(owed)
        each.seconds += time.monotonic() - started
        closed = sum(row not in self._open for row in owed)
        self.work.progress.show(
            f"{tally.title}: {closed} of {len(owed)} prompts solved, {len(self._open)} are open"
        )

    def _engine(self, each: _StageRun, opened: ExitStack) -> Engine:
        """The engine of a stage, open until the stage ends."""
        if each.engine is None:
            self.grading.check()
            each.engine = opened.enter_context(self.work.engine(each.config))
            if not self.tally.made.records:
                self.tally.restart_clock()
        return each.engine

    def _judge(self, owed: dict[int, Key]) -> None:
        """Wait for the verdicts on a try, and close the prompts that it has solved."""
        folder = self.work.folder
        folder.file.commit()
        self.grading.finish()
        for row, key in owed.items():
            is_good = key in folder.ledger.good
            self._correct[row] += is_good and self.grading.verdict(key) == "correct"
        self._close_solved()


def _requests(
    each: _StageRun, work: Work, owed: dict[int, Key], recorder: Recorder
) -> Iterator[Request]:
    """Requests for the owed tries; those of rows without prompts fail at once."""
    for row_index, row, rendered in render_rows(each.renderer, work.dataset, owed):
        identity, sample_index = owed[row_index]
        prompt = replace(prompt_of(row_index, row, rendered), id=identity)
        request = recorder.request(prompt, sample_index, rendered)
        if request is not None:
            yield request
