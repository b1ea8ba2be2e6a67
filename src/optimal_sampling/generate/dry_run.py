"""What a run would do, over its whole dataset. Loads no weights and writes nothing."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from statistics import fmean
from typing import Any

from optimal_sampling.config import GenerateConfig, LocalOptions, ModelConfig
from optimal_sampling.engines.base import prompt_problem
from optimal_sampling.generate.dataset import Dataset
from optimal_sampling.generate.inputs import (
    grading_source,
    input_notes,
    nothing_to_grade,
    open_inputs,
    prompt_of,
    render_rows,
    renderer_of,
    ungradable_note,
)
from optimal_sampling.generate.stages import stage_config
from optimal_sampling.prompts import PromptRenderer, RenderedPrompt
from optimal_sampling.records.run_folder import stage_options, stage_text
from optimal_sampling.vocabulary import Vocabulary, resolve_model

__all__ = ["DryRun", "dry_run"]

_SCREEN = 1200  # most characters of a prompt that are printed
_GIB = 2**30


@dataclass
class DryRun:
    """Rows of a dataset as a run would take them."""

    config: GenerateConfig
    vocabulary: Vocabulary
    notes: dict[str, str]
    title: str = ""
    """Of a stage."""
    rows: int = 0
    duplicates: int = 0
    """Rows whose two prompts are those of an earlier row."""
    failures: dict[str, list[str]] = field(default_factory=dict)
    """Rows that would fail, by kind of reason: "row 3: the reason"."""
    cut_short: int = 0
    """Prompts after which the context has less room than max_new_tokens."""
    lengths: dict[str, list[int]] = field(default_factory=lambda: {"student": [], "teacher": []})
    """Tokens of the prompts that would be answered."""
    first: list[tuple[int, RenderedPrompt | str]] = field(default_factory=list)
    """The first rows: index and prompts, or why there are none."""
    ungradable: int = 0
    """Rows that stages leave out, as they have no answer to grade with."""
    stages: list[DryRun] = field(default_factory=list)
    """The stages after the first one, as runs of their own with all their tries."""

    @property
    def roles(self) -> tuple[str, ...]:
        """The models that take part."""
        mode = self.config.run.mode
        return ("student", "teacher") if mode == "mixture" else (mode,)

    def _problem(self, prompt: RenderedPrompt) -> str:
        """Why an engine would not take the prompts; "" where it would."""
        known = self.vocabulary
        contexts = [getattr(known, f"{role}_context") for role in self.roles]
        rows = [known.rows_of(role) for role in self.roles]
        prompts = [getattr(prompt, f"{role}_ids") for role in self.roles]
        problem = prompt_problem(self.roles, prompts, contexts, rows)
        needed = self.config.run.max_new_tokens
        pairs = zip(prompts, contexts, strict=True)
        ends_early = any(limit and len(ids) + needed > limit for ids, limit in pairs)
        self.cut_short += not problem and ends_early
        return problem

    def add(self, index: int, rendered: RenderedPrompt | str) -> None:
        """Count a row that is no duplicate."""
        problem = rendered if isinstance(rendered, str) else self._problem(rendered)
        if problem or isinstance(rendered, str):
            kind = "".join(" " if letter.isdigit() else letter for letter in problem)
            self.failures.setdefault(kind, []).append(f"row {index}: {problem}")
            return
        self.lengths["student"].append(len(rendered.student_ids))
        self.lengths["teacher"].append(len(rendered.teacher_ids))

    def lines(self) -> Iterator[str]:
        """The report."""
        if self.title:
            yield f"=== {self.title}"
        for index, rendered in self.first:
            yield from _prompt_lines(index, rendered)
        failed = sum(map(len, self.failures.values()))
        yield f"=== {self.rows} rows, {self.duplicates} duplicates (generated once), {failed} fail"
        for found in sorted(self.failures.values(), key=len, reverse=True):
            yield f"{len(found)} fail, first {found[0]}"
        if self.ungradable:
            yield ungradable_note(self.ungradable)
        if self.cut_short:
            yield (
                f"{self.cut_short} prompts leave less room in a context than "
                f"--max-new-tokens {self.config.run.max_new_tokens}"
            )
        yield from self._histogram()
        for name, text in self.notes.items():
            yield f"{name}: {text}"
        if self.config.engine.loads_models and self.lengths["student"]:
            yield from self._requirements()
        for stage in self.stages:
            yield from stage.lines()

    def _histogram(self) -> Iterator[str]:
        """Prompts of both models by length, in bins of powers of two."""
        bins = [[length.bit_length() for length in each] for each in self.lengths.values()]
        if not bins[0]:
            return
        yield f"{'tokens of a prompt':>20} {'student':>9} {'teacher':>9}"
        for power in range(min(map(min, bins)), max(map(max, bins)) + 1):
            counts = " ".join(f"{each.count(power):9}" for each in bins)
            yield f"{f'{1 << (power - 1)} to {(1 << power) - 1}':>20} {counts}"
        for name, of in (("mean", fmean), ("longest", max)):
            values = " ".join(f"{of(each):9.0f}" for each in self.lengths.values())
            yield f"{name:>20} {values}"

    def _requirements(self) -> Iterator[str]:
        """Attention, memory and time."""
        from optimal_sampling.engines.device import resolve_device, resolve_dtype
        from optimal_sampling.engines.local.paged.attention_backends import choose_backend

        models = self.config.models
        device = resolve_device(models.device)
        dtype = resolve_dtype(models.dtype, device)
        try:
            folders = {
                role: resolve_model(getattr(models, role), getattr(models, f"{role}_revision"))
                for role in self.roles
            }
            sizes = {role: _size(folder, models) for role, folder in folders.items()}
        except Exception as error:  # of a config: any class
            yield f"memory and time: not known ({type(error).__name__}: {error})"
            return
        distinct = {folders[role]: size for role, size in sizes.items()}
        width = 0.5 if models.load_in_4bit else dtype.itemsize
        weights = width * sum(size.parameters for size in distinct.values())
        samples = len(self.lengths["student"]) * self.config.data.samples_per_prompt
        rows = min(getattr(self.config.engine, "batch_size", 1), samples)
        caches = rows * dtype.itemsize * sum(map(self._cached_numbers, sizes, sizes.values()))
        if isinstance(self.config.engine, LocalOptions):
            head_dims = {size.head_dim for size in sizes.values()}
            choice = choose_backend(self.config.engine.attention, device, dtype, head_dims, set())
            yield f"attention: {choice.note}; the models are checked when they are loaded"
        yield (
            f"memory: weights {_gib(weights)} ({str(dtype).removeprefix('torch.')}), "
            f"KV caches up to {_gib(caches)} for {rows} requests in flight; "
            f"{_gib(_free_memory(device))} are free on {device}"
        )
        read, computed = _speeds(device, dtype)
        operations = 2 * sum(size.parameters for size in sizes.values())
        one_round = max((weights + caches) / read, rows * operations / computed)
        rounds = math.ceil(samples / rows) * self.config.run.max_new_tokens
        prompts = sum(2 * size.parameters * sum(self.lengths[role]) for role, size in sizes.items())
        yield (
            f"time: about {_duration(prompts / computed + rounds * one_round)} for {samples} "
            f"samples if each has --max-new-tokens {self.config.run.max_new_tokens}, by the "
            f"arithmetic ({computed / 1e12:.2f} TFLOP/s) and the memory ({read / 1e9:.0f} GB/s) "
            "measured now; the real time can be a few times less or more"
        )

    def _cached_numbers(self, role: str, size: _Size) -> float:
        """Keys and values of a request of average prompt at its end."""
        tokens = fmean(self.lengths[role]) + self.config.run.max_new_tokens
        return size.cached_numbers * tokens


def dry_run(config: GenerateConfig, shown: int = 3) -> DryRun:
    """Render every row. Raises as `generate` does for a dataset, a template or a tokenizer.

    Of stages each is reported as a run over all rows, of which every prompt takes all tries.
    """
    dataset, vocabulary, renderer = open_inputs(config)
    if not config.stages:
        notes = input_notes(config, vocabulary, renderer, dataset)
        return _counted(DryRun(config, vocabulary, notes), renderer, dataset, shown)
    source = grading_source(config, dataset, vocabulary)
    assert source is not None, "GenerateConfig checks it"
    reports = []
    for number, stage in enumerate(config.stages):
        alone = stage_config(config, stage)
        tries = replace(alone.data, samples_per_prompt=stage.tries)
        own = renderer_of(alone, dataset, vocabulary)
        notes = input_notes(alone, vocabulary, own, dataset)
        text = stage_text(stage_options(stage))
        title = f"stage {stage.name}, where every prompt takes all its tries: {text}"
        report = DryRun(replace(alone, data=tries), vocabulary, notes, title)
        is_new = number == 0 or alone.prompt != config.prompt
        reports.append(_counted(report, own, dataset, shown if is_new else 0, source.can_grade))
    first, *first.stages = reports
    if first.ungradable and not first.lengths["student"]:
        raise nothing_to_grade(dataset)
    return first


def _counted(
    result: DryRun,
    renderer: PromptRenderer,
    dataset: Dataset,
    shown: int,
    can_grade: Callable[[Mapping[str, Any]], bool] = lambda row: True,
) -> DryRun:
    """The report with the rows of the dataset; `shown` of them with their prompts."""
    seen: set[str] = set()
    for index, row, rendered in render_rows(renderer, dataset):
        identity = prompt_of(index, row, rendered).id
        if result.rows < shown:
            result.first.append((index, rendered))
        result.rows += 1
        if identity in seen:
            result.duplicates += 1
        elif can_grade(row):
            result.add(index, rendered)
        else:
            result.ungradable += 1
        seen.add(identity)
    return result


def _prompt_lines(index: int, rendered: RenderedPrompt | str) -> Iterator[str]:
    if isinstance(rendered, str):
        yield f"=== row {index}: no prompt: {rendered}"
        return
    for role in ("student", "teacher"):
        text, ids = getattr(rendered, f"{role}_text"), getattr(rendered, f"{role}_ids")
        yield f"=== row {index}, {role}: {len(ids)} tokens"
        yield _shortened(text)


def _shortened(text: str) -> str:
    """The text, or its beginning and its end where it is long."""
    if len(text) <= _SCREEN:
        return text
    half = _SCREEN // 2
    left_out = f"[... {len(text) - 2 * half} characters not shown ...]"
    return f"{text[:half]}\n{left_out}\n{text[-half:]}"


@dataclass(frozen=True)
class _Size:
    parameters: int
    cached_numbers: int
    """Keys and values of one token."""
    head_dim: int


def _size(folder: str, models: ModelConfig) -> _Size:
    """Of a model, from its config alone."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    remote = {"trust_remote_code": models.trust_remote_code}
    config = AutoConfig.from_pretrained(folder, **remote)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, **remote)
    text = config.get_text_config()
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return _Size(
        parameters=sum(each.numel() for each in model.parameters()),
        cached_numbers=2 * text.num_hidden_layers * heads * width,
        head_dim=width,
    )


def _free_memory(device: Any) -> int:
    import psutil
    import torch

    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return int(psutil.virtual_memory().available)


def _speeds(device: Any, dtype: Any) -> tuple[float, float]:
    """Bytes read per second, and operations of a product of matrices per second."""
    import torch
    from torch.utils.benchmark import Timer

    numbers = torch.ones(1 << 25, device=device)
    matrix = torch.ones(1024, 1024, device=device, dtype=dtype)
    values = {"numbers": numbers, "matrix": matrix}
    threads = torch.get_num_threads()
    read = Timer("numbers.sum()", globals=values, num_threads=threads).timeit(5)
    product = Timer("matrix @ matrix", globals=values, num_threads=threads).timeit(5)
    return numbers.nbytes / read.mean, 2 * 1024**3 / product.mean


def _gib(size: float) -> str:
    return f"{size / _GIB:.1f} GiB" if size >= _GIB else f"{size / 2**20:.0f} MiB"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} seconds"
    return f"{seconds / 60:.0f} minutes" if seconds < 7200 else f"{seconds / 3600:.1f} hours"
