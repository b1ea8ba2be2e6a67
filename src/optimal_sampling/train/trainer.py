"""TRL's SFTTrainer (1.16) with our settings: checks on the data, checkpoints, a stop on Ctrl-C."""

from __future__ import annotations

import contextlib
import copy
import signal
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from peft import LoraConfig
from safetensors import SafetensorError
from transformers import TrainerCallback
from trl import SFTConfig, SFTTrainer

from optimal_sampling.config import expand_user
from optimal_sampling.errors import ConfigError, EngineError, MissingDependencyError, StorageError
from optimal_sampling.train.launch import is_launched
from optimal_sampling.train.options import SftOptions

__all__ = ["StopOnSignal", "StudentTrainer", "failures", "lora_config", "sft_config"]

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_PICKLED = "training_args.bin"
_WRITER = ("inline_container", "PytorchStreamWriter")
"""Parts of the messages with which torch.save says that it could not write."""
_SAME = (
    "learning_rate",
    "num_train_epochs",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "max_length",
    "packing",
    "completion_only_loss",
    "eos_token",
    "save_steps",
    "save_total_limit",
    "report_to",
    "seed",
    "trust_remote_code",
)
"""Options that go to SFTConfig as they are."""


def sft_config(options: SftOptions, trl: Mapping[str, Any]) -> Any:
    """TRL's config of these options; `trl` holds more of its own options by name.

    Raises ConfigError where TRL or Transformers refuse a value.
    """
    on_gpu = torch.cuda.is_available() and not options.use_cpu
    recompute = options.gradient_checkpointing
    values: dict[str, Any] = {name: getattr(options, name) for name in _SAME}
    values |= {
        "output_dir": str(expand_user(options.output_dir)),
        "use_cpu": not on_gpu,
        "bf16": on_gpu and torch.cuda.is_bf16_supported(),
        "gradient_checkpointing": on_gpu if recompute is None else recompute,
        "disable_tqdm": True,
        "logging_steps": 1,
        "dataloader_pin_memory": on_gpu,
        "ddp_find_unused_parameters": False,
        "use_liger_kernel": _liger(options, on_gpu),
        "model_init_kwargs": _loading(options, on_gpu),
        **_sharding(options),
    }
    if values.get("fsdp") and values["gradient_checkpointing"]:
        values["fsdp_config"]["activation_checkpointing"] = True
        values["gradient_checkpointing"] = False
    try:
        config = SFTConfig(**values | dict(trl))
    except (ValueError, TypeError, ImportError) as error:
        raise ConfigError(f"TRL refuses these options: {error}") from error
    if config.fsdp and config.use_cpu:
        # Accelerate shards on GPUs only, and would train replicas in silence
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    return config


def _loading(options: SftOptions, on_gpu: bool) -> dict[str, Any]:
    """Arguments of `from_pretrained`."""
    dtype = options.dtype
    if dtype == "auto":
        dtype = "bfloat16" if options.use_peft and on_gpu else "float32"
    return {
        "dtype": dtype,
        "revision": options.model_revision or "main",
        "attn_implementation": options.attn_implementation,
        "use_safetensors": True,
    }


def _liger(options: SftOptions, on_gpu: bool) -> bool:
    if not options.use_liger_kernel or not on_gpu:
        return False
    from transformers.utils import is_liger_kernel_available

    if not is_liger_kernel_available():
        raise MissingDependencyError("--use_liger_kernel needs: pip install liger-kernel")
    return True


def _sharding(options: SftOptions) -> dict[str, Any]:
    """FSDP, which needs several processes; one process has nothing to shard with."""
    if not options.fsdp or not is_launched():
        return {}
    parts = options.fsdp.split()
    config = {
        "reshard_after_forward": "shard_grad_op" not in parts,
        "cpu_offload": "offload" in parts,
    }
    return {"fsdp": True, "fsdp_config": config}


def lora_config(options: SftOptions) -> Any:
    """The adapter to train; None without --use_peft."""
    if not options.use_peft:
        return None
    targets = [name.strip() for name in options.lora_target_modules.split(",")]
    return LoraConfig(
        r=options.lora_r,
        lora_alpha=options.lora_alpha,
        lora_dropout=options.lora_dropout,
        target_modules=targets[0] if targets == ["all-linear"] else targets,
        task_type="CAUSAL_LM",
    )


@contextlib.contextmanager
def failures(folder: Path) -> Iterator[None]:
    """Failures of the disk and of the GPU's memory as StorageError and EngineError."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise EngineError(
            "the GPU's memory is full: halve --per_device_train_batch_size and double "
            "--gradient_accumulation_steps, which trains the same, or say "
            "--gradient_checkpointing, and with several GPUs --fsdp full_shard"
        ) from error
    except (OSError, SafetensorError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        if isinstance(error, RuntimeError) and not any(mark in reason for mark in _WRITER):
            raise
        raise StorageError(
            f"could not write below {folder}: {reason}. Free some space and run the same command "
            "again; it goes on from the last complete checkpoint"
        ) from error


class StudentTrainer(SFTTrainer):  # type: ignore[misc]
    """`check` is called with the prepared dataset before anything is cut or packed."""

    def __init__(self, *args: Any, check: Callable[[Any], None], **kwargs: Any) -> None:
        self._check = check
        super().__init__(*args, **kwargs)

    def _prepare_dataset(
        self, dataset: Any, processing_class: Any, args: Any, packing: bool, *rest: Any
    ) -> Any:
        whole_args = copy.copy(args)
        whole_args.max_length, whole_args.shuffle_dataset = None, False
        whole = super()._prepare_dataset(dataset, processing_class, whole_args, False, *rest)
        self._check(whole)
        return super()._prepare_dataset(whole, processing_class, args, packing, *rest)

    def _save_rng_state(self, output_dir: str) -> None:
        """The state of every process, before the main process writes that of the trainer."""
        super()._save_rng_state(output_dir)
        self.accelerator.wait_for_everyone()

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """Without the pickled arguments, which nothing here reads."""
        super()._save(output_dir, state_dict)
        if self.args.should_save:
            (Path(output_dir or self.args.output_dir) / _PICKLED).unlink(missing_ok=True)


class StopOnSignal(TrainerCallback):  # type: ignore[misc]
    """Ctrl-C and SIGTERM: finish the update, save a checkpoint, stop. A second one ends at once.

    Several processes stop after the same update. torchrun passes a signal on, so that there a
    second one is no wish of the user.
    """

    def __init__(self) -> None:
        self.stopped = False
        self._asked = False
        self._before: dict[int, Any] = {}

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self._asked = True
        if not is_launched():
            for each in _SIGNALS:
                signal.signal(each, signal.SIG_DFL)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take the signals."""
        with contextlib.suppress(ValueError):  # signals belong to the main thread
            self._before = {number: signal.signal(number, self._ask) for number in _SIGNALS}

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Save and stop, where any process was asked to."""
        asked = self._asked
        if args.world_size > 1:
            votes = torch.tensor(int(asked), device=args.device)
            torch.distributed.all_reduce(votes)
            asked = bool(votes.item())
        if asked and state.global_step < state.max_steps:
            self.stopped = control.should_save = control.should_training_stop = True

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Give the signals back."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
