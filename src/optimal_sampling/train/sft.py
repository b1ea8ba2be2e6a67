"""One call of `optimal-sampling sft`: checks, training, and the check of the saved model."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from optimal_sampling.config import expand_user
from optimal_sampling.errors import ConfigError, OptimalSamplingError, RunFolderError
from optimal_sampling.generate.fingerprint import fingerprint
from optimal_sampling.records.store import Lock, read_json, write_atomically
from optimal_sampling.train.checkpoints import find_checkpoints
from optimal_sampling.train.launch import import_trl, is_launched, is_main_process
from optimal_sampling.train.options import SftOptions
from optimal_sampling.vocabulary import ModelTokens, load_tokens, resolve_model
from optimal_sampling.vocabulary.model_folder import check_weight_files

__all__ = ["SftSummary", "sft"]

_MOST_CHECKED = 1024  # most tokens of a completion that is drawn to see whether it ends
_FIRST = 100  # examples whose prompts are looked at
_UNCOMPARED = {
    "output_dir",
    "num_processes",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "save_steps",
    "save_total_limit",
    "report_to",
    "check_prompts",
    "fsdp",
    "gradient_checkpointing",
    "dataset_name",
    "dataset_config",
    "dataset_train_split",
    "dataset_test_split",
    "trust_remote_code",
}
"""Options that may differ when training goes on. The examples themselves are compared."""


@dataclass(frozen=True)
class SftSummary:
    """What one call did."""

    status: str
    """`complete` or `interrupted`."""
    output_dir: str
    updates: int
    examples: int
    first_loss: float | None
    """Nats per token with loss, of the first update; None where none was logged."""
    last_loss: float | None
    """Mean of the last tenth of the updates."""
    checked: int = 0
    """Completions that were drawn from the saved model."""
    ended: int = 0
    """Of these, the ones that ended with an end token."""
    sample: str = ""
    """The first of them."""
    checkpoint: str = ""
    """The newest complete one."""

    def table(self) -> Table:
        """A table for the terminal."""
        table = Table(title=f"{self.status}: {self.output_dir}", title_justify="left")
        table.show_header = False
        table.add_row("updates", str(self.updates))
        table.add_row("examples", str(self.examples))
        if self.first_loss is not None and self.last_loss is not None:
            table.add_row("loss, nats/token", f"{self.first_loss:.4f} -> {self.last_loss:.4f}")
        if self.checked:
            table.add_row("completions that end", f"{self.ended} of {self.checked}")
            table.add_row("one of them", Text(self.sample))
        return table


def sft(options: SftOptions, trl: Mapping[str, Any] | None = None) -> SftSummary:
    """Train, or go on with training; `trl` holds options of TRL's SFTConfig by name.

    Raises ConfigError, DatasetError, ModelError, RunFolderError or MissingDependencyError before
    training, StorageError and EngineError while it trains.
    """
    import_trl()
    name, revision = options.model_name_or_path, options.model_revision
    source = resolve_model(name, revision, weights=True)
    check_weight_files(f"model {name!r}", Path(source))
    tokens = load_tokens(name, options.trust_remote_code, revision)
    if options.eos_token not in (None, *tokens.tokenizer.get_vocab()):
        raise ConfigError(f"--eos_token {options.eos_token!r} is no token of model {name!r}")
    folder = expand_user(options.output_dir)
    with ExitStack() as stack:
        if is_main_process():
            stack.callback(Lock(folder / "sft.json").release)
        _quiet()
        return _Session(options, dict(trl or {}), tokens, source).run(folder)


class _Session:
    """The state of one call. `source`: the folder or hub id that the model is loaded from."""

    def __init__(
        self, options: SftOptions, trl: dict[str, Any], tokens: ModelTokens, source: str
    ) -> None:
        self._options, self._trl, self._tokens, self._source = options, trl, tokens, source
        self._examples: list[dict[str, Any]] = []
        self._digest, self._count, self._longest = "", 0, 0

    def run(self, folder: Path) -> SftSummary:
        from optimal_sampling.train.trainer import StopOnSignal

        stop = StopOnSignal()
        trainer = self._trainer(stop)
        self._claim(folder, self._facts(trainer.args))
        summary = _finished(folder)
        if summary is None:
            summary = self._train(trainer, stop, folder)
        else:
            _say(f"{folder} holds the finished model of these options; nothing to do")
        trainer.end()
        return summary

    def _train(self, trainer: Any, stop: Any, folder: Path) -> SftSummary:
        from optimal_sampling.train.trainer import failures

        with failures(folder):
            trainer.train(resume_from_checkpoint=self._resume_from(folder))
            if not stop.stopped:
                trainer.save_model()
        summary = _summary(trainer, folder, self._count, interrupted=stop.stopped)
        trainer.accelerator.wait_for_everyone()
        if stop.stopped or not is_main_process():
            return summary
        summary = self._with_completions(summary, folder)
        text = json.dumps(asdict(summary), indent=2, ensure_ascii=False)
        write_atomically(folder / "summary.json", text + "\n")
        return summary

    def _trainer(self, stop: Any) -> Any:
        from transformers import PrinterCallback

        from optimal_sampling.train.data import check_vocabulary, load_split
        from optimal_sampling.train.progress import TrainingProgress
        from optimal_sampling.train.trainer import StudentTrainer, lora_config, sft_config

        options = self._options
        config = sft_config(options, self._trl)
        test = None
        if config.eval_strategy != "no":
            test = load_split(options, options.dataset_test_split)
        self._say_settings(config)
        rows = load_split(options, options.dataset_train_split)
        check_vocabulary(options.dataset_name, rows, self._tokens)
        try:
            trainer = StudentTrainer(
                self._source,
                args=config,
                train_dataset=rows,
                eval_dataset=test,
                processing_class=self._tokens.tokenizer,
                peft_config=lora_config(options),
                callbacks=[TrainingProgress(), stop],
                check=self._check,
            )
        except OptimalSamplingError:
            raise
        except (ValueError, TypeError, ImportError) as error:
            raise ConfigError(f"TRL refuses these options: {error}") from error
        trainer.remove_callback(PrinterCallback)
        return trainer

    def _say_settings(self, config: Any) -> None:
        options = self._options
        device = "CPU" if config.use_cpu else "GPU"
        arithmetic = ", arithmetic in bfloat16" if config.bf16 else ""
        dtype = config.model_init_kwargs["dtype"]
        _say(f"{config.world_size} process(es) on {device}, weights in {dtype}{arithmetic}")
        if options.fsdp and not is_launched():
            _say("--fsdp has no effect: one process has nothing to shard with")
        if options.use_liger_kernel and config.use_cpu:
            _say("--use_liger_kernel has no effect on a CPU")

    def _check(self, dataset: Any) -> None:
        """Checks of the tokens of a split, before it is cut or packed; says what they found."""
        from optimal_sampling.train import data

        options, tokens = self._options, self._tokens
        vocabulary = max(tokens.tokenizer.get_vocab().values()) + 1
        found = data.scan(dataset, tokens.end_ids | self._eos_ids(), vocabulary)
        first = [dict(dataset[i]) for i in range(min(len(dataset), _FIRST))]
        notes = data.check_cuts(found, options, tokens.context)
        notes += data.check_loss(found, options.completion_only_loss)
        notes += data.check_ends(found, tokens, self._eos_ids())
        notes += data.check_prompts(first, tokens.tokenizer)
        for note in notes:
            _say(note)
        if not self._examples:
            self._digest, self._count = found.digest, len(found.lengths)
            self._longest = int(found.trained.max())
            self._examples = first
            _say("the first example as it is trained:")
            for line in data.shown(self._examples[0], tokens.tokenizer.decode):
                _say(line)

    def _eos_ids(self) -> frozenset[int]:
        """Ids at which the saved model stops."""
        own = self._tokens.end_ids - {self._tokens.turn_end}
        name = self._options.eos_token
        return own if name is None else own | {self._tokens.tokenizer.get_vocab()[name]}

    def _facts(self, config: Any) -> dict[str, Any]:
        """What has to be the same when training goes on."""
        facts = {k: v for k, v in asdict(self._options).items() if k not in _UNCOMPARED}
        batch = config.per_device_train_batch_size * config.gradient_accumulation_steps
        facts |= {f"trl.{name}": str(value) for name, value in self._trl.items()}
        facts |= {"examples_per_update": batch * config.world_size, "examples": self._digest}
        if Path(self._source).is_dir():
            facts["model_files"] = fingerprint(Path(self._source))
        return facts

    def _claim(self, folder: Path, facts: dict[str, Any]) -> None:
        """Write `sft.json` into a new folder. Raises RunFolderError where it is of another call."""
        path = folder / "sft.json"
        if not path.exists():
            if is_main_process():
                if (folder / "config.json").exists() or find_checkpoints(folder).last:
                    raise RunFolderError(
                        f"{folder} holds a model that `optimal-sampling sft` did not begin; "
                        "choose another --output_dir"
                    )
                write_atomically(path, json.dumps(facts, indent=2) + "\n")
            return
        before = read_json(path)
        names = sorted({*before, *facts})
        differing = [name for name in names if before.get(name) != facts.get(name)]
        if differing:
            was = "; ".join(f"{n} was {before.get(n)}, is {facts.get(n)}" for n in differing)
            raise RunFolderError(
                f"{folder} was begun with other options or data: {was}. Use the same ones, or "
                "another --output_dir"
            )

    def _resume_from(self, folder: Path) -> str | None:
        found = find_checkpoints(folder)
        for path, reason in found.incomplete:
            _say(f"{path} is skipped: {reason}")
        if found.last is None:
            return None
        _say(f"going on from {found.last}")
        return str(found.last)

    def _with_completions(self, summary: SftSummary, folder: Path) -> SftSummary:
        """The summary with completions of the saved model for the first prompts."""
        prompts = _prompts(self._examples, self._options.check_prompts)
        limit = min(2 * self._longest, _MOST_CHECKED)
        ends = self._tokens.end_ids | self._eos_ids()
        drawn = _greedy(folder, prompts, limit, ends) if prompts else []
        ended = sum(ids[-1] in ends for ids in drawn)
        if drawn and not ended:
            _say(f"none of {len(drawn)} completions ended within {limit} tokens")
        sample = self._tokens.tokenizer.decode(drawn[0]) if drawn else ""
        more = {"checked": len(drawn), "ended": ended, "sample": sample}
        return SftSummary(**asdict(summary) | more)


def _finished(folder: Path) -> SftSummary | None:
    path = folder / "summary.json"
    return SftSummary(**read_json(path)) if path.exists() else None


def _summary(trainer: Any, folder: Path, examples: int, *, interrupted: bool) -> SftSummary:
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    tail = losses[-max(1, len(losses) // 10) :]
    last = find_checkpoints(folder).last
    return SftSummary(
        status="interrupted" if interrupted else "complete",
        output_dir=str(folder),
        updates=trainer.state.global_step,
        examples=examples,
        first_loss=losses[0] if losses else None,
        last_loss=sum(tail) / len(tail) if tail else None,
        checkpoint=str(last or ""),
    )


def _prompts(examples: Sequence[Mapping[str, Any]], count: int) -> list[list[int]]:
    """Ids before the first token with loss, of the first examples with different ones."""
    found: dict[tuple[int, ...], None] = {}
    for row in examples:
        start = next(i for i, label in enumerate(row["labels"]) if label != -100)
        found[tuple(row["input_ids"][:start])] = None
    return [list(ids) for ids in found if ids][:count]


def _greedy(
    folder: Path, prompts: Sequence[list[int]], limit: int, end_ids: frozenset[int]
) -> list[list[int]]:
    """Completions of the model that was saved, the likeliest token at every step."""
    import torch
    from transformers import AutoModelForCausalLM

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(str(folder), dtype="auto").to(device).eval()
    drawn = []
    for prompt in prompts:
        ids = torch.tensor([prompt], device=device)
        text = model.generate(
            ids, max_new_tokens=limit, do_sample=False, eos_token_id=sorted(end_ids)
        )
        drawn.append(text[0, len(prompt) :].tolist())
    return drawn


def _quiet() -> None:
    """Without bars and hints of the libraries, which overwrite ours."""
    import warnings

    import datasets
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if not is_main_process() or not sys.stderr.isatty():
        datasets.disable_progress_bars()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers|trl|peft")


def _say(text: str) -> None:
    if is_main_process():
        Console(stderr=True).print(text, soft_wrap=True, highlight=False, markup=False)
