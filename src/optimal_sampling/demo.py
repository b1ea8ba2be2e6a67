"""`optimal-sampling demo`: the shipped pair on arithmetic problems.

Compares q* with the student alone and the teacher alone. Nothing is downloaded. The run folder is
that of an ordinary `generate` run.
"""

from __future__ import annotations

import shlex
import time
from dataclasses import dataclass
from operator import itemgetter
from statistics import fmean, stdev

from rich.console import Console
from rich.table import Table
from rich.text import Text

from optimal_sampling.config import Checked, DataConfig, GenerateConfig, LocalOptions, RunConfig
from optimal_sampling.generate import generate
from optimal_sampling.generate.progress import MEANS_SHOWN, Progress
from optimal_sampling.prompts import PromptRenderer
from optimal_sampling.records import Record, load
from optimal_sampling.records.run_folder import Totals
from optimal_sampling.toy_pair.problems import is_correct
from optimal_sampling.types import Mode, Request
from optimal_sampling.vocabulary import Vocabulary

__all__ = ["DemoOptions", "run_demo"]

SHOWN = 3  # completions printed
TOP_TOKENS = 5  # kept of every token, for the page of `report`


@dataclass(frozen=True)
class DemoOptions(Checked):
    """Generate from q* with the shipped pair, and compare it with student and teacher alone."""

    output_dir: str = "outputs/demo"
    """Run folder of the records. A second call goes on where the first one ended."""
    num_examples: int = 200
    """Arithmetic problems of 1 to 5 steps."""
    max_new_tokens: int = 160
    """Most tokens per completion."""
    batch_size: int = 32
    """Requests in flight at once."""
    seed: int = 0
    """Of the problems and of every draw."""

    def generate_config(self) -> GenerateConfig:
        """The config of the `generate` run."""
        return GenerateConfig(
            data=DataConfig(dataset="synthetic", num_examples=self.num_examples),
            run=RunConfig(
                output_dir=self.output_dir, seed=self.seed, max_new_tokens=self.max_new_tokens
            ),
            engine=LocalOptions(batch_size=self.batch_size, top_tokens=TOP_TOKENS),
        )


@dataclass(frozen=True)
class Outcome:
    """Results of one way of sampling on the problems."""

    name: str
    tokens_per_second: float
    correct: list[bool]
    tokens: list[int]

    def accuracy(self) -> str:
        """Share of right answers with its standard error."""
        error = stdev(self.correct) / len(self.correct) ** 0.5 if len(self.correct) > 1 else 0.0
        return f"{fmean(self.correct):.1%} ± {error:.1%}"


def run_demo(options: DemoOptions, progress: Progress, console: Console) -> int:
    """Generate, compare and print; returns the exit code."""
    config = options.generate_config()
    generate(config, progress)
    # in the order of the rows: that of the file is the order of finishing, which varies
    records = sorted(load(config.run.output_dir), key=itemgetter("row_index"))
    outcomes = _outcomes(options, records)
    console.print(_comparison(outcomes))
    console.print(_mixture(records))
    console.print(_samples(records))
    path = f"{config.run.output_dir}/records/main.jsonl"
    text = f"{len(records)} records in {path} (docs/records.md describes the fields)"
    page = f"To look at them: optimal-sampling report {shlex.quote(config.run.output_dir)}"
    console.print(f"{text}\n{page}", soft_wrap=True, highlight=False, markup=False)
    return 0


def _outcomes(options: DemoOptions, records: list[Record]) -> list[Outcome]:
    """Both models alone and q* on the prompts and seeds of the records.

    q* is drawn again, which gives the recorded tokens, to measure its speed; like the others
    without the top tokens.
    """
    from optimal_sampling.engines import open_engine  # torch is loaded here

    config = options.generate_config()
    models, engine_options = config.models, LocalOptions(batch_size=options.batch_size)
    vocabulary = Vocabulary.load(models.student, models.teacher)
    renderer = PromptRenderer(config.prompt, vocabulary)
    answers = {record["id"]: str(record["row"]["answer"]) for record in records}
    requests = [_request(record, renderer, config.run.max_new_tokens) for record in records]
    modes: dict[Mode, str] = {"student": "student", "teacher": "teacher", "mixture": "q*"}
    outcomes = []
    with open_engine(engine_options, models, config.mixture, vocabulary) as engine:
        for mode, name in modes.items():
            started = time.perf_counter()
            completions = list(engine.view(mode=mode).generate(requests))
            seconds = time.perf_counter() - started
            texts = [(c.request.id, vocabulary.decode(c.token_ids)) for c in completions]
            correct = [is_correct(text, answers[id]) for id, text in texts]
            tokens = [len(c.token_ids) for c in completions]
            outcomes.append(Outcome(name, sum(tokens) / seconds, correct, tokens))
    return outcomes


def _request(record: Record, renderer: PromptRenderer, max_new_tokens: int) -> Request:
    """The request that the record came from."""
    prompt = renderer.render(record["row"])
    return Request(
        id=record["id"],
        sample_index=record["sample_index"],
        seed=record["seed"],
        student_prompt_ids=prompt.student_ids,
        teacher_prompt_ids=prompt.teacher_ids,
        max_new_tokens=max_new_tokens,
    )


def _comparison(outcomes: list[Outcome]) -> Table:
    table = Table(title="The same problems, drawn from", title_justify="left")
    for name in ("", "right answers", "tokens/s", "mean tokens"):
        table.add_column(name, justify="left" if not name else "right")
    for o in outcomes:
        table.add_row(o.name, o.accuracy(), f"{o.tokens_per_second:.0f}", f"{fmean(o.tokens):.1f}")
    return table


def _mixture(records: list[Record]) -> Table:
    totals = Totals()
    for record in records:
        totals.add(record)
    means = totals.means()
    table = Table(title="q*, means over all tokens", title_justify="left", show_header=False)
    for name, title in MEANS_SHOWN.items():
        mean = means[name]
        if mean is not None:
            table.add_row(title, f"{mean:.4f}")
    return table


def _samples(records: list[Record]) -> Table:
    table = Table(title="Generations", title_justify="left", show_lines=True)
    for name in ("problem", "answer", "drawn from q*"):
        table.add_column(name, overflow="fold")
    by_steps = sorted(records, key=lambda record: record["row"]["steps"])
    spread = by_steps[:: max(1, len(records) // SHOWN)]
    for record in spread[:SHOWN]:
        row = record["row"]
        texts = (row["problem"], row["answer"], record["completion"])
        table.add_row(*(Text(str(text)) for text in texts))
    return table
