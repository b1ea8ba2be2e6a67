"""A folder or hub id -> a model that our forward pass can run, or an error that says why not.

Transformers accepts an attention function for every architecture, but some never call it, or call
it in some layers only, and then generate plausible nonsense. So each model is tried once against
its own stock forward pass.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from optimal_sampling.config import LocalOptions, ModelConfig
from optimal_sampling.engines.device import resolve_device, resolve_dtype
from optimal_sampling.engines.local import attention
from optimal_sampling.engines.local.layers import PLAIN, fuse_norms, measured_rules, replace_linears
from optimal_sampling.engines.local.model_check import (
    SmallCopy,
    call_problem,
    check_small_copy,
    reason_of,
)
from optimal_sampling.engines.local.paged.attention_backends import (
    Backend,
    Choice,
    choose_backend,
)
from optimal_sampling.engines.local.paged.fused_decoder import unfused_reason
from optimal_sampling.engines.local.paged.page_manager import PAGE
from optimal_sampling.engines.local.paged.page_runner import PageRunner
from optimal_sampling.engines.local.rotary import split_by_row
from optimal_sampling.engines.local.runner import ModelRunner
from optimal_sampling.engines.local.scheduler import Chunk
from optimal_sampling.engines.local.shrinking import text_model
from optimal_sampling.engines.local.slots.slot_runner import SlotRunner
from optimal_sampling.engines.local.stock_runner import MEASURED_ROWS, Batching, StockRunner
from optimal_sampling.engines.local.weights import check_weights, merge_adapter, takes_adapter
from optimal_sampling.errors import MissingDependencyError, ModelError
from optimal_sampling.vocabulary.model_folder import check_weight_files

__all__ = ["check_architecture", "load_model", "prepare_pair"]

TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.02}
"""Largest accepted difference to the stock forward pass, relative to the largest logit."""
OWN_CACHE_ROWS: dict[Batching, str] = {
    "padded": "all rows in one batch",
    "merged": "rows start with those of their length and go on in one batch",
    "by_length": "rows of one length together, others one at a time",
    "single": "as rows in a batch have other logits, one at a time",
}
"""What the line on attention says of a model with its own cache."""


def load_model(
    path: str, config: ModelConfig, role: str, load_kwargs: dict[str, Any] | None = None
) -> Any:
    """Load one model for inference, from safetensors only. Errors name the `role`.

    Raises ModelError, MissingDependencyError.
    """
    from transformers import AutoConfig
    from transformers.utils import logging

    logging.disable_progress_bar()  # of tensors; it would tear the display of the job
    device = resolve_device(config.device)
    kwargs: dict[str, Any] = {
        "dtype": resolve_dtype(config.dtype, device),
        "trust_remote_code": config.trust_remote_code,
        "use_safetensors": True,
        **(load_kwargs or {}),
    }
    if config.load_in_4bit:
        kwargs["quantization_config"] = _four_bit(kwargs)
    if "quantization_config" in kwargs:
        kwargs.setdefault("device_map", {"": device})
    name = f"the {role} model {path!r}"
    check_weight_files(name, Path(path))
    adapted = takes_adapter(path, name)
    if adapted:  # it is added once the model itself has been checked
        kwargs["adapter_kwargs"] = {"subfolder": "none"}
    try:
        settings = AutoConfig.from_pretrained(path, trust_remote_code=config.trust_remote_code)
        settings._attn_implementation = None  # what the file names need not be installed
        model_class, reads_images = _model_class(settings)
        model, info = model_class.from_pretrained(
            path, config=settings, output_loading_info=True, **kwargs
        )
    except Exception as error:  # every architecture and every broken folder has errors of its own
        lines = [line for line in str(error).splitlines() if line.strip()]
        first = lines[0] if lines else type(error).__name__
        raise ModelError(f"{name} could not be loaded: {first}") from error
    check_weights(model, info, name, config.allow_unused_weights)
    if adapted:
        merge_adapter(model, path, name)
    if reads_images:
        _keep_language_model(model)
    if "quantization_config" not in kwargs:
        model = model.to(device)
    return model.eval().requires_grad_(False)


def _model_class(config: Any) -> tuple[Any, bool]:
    """The class to load a model with, and whether it reads images beside text.

    It does where Transformers has no class without the image encoder, and generates token by token.
    """
    from transformers import (
        MODEL_FOR_CAUSAL_LM_MAPPING,
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
        AutoModelForCausalLM,
        GenerationMixin,
    )

    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        found = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING.get(type(config), None)
        if getattr(found, "generate", None) is GenerationMixin.generate:
            return found, True
    return AutoModelForCausalLM, False


def _keep_language_model(model: Any) -> None:
    """Free the encoders of images, which prompts of text do not use."""
    language_model = model.get_decoder()
    for name, part in list(model.base_model.named_children()):
        if part is not language_model:
            setattr(model.base_model, name, None)


def _four_bit(kwargs: dict[str, Any]) -> Any:
    try:
        import bitsandbytes  # noqa: F401 - Transformers asks for it late and less clearly
    except ImportError as error:
        message = "load_in_4bit needs: pip install 'bitsandbytes>=0.48' 'accelerate>=1.10'"
        raise MissingDependencyError(message) from error
    from transformers import BitsAndBytesConfig

    options = {name: kwargs.pop(name) for name in list(kwargs) if name.startswith("bnb_4bit_")}
    return BitsAndBytesConfig(load_in_4bit=True, **options)


def prepare_pair(
    models: dict[str, Any], vocab_size: int, options: LocalOptions
) -> tuple[dict[str, ModelRunner[Any]], str]:
    """Runners of models by role, and a line that says which attention runs, and why.

    The same object twice is prepared once. Flash Attention over pages for all models, or for none.
    Raises ModelError, ConfigError, MissingDependencyError.
    """
    shared = models.get("student") is models.get("teacher")
    distinct = {role: model for role, model in models.items() if not (shared and role == "student")}
    runners: dict[str, ModelRunner[Any]] = {}
    probes: dict[str, Probe] = {}
    notes = []
    for role, model in distinct.items():
        try:
            probes[role] = check_architecture(model, role)
        except ModelError as error:
            if options.attention != "auto":
                message = f"{error}; it would be sampled wrongly, so it is refused"
                raise ModelError(message) from error
            runners[role], note = _stock_runner(model, vocab_size, role, options, error)
            notes.append(note)
    distinct = {role: model for role, model in distinct.items() if role not in runners}
    choices = {
        role: _choose(model, role, probes[role], options) for role, model in distinct.items()
    }
    backends = [choice.backend for choice in choices.values()] + [None] * len(runners)
    for role, model in distinct.items():
        backend, probe = choices[role].backend, probes[role]
        if backend is not None and None not in backends:
            fused = choices[role].fused
            runners[role] = PageRunner(model, vocab_size, probe.bytes_per_token, backend, fused)
        else:
            runners[role] = _slot_runner(model, vocab_size, options.batch_invariant, probe)
    without = [role for role, choice in choices.items() if choice.backend is None]
    for decisive in list(without or choices)[:1]:
        mixed = len(set(backends)) > 1 or len(runners) > len(choices)
        notes.append(choices[decisive].note + (f" (the {decisive} model)" if mixed else ""))
    runners = {role: runners[role if role in runners else "teacher"] for role in models}
    return runners, "; ".join(notes)


def _stock_runner(
    model: Any, vocab_size: int, role: str, options: LocalOptions, why: ModelError
) -> tuple[StockRunner, str]:
    """The model with its own cache, checked on a small copy, and what that costs.

    Raises ModelError.
    """
    try:
        small = SmallCopy(*text_model(type(model), model.config), role)
        batching = small.check_own_cache()
    except ModelError as error:
        message = f"{why}; and it cannot run with its own cache: {error}; refused"
        raise ModelError(message) from error
    model.set_attn_implementation(small.attention)
    rows = OWN_CACHE_ROWS[batching]
    if batching != "single" and options.batch_invariant and _measures_shapes(model):
        batching, rows = "single", "for the same bits in any batch one row at a time"
    runner = StockRunner(model, vocab_size, batching)
    if runner.merges and not runner.sharing_error() <= TOLERANCE.get(model.dtype, 0.1):
        runner.batching = "by_length"
        rows = OWN_CACHE_ROWS["by_length"]
    if not runner.merges:
        slower = f"{runner.slowdown():.1f} times slower than {MEASURED_ROWS} rows in one batch"
        rows += f", about {slower}"
    note = f"the {role} model runs with the model's own cache: lockstep, {rows}, as {why}"
    return runner, note


@dataclass(frozen=True, slots=True, eq=False)
class _Chosen:
    """Attention for one model, and whether its layers run fused over pages."""

    attention: Choice
    fused: bool = False

    @property
    def backend(self) -> Backend | None:
        return self.attention.backend

    @property
    def note(self) -> str:
        return self.attention.note


def _choose(model: Any, role: str, probe: Probe, options: LocalOptions) -> _Chosen:
    """The attention backend for one model, tried on it; with fused layers first."""
    asked = options.attention
    choice = choose_backend(asked, model.device, model.dtype, probe.head_dims, probe.needs)
    if choice.backend is None:
        return _Chosen(choice)
    reason = unfused_reason(model) if options.fused_layers else "as asked"
    if not reason:
        try:
            check_architecture(model, role, choice.backend, fused=True)
            return _Chosen(replace(choice, note=f"{choice.note}, fused layers"), fused=True)
        except ModelError as error:
            reason = f"they failed their check, as {error}"
    try:
        check_architecture(model, role, choice.backend)
    except ModelError as error:
        if asked != "auto":
            raise
        note = f"PyTorch SDPA: Flash Attention failed its check, as {error}"
        return _Chosen(Choice(None, note))
    return _Chosen(replace(choice, note=f"{choice.note}, layers not fused: {reason}"))


def _slot_runner(model: Any, vocab_size: int, batch_invariant: bool, probe: Probe) -> SlotRunner:
    rules = PLAIN
    if batch_invariant and _measures_shapes(model):
        replace_linears(model)
        rules = measured_rules(model, probe.head_dims)
    return SlotRunner(model, vocab_size, probe.bytes_per_token, rules)


def _measures_shapes(model: Any) -> bool:
    """Whether `batch_invariant` can be kept: its kernels' shapes are known."""
    return bool(model.device.type == "cpu" and model.dtype == torch.float32)


