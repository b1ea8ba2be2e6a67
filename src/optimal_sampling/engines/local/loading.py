"""A folder or hub id -> a model that our forward pass can run, or a refusal that says why.

Transformers accepts an attention function for every architecture, but some never call it, or call it in some layers
only, and then generate plausible nonsense. So each model is tried once against its own stock forward pass.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from optimal_sampling.config import EngineConfig, ModelConfig
from optimal_sampling.engines.local import attention
from optimal_sampling.engines.local.forward import ModelRunner
from optimal_sampling.engines.local.kv_cache import Cache, KVCache
from optimal_sampling.engines.local.model_check import call_problem, check_small_copy, reason_of
from optimal_sampling.engines.local.norms import fuse_norms
from optimal_sampling.engines.local.paged.cache import PagedCache
from optimal_sampling.engines.local.paged.forward import PagedRunner
from optimal_sampling.engines.local.paged.kernels import Choice, Kernel, choose_kernel
from optimal_sampling.engines.local.scheduler import Chunk
from optimal_sampling.engines.local.shapes import PLAIN, measured_rules, replace_linears
from optimal_sampling.errors import ConfigError, MissingDependencyError, ModelError

__all__ = [
    "check_architecture",
    "load_model",
    "prepare",
    "prepare_pair",
    "resolve_device",
    "resolve_dtype",
]

TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.02}
"""Largest accepted difference to the stock forward pass, relative to the largest logit."""


def resolve_device(name: str) -> torch.device:
    """`auto`, `cpu`, `cuda`, `cuda:1` ... Raises ConfigError where it is absent."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"{name!r} is no device; use auto, cpu, cuda or cuda:N") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            f"device {name!r} was asked for, but PyTorch finds no CUDA GPU here; use the device cpu"
        )
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(
            f"device {name!r} was asked for, but there are {torch.cuda.device_count()} GPUs here"
        )
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"device {name!r} is not supported; use auto, cpu, cuda or cuda:N")
    return device


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """`auto` is bfloat16 on a GPU and float32 on a CPU."""
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def load_model(
    path: str, config: ModelConfig, role: str, load_kwargs: dict[str, Any] | None = None
) -> Any:
    """Load one model for inference, from safetensors only. `role` is named in errors.

    Raises ModelError, MissingDependencyError.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()  # of tensors; it says nothing of the job, and tears the job's own display
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
    try:
        model, info = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True, **kwargs)
    except (
        Exception
    ) as error:  # whatever is wrong with a folder, and every architecture has errors of its own
        first = next(
            (line for line in str(error).splitlines() if line.strip()), type(error).__name__
        )
        raise ModelError(f"the {role} model {path!r} could not be loaded: {first}") from error
    absent = sorted({*info["missing_keys"], *(str(key) for key in info["mismatched_keys"])})
    if absent:  # Transformers would go on with random weights
        names = ", ".join(absent[:3]) + (f" and {len(absent) - 3} more" if len(absent) > 3 else "")
        raise ModelError(
            f"the weights of the {role} model {path!r} lack, or have in another shape: {names}"
        )
    if "quantization_config" not in kwargs:
        model = model.to(device)
    return model.eval().requires_grad_(False)


def _four_bit(kwargs: dict[str, Any]) -> Any:
    try:
        import bitsandbytes  # noqa: F401 - Transformers asks for it late and less clearly
    except ImportError as error:
        message = "load_in_4bit needs bitsandbytes: pip install 'optimal-sampling[4bit]'"
        raise MissingDependencyError(message) from error
    from transformers import BitsAndBytesConfig

    options = {name: kwargs.pop(name) for name in list(kwargs) if name.startswith("bnb_4bit_")}
    return BitsAndBytesConfig(load_in_4bit=True, **options)


def prepare(model: Any, vocab_size: int, role: str, batch_invariant: bool) -> ModelRunner:
    """Plug in our attention over slots, check it against the stock forward pass, choose the shapes.

    Raises ModelError.
    """
    return _slot_runner(model, vocab_size, batch_invariant, check_architecture(model, role))


def prepare_pair(
    models: dict[str, Any], vocab_size: int, options: EngineConfig
) -> tuple[dict[str, ModelRunner], str]:
    """Runners of models by role, and a line for people about their attention. The same object twice is prepared once.

    Flash Attention over pages for all of them, or for none. Raises ModelError, ConfigError, MissingDependencyError.
    """
    shared = models.get("student") is models.get("teacher")
    distinct = {role: model for role, model in models.items() if not (shared and role == "student")}
    probes = {role: check_architecture(model, role) for role, model in distinct.items()}
    choices = {
        role: _choose(model, role, probes[role], options.attention)
        for role, model in distinct.items()
    }
    kernels = [choice.kernel for choice in choices.values()]
    runners: dict[str, ModelRunner] = {}
    for role, model in distinct.items():
        kernel = choices[role].kernel
        if kernel is not None and None not in kernels:
            runners[role] = PagedRunner(model, vocab_size, kernel, probes[role].bytes_per_token)
        else:
            runners[role] = _slot_runner(model, vocab_size, options.batch_invariant, probes[role])
    decisive = next(
        (role for role, choice in choices.items() if choice.kernel is None), next(iter(choices))
    )
    note = choices[decisive].note + (
        f" (the {decisive} model)" if None in kernels and len(set(kernels)) > 1 else ""
    )
    return {role: runners[role if role in runners else "teacher"] for role in models}, note


def _choose(model: Any, role: str, probe: Probe, asked: str) -> Choice:
    """The kernel for one model, tried on it."""
    choice = choose_kernel(asked, model.device, model.dtype, probe.head_dims, probe.needs)
    if choice.kernel is not None:
        try:
            check_architecture(model, role, choice.kernel)
        except ModelError as error:
            if asked != "auto":
                raise
            return Choice(None, f"PyTorch SDPA: Flash Attention failed its check, as {error}")
    return choice


def _slot_runner(model: Any, vocab_size: int, batch_invariant: bool, probe: Probe) -> ModelRunner:
    rules = PLAIN
    if batch_invariant and model.device.type == "cpu" and model.dtype == torch.float32:
        replace_linears(model)
        rules = measured_rules(model, probe.head_dims)
    return ModelRunner(model, vocab_size, rules, probe.bytes_per_token)


@dataclass(frozen=True, slots=True)
class Probe:
    """What a model showed when it was tried."""

    layers: int
    bytes_per_token: int
    """Of the KV cache."""
    head_dims: set[int]
    needs: set[str]
    """Features of attention beyond grouped heads and windows."""


def check_architecture(model: Any, role: str, kernel: Kernel | None = None) -> Probe:
    """Raise ModelError unless our forward pass, over slots or with a kernel over pages, gives the stock logits.

    The model is left with our attention function plugged in, and its norms fused.
    """
    attention.register()
    name = type(model).__name__
    config = model.config.get_text_config()
    ids = torch.arange(5, 24) % config.vocab_size
    try:
        with torch.inference_mode():
            model.set_attn_implementation("eager")
            stock = (
                model(input_ids=ids[None].to(model.device), use_cache=False).logits[0, -8:].float()
            )
        model.set_attn_implementation(attention.NAME)
        fuse_norms(model)
        ours, called, probe = _two_chunks(model, ids, stock.shape[-1], kernel)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        raise ModelError(
            f"the {role} model is a {name}, which the local engine cannot run: {reason_of(error)}"
        ) from error
    if problem := call_problem(called, config):
        raise ModelError(f"the {role} model is a {name}, which {problem}; refused")
    difference = (ours - stock).abs().max().item()
    allowed = TOLERANCE.get(model.dtype, 0.1) * max(1.0, stock.abs().max().item())
    if not difference <= allowed and stock.isfinite().all():
        message = (
            f"logits differ by {difference:.3g} from its own forward pass (allowed: {allowed:.3g})"
        )
        raise ModelError(
            f"the {role} model is a {name}, whose {message}; it would be sampled wrongly, so it is refused"
        )
    check_small_copy(model, role)
    return probe


def _probe_runner(model: Any, vocab: int, kernel: Kernel | None) -> tuple[ModelRunner, Cache]:
    if kernel is None:
        slots = KVCache()
        slots.reshape(2, 64)
        return ModelRunner(model, vocab), slots
    pages = PagedCache(2)
    pages.reserve([64, 64])
    return PagedRunner(model, vocab, kernel), pages


def _two_chunks(
    model: Any, ids: torch.Tensor, vocab: int, kernel: Kernel | None
) -> tuple[torch.Tensor, list[int], Probe]:
    """The probe text in three forwards and in row 1, beside another text in row 0; logits of its last 8 tokens."""
    runner, cache = _probe_runner(model, vocab, kernel)
    text, other = ids.tolist(), ids.flip(0).tolist()
    runner.forward(
        cache,
        torch.tensor([[0], [0]]).to(model.device),
        np.array([0, 0]),
        (0, 1),
        [Chunk(1, 0, text[:5])],
    )
    chunks = [Chunk(0, 0, other[:3]), Chunk(1, 5, text[5:11])]
    last = torch.tensor([other[3:11], text[11:19]]).to(model.device)
    logits, plan = runner.forward_with_plan(cache, last, np.array([3, 11]), (), chunks)
    assert plan is not None
    probe = Probe(
        cache.layers, cache.bytes_per_token, cache.head_dims, getattr(plan, "needs", set())
    )
    return logits[1].float(), plan.layers_called, probe
