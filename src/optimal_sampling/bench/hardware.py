"""The machine: its names, its memory bandwidth, and the bound that this sets."""

from __future__ import annotations

import platform
import subprocess
import time
from collections.abc import Callable
from datetime import date
from typing import Any

import psutil
import torch
from torch import Tensor

from optimal_sampling import __version__
from optimal_sampling.config import ModelConfig
from optimal_sampling.engines.device import resolve_device
from optimal_sampling.engines.local.engine import LocalEngine

__all__ = ["hardware", "lockstep_bound", "memory_bandwidth", "weight_bytes"]

MEBIBYTES = {"cpu": 512, "cuda": 2048}
"""Size of what is read and copied: far more than caches hold."""


def hardware(models: ModelConfig) -> dict[str, Any]:
    """Processor, versions, load, date; and the GPU, where the models are on one."""
    import transformers

    return {
        "processor": _processor(),
        "cores": psutil.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": [round(x, 1) for x in psutil.getloadavg()],
        **_gpu(resolve_device(models.device)),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "optimal_sampling": __version__,
        "date": date.today().isoformat(),
    }


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            model = next(line for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
    return model.split(":", 1)[1].strip()


def _gpu(device: torch.device) -> dict[str, Any]:
    if device.type != "cuda":
        return {}
    facts = torch.cuda.get_device_properties(device)
    return {
        "gpu": facts.name,
        "gpu_memory_gib": round(facts.total_memory / 2**30, 1),
        "driver": _driver(),
        "cuda": torch.version.cuda,
    }


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    found = done.stdout.split()
    return found[0] if found else "unknown"


def memory_bandwidth(device: torch.device, mebibytes: int | None = None) -> float:
    """Bytes per second of a large copy (read and written) or sum, the best of 5."""
    count = (mebibytes or MEBIBYTES[device.type]) * 2**20 // 4
    source = torch.ones(count, device=device)
    target = torch.empty_like(source)
    copy = min(_seconds(device, lambda: target.copy_(source)) for _ in range(5))
    read = min(_seconds(device, source.sum) for _ in range(5))
    return max(2 * 4 * count / copy, 4 * count / read)


def _seconds(device: torch.device, work: Callable[[], object]) -> float:
    _synchronise(device)
    started = time.perf_counter()
    work()
    _synchronise(device)
    return time.perf_counter() - started


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def weight_bytes(model: Any) -> int:
    """Bytes of the weights that a forward pass reads; an embedding alone is only looked up."""
    # by attribute, because the engine replaces linear layers by its own forms of them
    layers = [module for module in model.modules() if hasattr(module, "in_features")]
    counted = {id(parameter) for layer in layers for parameter in layer.parameters()}
    counted.add(id(model.get_input_embeddings().weight))
    rest = [p for p in model.parameters() if id(p) not in counted]
    return sum(map(_layer_bytes, layers)) + sum(map(_parameter_bytes, rest))


def _layer_bytes(layer: Any) -> int:
    """Bytes of a linear layer. The engine's own kinds have float32 weights, no parameters."""
    sizes = {
        name: _parameter_bytes(parameter)
        for name, parameter in layer.named_parameters(recurse=False)
    }
    sizes.setdefault("weight", 4 * layer.in_features * layer.out_features)
    return sum(sizes.values())


def _parameter_bytes(parameter: Tensor) -> int:
    return parameter.numel() * parameter.element_size()


def lockstep_bound(engine: LocalEngine, batch: int, cached: float, bandwidth: float) -> float:
    """Most tokens per second of lockstep decoding, with `cached` tokens in each cache on average.

    Every round reads both models' weights (once where they are the same) and both contexts'
    caches, at `bandwidth` bytes per second.
    """
    runners = [engine.pair.runners[role] for role in engine.roles]
    weights = sum({id(r): weight_bytes(r.model) for r in runners}.values())
    caches = batch * cached * sum(r.bytes_per_token for r in runners)
    return batch * bandwidth / (weights + caches)