@dataclass(frozen=True, slots=True)
class Probe:
    """What a model showed when it was tried."""

    bytes_per_token: int
    """Of the KV cache."""
    head_dims: set[int]
    needs: set[str]
    """Features of attention beyond grouped heads and windows."""


def check_architecture(
    model: Any, role: str, backend: Backend | None = None, fused: bool = False
) -> Probe:
    """Compare our forward pass, over slots or with a backend over pages, with the stock one.

    The model is left with our attention function plugged in, and its norms fused. Raises
    ModelError where logits differ.
    """
    attention.register()
    name = f"the {role} model is a {type(model).__name__}"
    config = model.config.get_text_config()
    ids = torch.arange(5, 24) % config.vocab_size
    try:
        stock = _stock_logits(model, ids)
        model.set_attn_implementation(attention.NAME)
        fuse_norms(model)
        split_by_row(model)
        ours, called, probe = _two_chunks(model, ids, stock.shape[-1], backend, fused)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # every architecture has errors of its own
        message = f"{name}, which the local engine cannot run: {reason_of(error)}"
        raise ModelError(message) from error
    if problem := call_problem(called, config):
        raise ModelError(f"{name}, which {problem}")
    difference = (ours - stock).abs().max().item()
    allowed = TOLERANCE.get(model.dtype, 0.1) * max(1.0, stock.abs().max().item())
    if not difference <= allowed and stock.isfinite().all():
        raise ModelError(
            f"{name}, whose logits differ by {difference:.3g} from its own forward pass "
            f"(allowed: {allowed:.3g})"
        )
    check_small_copy(model, role)
    return probe


