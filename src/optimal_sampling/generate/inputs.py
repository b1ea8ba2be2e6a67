"""Rows of a dataset with their prompts, and what there is to note before a run. No weights."""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Mapping
from datetime import date
from typing import Any

from optimal_sampling.config import GenerateConfig, MixtureConfig
from optimal_sampling.engines import check_pair
from optimal_sampling.errors import ConfigError, OptimalSamplingError, PromptError
from optimal_sampling.generate.dataset import Dataset, open_dataset
from optimal_sampling.prompts import PromptRenderer, RenderedPrompt
from optimal_sampling.records.run_folder import template_date
from optimal_sampling.records.schema import Prompt, row_id
from optimal_sampling.types import prompt_id
from optimal_sampling.verify import resolve_grader
from optimal_sampling.verify.job import Source, check_columns
from optimal_sampling.vocabulary import Vocabulary

__all__ = [
    "grading_source",
    "idle_options",
    "input_notes",
    "nothing_to_grade",
    "numbered",
    "open_inputs",
    "prompt_of",
    "render_rows",
    "renderer_of",
    "ungradable_note",
]

_METHOD_OF = {
    "fixed_alpha": "fixed",
    "trust_region": "trust_region",
    "schedule_start": "schedule",
    "schedule_end": "schedule",
    "schedule_tokens": "schedule",
    "veto_min_p": "veto",
    "interleaved_top_k": "interleaved",
    "interleaved_min_p": "interleaved",
    "arithmetic_weight": "arithmetic",
}
"""The alpha method that reads each of these options of MixtureConfig."""


def open_inputs(config: GenerateConfig) -> tuple[Dataset, Vocabulary, PromptRenderer]:
    """What rows are read from and rendered with. Raises as `engines.check_pair` does."""
    dataset = open_dataset(config.data, config.run.seed)
    models = config.models
    vocabulary = Vocabulary.load(
        models.student,
        models.teacher,
        models.trust_remote_code,
        revisions=models.revisions,
        granularity=models.granularity,
    )
    stages = [(stage.mixture, stage.mode) for stage in config.stages]
    for mixture, mode in stages or [(config.mixture, config.run.mode)]:
        check_pair(config.engine, models, mixture, vocabulary, mode)
    return dataset, vocabulary, renderer_of(config, dataset, vocabulary)


def renderer_of(
    config: GenerateConfig, dataset: Dataset, vocabulary: Vocabulary, day: date | None = None
) -> PromptRenderer:
    """What rows are rendered with. `day`: that of chat templates; None: the run's."""
    return PromptRenderer(
        config.prompt,
        vocabulary,
        prompt_column=dataset.prompt_column,
        answer_column=dataset.answer_column,
        columns=dataset.columns,
        day=day or template_date(config.run.output_dir),
    )


def grading_source(
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


def ungradable_note(rows: int) -> str:
    """What a run of stages says of rows without a reference answer."""
    return f"{rows} rows have no answer to grade with, and are left out"


def nothing_to_grade(dataset: Dataset) -> ConfigError:
    """The error of a run of stages that would leave out all rows."""
    return ConfigError(
        f"no row of {dataset.source.name} has an answer to grade with; name its column with "
        "--reference"
    )


def input_notes(
    config: GenerateConfig,
    vocabulary: Vocabulary,
    renderer: PromptRenderer,
    dataset: Dataset,
) -> dict[str, str]:
    """What is not as the options say, or easily overlooked, by name. Known without any weights."""
    mode = config.run.mode
    alone = f"drawn from the {mode} alone; the options of alpha do nothing"
    return numbered(
        [
            *([alone] if mode != "mixture" else []),
            *idle_options(config),
            *vocabulary.notes,
            *renderer.notes,
            *renderer.row_notes(row for _, row in dataset),
        ]
    )


def numbered(texts: Iterable[str]) -> dict[str, str]:
    """Notes by name; one text once."""
    distinct = dict.fromkeys(texts)
    return {f"note {number}": text for number, text in enumerate(distinct, start=1)}


def idle_options(config: GenerateConfig) -> Iterator[str]:
    """Notes on options that were given and do nothing."""
    hint, shown_to = config.prompt.hint, config.prompt.hint_to
    if hint != "none" and config.run.mode not in ("mixture", shown_to):
        yield f"hint {hint} does nothing: it is shown to the {shown_to} alone"
    if config.run.mode == "mixture":
        yield from _of_other_methods(config.mixture)


def _of_other_methods(mixture: MixtureConfig) -> Iterator[str]:
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
    renderer: PromptRenderer, dataset: Dataset, chosen: Container[int] | None = None
) -> Iterator[tuple[int, Mapping[str, Any], RenderedPrompt | str]]:
    """Each row with its index, and its prompts or the reason why it has none.

    `chosen`: indices of the rows; None: all of the dataset's.
    """
    for index, row, following in _rows(dataset, with_following=renderer.needs_following):
        if chosen is None or index in chosen:
            yield index, row, _render_row(renderer, row, following)


def _rows(
    dataset: Dataset, *, with_following: bool
) -> Iterator[tuple[int, Mapping[str, Any], Mapping[str, Any] | None]]:
    if with_following:
        yield from dataset.with_following()
    else:
        yield from ((index, row, None) for index, row in dataset)


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
