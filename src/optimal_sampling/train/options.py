"""Options of `optimal-sampling sft`, with TRL's names. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, get_type_hints

from optimal_sampling.config import Checked
from optimal_sampling.errors import ConfigError, did_you_mean

__all__ = ["SftOptions", "parse_sft", "sft_names", "trl_options"]

_ALIASES = {"model_name_org_path": "model_name_or_path", "model": "model_name_or_path"}
_TRUTH = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}


@dataclass(frozen=True)
class SftOptions(Checked):
    """Train a model on an exported dataset with TRL's SFTTrainer.

    A second call on the same --output_dir goes on from the last complete checkpoint. Underscores
    and hyphens are the same. Options that are not listed go to TRL's SFTConfig
    (`--warmup_steps 10`, `--lr_scheduler_type cosine`, `--max_steps 100`).
    """

    model_name_or_path: str = "toy-student"
    """The model to train: a folder, a hub id, or the built-in `toy-student`."""
    dataset_name: str = ""
    """A folder that `export` wrote, a JSONL or Parquet file, or a hub id. Its columns are `prompt`
    and `completion` (texts or message lists), or `input_ids` and `labels`."""
    output_dir: str = "outputs/sft"
    """Folder of the trained model, with a folder `checkpoint-STEP` for every checkpoint."""
    model_revision: str | None = None
    """Branch, tag or commit of a model from the hub."""
    dataset_config: str | None = None
    """Subset of the dataset (its config name)."""
    dataset_train_split: str = "train"
    """Split to train on."""
    dataset_test_split: str = "validation"
    """Split of the losses that `--eval_strategy steps` or `epoch` asks for."""
    learning_rate: float = 2e-5
    """Largest learning rate of AdamW."""
    num_train_epochs: float = 3.0
    """Passes over the dataset."""
    per_device_train_batch_size: int = 8
    """Examples per process and forward pass."""
    gradient_accumulation_steps: int = 1
    """Forward passes per update."""
    max_length: int | None = None
    """Most tokens of an example; longer ones are refused (see --allow_cut). Unset: the longest
    example, up to the model's context. With --packing the length of a block."""
    allow_cut: bool = False
    """Cut the end of examples longer than --max_length instead of refusing them."""
    packing: bool = False
    """Fill blocks of --max_length tokens with whole examples, which do not see each other."""
    completion_only_loss: bool = True
    """Loss on the completions only. Data for which that cannot be done is refused."""
    gradient_checkpointing: bool | None = None
    """Compute activations again in the backward pass, which saves memory. Unset: on a GPU."""
    eos_token: str | None = None
    """Token that ends a text, such as `<|im_end|>`. Unset: the tokenizer's own."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Precision of the weights. auto: float32, with bfloat16 arithmetic on a GPU that has it; with
    --use_peft on a GPU bfloat16, because only the adapter is trained."""
    attn_implementation: str | None = None
    """Attention of Transformers, such as `flash_attention_2`."""
    use_liger_kernel: bool = False
    """Liger's kernels for the layers (needs liger-kernel and a GPU)."""
    fsdp: str = ""
    """Shard weights, gradients and optimizer over the processes: `full_shard`, `shard_grad_op`,
    with `offload` also to the CPU. `auto_wrap` is always on."""
    num_processes: int | Literal["auto"] = "auto"
    """Processes on this machine; above 1 torchrun is started. auto: one for every visible GPU."""
    use_cpu: bool = False
    """Train on the CPU though there is a GPU."""
    save_steps: float = 0.1
    """Updates between two checkpoints; below 1 a share of all updates."""
    save_total_limit: int | None = None
    """Keep only the newest n checkpoints."""
    report_to: str = "none"
    """Trackers, such as `wandb` or `tensorboard`."""
    use_peft: bool = False
    """Train a LoRA adapter (peft) instead of all weights."""
    lora_r: int = 16
    """Rank of the adapter."""
    lora_alpha: int = 32
    """Scale of the adapter, over its rank."""
    lora_dropout: float = 0.0
    """Dropout of the adapter's input."""
    lora_target_modules: str = "all-linear"
    """Layers that get an adapter: names separated by commas, or `all-linear`."""
    seed: int = 42
    """Of the order of the examples and of new weights."""
    check_prompts: int = 4
    """After training, completions drawn from the saved model to see whether they end; 0: none."""
    trust_remote_code: bool = False
    """Run Python code that comes with a model. Off unless you have read that code."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("model_name_or_path", "output_dir"):
            self._check_path(name)
        if not self.dataset_name:
            raise ConfigError("name the data to train on: --dataset_name FOLDER, FILE or hub id")
        self._check_range("per_device_train_batch_size gradient_accumulation_steps lora_r", 1)
        self._check_range("max_length save_total_limit", 1)
        self._check_range("learning_rate num_train_epochs save_steps lora_alpha", 0, above=True)
        self._check_range("check_prompts", 0)
        if self.num_processes != "auto":
            self._check_range("num_processes", 1)
        if self.packing and self.max_length is None:
            raise ConfigError("--packing needs --max_length: the tokens of a block")
        unknown = {*self.fsdp.split()} - {"full_shard", "shard_grad_op", "offload", "auto_wrap"}
        if unknown:
            raise ConfigError(
                f"--fsdp has the unknown part {sorted(unknown)[0]!r}; "
                "it is full_shard or shard_grad_op, and offload"
            )


def sft_names() -> list[str]:
    """Names of the fields of `SftOptions`."""
    return [item.name for item in fields(SftOptions)]


def parse_sft(arguments: Sequence[str], program: str) -> tuple[SftOptions, dict[str, Any]]:
    """The options of a command line, and those for TRL's SFTConfig by name.

    Raises ConfigError, and SystemExit(2) for a value that an option cannot have.
    """
    import tyro

    options, rest = tyro.cli(
        SftOptions,
        prog=program,
        args=list(_plain(arguments)),
        config=(tyro.conf.OmitArgPrefixes,),
        return_unknown_args=True,
    )
    return options, trl_options(rest) if rest else {}


def _plain(arguments: Sequence[str]) -> Iterator[str]:
    """The forms that TRL's parser takes in the form of ours: `--packing False` is `--no-packing`.

    A bare `--fsdp` is `--fsdp full_shard`.
    """
    hints = get_type_hints(SftOptions)
    waiting = list(arguments)
    while waiting:
        name, equals, value = waiting.pop(0).partition("=")
        key = name.removeprefix("--").replace("-", "_")
        key = _ALIASES.get(key, key)
        if not name.startswith("--") or key not in hints:
            yield name + equals + value
            continue
        has_next = bool(waiting) and not waiting[0].startswith("--")
        if not equals and has_next and (hints[key] is not bool or waiting[0].lower() in _TRUTH):
            value, equals = waiting.pop(0), "="
        yield _flag(key, value if equals else None, hints[key])


def _flag(name: str, value: str | None, hint: Any) -> str:
    """One option as tyro takes it."""
    if hint is bool and value is not None:
        if value.lower() not in _TRUTH:
            raise ConfigError(f"--{name} must be true or false, got {value!r}")
        return f"--{name}" if _TRUTH[value.lower()] else f"--no-{name}"
    if hint == (bool | None):
        return f"--{name}={_TRUTH.get((value or 'true').lower(), value)}"
    if name == "fsdp":
        return f"--fsdp={value or 'full_shard'}"
    return f"--{name}" if value is None else f"--{name}={value}"


def trl_options(arguments: Sequence[str]) -> dict[str, Any]:
    """Options of TRL's SFTConfig by name. Raises ConfigError for what it does not have."""
    from optimal_sampling.train.launch import import_trl

    import_trl()
    from transformers import HfArgumentParser
    from trl import SFTConfig

    class Parser(HfArgumentParser):  # type: ignore[misc]
        def error(self, message: str) -> Any:
            raise ConfigError(f"{message} (an option of TRL's SFTConfig)")

    parser = Parser(SFTConfig, add_help=False, allow_abbrev=False)
    values, rest = parser.parse_known_args(arguments)
    if rest:
        known = [*sft_names(), *(item.name for item in fields(SFTConfig))]
        name = rest[0].partition("=")[0]
        near = did_you_mean(name.removeprefix("--").replace("-", "_"), known)
        raise ConfigError(f"unknown option {name!r}{near}; see optimal-sampling sft --help")
    typed = {word.partition("=")[0].removeprefix("--").replace("-", "_") for word in arguments}
    return _given(vars(values), typed)


def _given(values: Mapping[str, Any], typed: set[str]) -> dict[str, Any]:
    """The values of the options that were typed; `--no_x` is the option `x`."""
    return {name: value for name, value in values.items() if {name, f"no_{name}"} & typed}
