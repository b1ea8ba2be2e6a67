"""Options of `export`. The command line is derived from them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import tyro

from optimal_sampling.config import expand_user
from optimal_sampling.errors import ConfigError
from optimal_sampling.types import Mode

__all__ = ["MODE_OF_KIND", "ExportOptions", "Kind", "SoftLayout"]

Kind = Literal["optimal_sampling", "baseline", "student", "warmstart"]
"""Where completions come from: q*, the teacher alone, the student alone, or reference solutions."""

SoftLayout = Literal["distillkit", "trl"]
"""How columns of soft targets are laid out."""

MODE_OF_KIND: dict[str, Mode] = {
    "optimal_sampling": "mixture",
    "baseline": "teacher",
    "student": "student",
}
"""The mode of the runs that a kind is made of; `warmstart` takes the rows of any run."""


@dataclass(frozen=True)
class ExportOptions:
    """Write a training set from run folders: a folder for `load_dataset` and `trl sft`.

    Prints and writes into README.md what there is to know of the data before training.
    """

    runs: tyro.conf.Positional[tuple[str, ...]] = ()
    """Run folders. Several must have the same options, unless --mix."""
    output_dir: str | None = None
    """The new folder; unset: `outputs/sft/KIND_sft`."""
    kind: Kind = "optimal_sampling"
    """`optimal_sampling`: completions of q*; `baseline`: of the teacher alone; `student`: of the
    student alone; `warmstart`: the dataset's own reference solutions."""
    format: Literal["text", "tokens", "prompts"] = "text"
    """`text`: columns `prompt` and `completion`; `tokens`: `input_ids` and `labels`, the very ids
    that were drawn; `prompts`: `prompt` and `privileged_context`, without completions."""
    soft_targets: Literal["none", "mixture", "teacher", "student"] = "none"
    """With `tokens`: also columns with the likeliest tokens of q, of the teacher or of the student,
    from runs with --top-tokens."""
    soft_layout: SoftLayout = "distillkit"
    """`distillkit`: `token_ids` and `top_values`, a row per position; `trl`: `logprob_token_ids`,
    `logprobs` and the token drawn, a row per token, as TRL's client of a teacher server has them.
    """
    messages: bool = False
    """With `text`: prompts and completions as lists of messages, which the trainer renders."""
    model: str | None = None
    """Model to be trained, whose tokenizer is used; unset: the student of the runs."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model to be trained."""
    only: Literal["all", "correct"] | None = None
    """`correct`: only completions that were graded as correct (`optimal-sampling verify`); unset:
    of a run of stages those, of others all."""
    drop_truncated: bool = True
    """Leave out completions that ended by length: they would teach to stop in mid-thought."""
    dedup: bool = False
    """Keep equal completions of a prompt once."""
    decontaminate: tuple[str, ...] = ()
    """Leave out prompts that share 8 words in a row with a question of these benchmarks: files
    (JSONL, JSON, Parquet) or names."""
    max_per_prompt: int | None = None
    """Most completions of one prompt."""
    prefer: Literal["first", "shortest", "on-policy"] = "first"
    """Which completions --max-per-prompt keeps: the first ones drawn, those of fewest tokens, or
    those that are likeliest per token to the student."""
    validation_share: float = 0.0
    """Share of the prompts whose rows go to the split `validation`. All exports of the same prompts
    have the same split, whatever their kind."""
    student_run: str | None = None
    """Run of the student alone on the same prompts, for the coverage of problems that it never
    solves; unset: the one folder beside the first run that is such a run."""
    solution_column: str = "solution"
    """Column of the reference solution, for `warmstart`."""
    score_rows: int = 0
    """Rows whose log-probability under the student is measured, by loading it; 0: none."""
    licence: str | None = None
    """Licence of the source dataset; unset: that of its README.md where there is one."""
    mix: bool = False
    """Allow runs with different options."""
    overwrite: bool = False
    """Replace an export that is in the output folder."""
    push_to_hub: str | None = None
    """Also upload to this dataset repository of the Hugging Face hub."""
    hub_private: bool = True
    """Make a new hub repository private."""

    def __post_init__(self) -> None:
        if not 0 <= self.validation_share < 1:
            raise ConfigError(f"validation_share must lie in [0, 1), got {self.validation_share}")
        if self.max_per_prompt is not None and self.max_per_prompt < 1:
            raise ConfigError(f"max_per_prompt must be at least 1, got {self.max_per_prompt}")
        if self.score_rows < 0:
            raise ConfigError(f"score_rows must be at least 0, got {self.score_rows}")
        target = self.output_dir
        if target is None:
            target = f"outputs/sft/{self.kind}_sft"
        if not target or "\0" in target:
            raise ConfigError(f"output_dir must be a name without NUL characters, got {target!r}")
        object.__setattr__(self, "output_dir", str(expand_user(target)))
        self._check_combinations()

    def _check_combinations(self) -> None:
        if self.messages and self.format != "text":
            raise ConfigError(f"--messages is a form of --format text, not of {self.format}")
        if self.soft_targets != "none" and (self.format != "tokens" or self.kind == "warmstart"):
            raise ConfigError(
                "--soft-targets needs --format tokens and completions that were drawn: they belong "
                "to the very ids"
            )
        if self.kind == "warmstart" and self.only == "correct":
            raise ConfigError(
                "--only correct is about completions that were drawn; reference solutions have no "
                "verdicts"
            )
        if not self.drop_truncated and self.format == "text":
            raise ConfigError(
                "--no-drop-truncated needs --format tokens: trainers put an end token after every "
                "text, and would teach the student to stop in mid-thought"
            )

    @property
    def draws(self) -> bool:
        """Whether rows hold completions that were drawn."""
        return self.kind != "warmstart" and self.format != "prompts"
