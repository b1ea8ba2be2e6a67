"""Where and with what a figure was measured."""

from __future__ import annotations

import platform
import subprocess
from datetime import date
from typing import Any

import psutil

from optimal_sampling import __version__
from optimal_sampling.config import ModelConfig

__all__ = ["hardware"]


def hardware(models: ModelConfig | None = None) -> dict[str, Any]:
    """Processor, versions, load, date; and the GPU, where the models are on one."""
    import torch
    import transformers

    return {
        "processor": _processor(),
        "cores": psutil.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": [round(x, 1) for x in psutil.getloadavg()],
        **_gpu(models or ModelConfig()),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "optimal_sampling": __version__,
        "date": date.today().isoformat(),
    }


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            return next(
                line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")
            )
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _gpu(models: ModelConfig) -> dict[str, Any]:
    import torch

    from optimal_sampling.engines.device import resolve_device

    device = resolve_device(models.device)
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
        found = subprocess.run(
            command, capture_output=True, text=True, timeout=30, check=True
        ).stdout.split()
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return found[0] if found else "unknown"