@torch.inference_mode()
def _stock_logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """Float32 logits [8, vocab] of the model's own forward pass at the last 8 tokens."""
    model.set_attn_implementation("eager")
    logits: torch.Tensor = model(input_ids=ids[None].to(model.device), use_cache=False).logits
    return logits[0, -8:].float()


def _two_chunks(
    model: Any, ids: torch.Tensor, vocab: int, backend: Backend | None, fused: bool
) -> tuple[torch.Tensor, list[int], Probe]:
    """The text in three forward passes in row 1, beside another text in row 0.

    Returns logits of its last 8 tokens, the layers that called the attention function, and facts.
    """
    runner: ModelRunner[Any] = SlotRunner(model, vocab)
    if backend is not None:
        runner = PageRunner(model, vocab, 0, backend, fused)
        runner.new_recorder = None  # a recorded pass does not tell which layers it called
    cache = runner.open_cache((0,), tokens=3 * PAGE, sequences=2)
    cache.make_room(np.array([[64], [64]]), 0)
    text, other = ids.tolist(), ids.flip(0).tolist()
    nothing = torch.tensor([[0], [0]]).to(model.device)
    runner.forward(cache, nothing, np.array([0, 0]), (0, 1), [Chunk(1, 0, text[:5])])
    chunks = [Chunk(0, 0, other[:3]), Chunk(1, 5, text[5:11])]
    last = torch.tensor([other[3:11], text[11:19]]).to(model.device)
    logits, _, plan = runner.forward(cache, last, np.array([3, 11]), (), chunks)
    called, needs = (plan.layers_called, plan.needs) if plan else ([], set())
    probe = Probe(cache.bytes_per_token, cache.head_dims, needs)
    return logits[1].float(), called, probe
