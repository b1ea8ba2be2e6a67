"""Where the workers on this machine run: GPUs, or shares of the CPU's threads and memory."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field

import psutil

from optimal_sampling.config import EngineOptions, FleetConfig, ModelConfig
from optimal_sampling.errors import ConfigError

__all__ = [
    "CPU_THREADS",
    "Place",
    "places",
    "refuse_one_gpu",
    "threads",
    "visible_gpus",
]

CPU_THREADS = 4  # of a worker on a CPU, where `auto` chooses


@dataclass(frozen=True)
class Place:
    """Where a worker runs."""

    device: str
    """As it is shown."""
    environment: dict[str, str] = field(default_factory=dict)
    """Variables of its process, which are there before torch is imported."""
    memory: int | None = None
    """Bytes of the host's memory that it may fill; None on a GPU."""
    sharing: int = 1
    """Workers that a given budget of caches is divided among."""


def visible_gpus(environment: Mapping[str, str] | None = None) -> list[str]:
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them (index or UUID)."""
    import torch

    count = torch.cuda.device_count()
    preset = (os.environ if environment is None else environment).get("CUDA_VISIBLE_DEVICES")
    names = [str(i) for i in range(count)] if preset is None else preset.split(",")
    return [name.strip() for name in names[:count]]


def places(
    fleet: FleetConfig,
    models: ModelConfig,
    options: EngineOptions,
    gpus: list[str] | None = None,
) -> list[Place]:
    """One place per worker. Raises ConfigError.

    `gpus`: those of this machine, where they are known.
    """
    refuse_one_gpu(models)
    uses_gpus = options.loads_models and models.device != "cpu"
    found = (visible_gpus() if gpus is None else gpus) if uses_gpus else []
    if models.device == "cuda" and not found:
        raise ConfigError("device 'cuda' was asked for, but PyTorch finds no CUDA GPU here")
    return _on_gpus(fleet, options, found) if found else _on_cpu(fleet)


def refuse_one_gpu(models: ModelConfig) -> None:
    """Raise ConfigError for a device that only one worker could have."""
    if models.device.startswith("cuda:"):
        raise ConfigError(
            f"device {models.device!r} names one GPU, and a fleet gives each worker its own: use "
            "--device cuda, and CUDA_VISIBLE_DEVICES to leave GPUs out"
        )


def _on_gpus(fleet: FleetConfig, options: EngineOptions, gpus: list[str]) -> list[Place]:
    each = gpus_per_worker(fleet, options)
    most = len(gpus) // each
    count = most if fleet.workers == "auto" else int(fleet.workers or 1)
    if count > most or not most:
        raise ConfigError(
            f"{max(count, 1)} workers with {each} GPU{'s' if each > 1 else ''} each need "
            f"{max(count, 1) * each} GPUs, and {len(gpus)} are visible ({', '.join(gpus)}): use "
            f"--workers {most}" + ("" if most else ", or fewer --gpus-per-worker")
        )
    share = {"OMP_NUM_THREADS": str(max(1, threads() // count))}
    groups = [gpus[i * each : (i + 1) * each] for i in range(count)]
    return [
        Place(f"GPU {','.join(group)}", {"CUDA_VISIBLE_DEVICES": ",".join(group), **share})
        for group in groups
    ]


def gpus_per_worker(fleet: FleetConfig, options: EngineOptions) -> int:
    """GPUs of each worker that is a process. Raises ConfigError for a part of one."""
    if fleet.gpus_per_worker is None:
        return int(getattr(options, "tensor_parallel_size", 1))
    if fleet.gpus_per_worker % 1 or fleet.gpus_per_worker < 1:
        raise ConfigError(
            f"gpus_per_worker {fleet.gpus_per_worker:g} needs --ray: workers that are processes "
            "have whole GPUs"
        )
    return int(fleet.gpus_per_worker)


def _on_cpu(fleet: FleetConfig) -> list[Place]:
    most = threads()
    if fleet.workers == "auto":
        each = int(os.environ.get("OMP_NUM_THREADS") or min(CPU_THREADS, most))
        count = max(1, len(os.sched_getaffinity(0)) // each)
    else:
        count = int(fleet.workers or 1)
    share = max(1, most // count)
    memory = int(psutil.virtual_memory().available) // count
    place = Place(
        f"CPU, {share} thread{'s' if share > 1 else ''}",
        {"OMP_NUM_THREADS": str(share)},
        memory,
        sharing=count,
    )
    return [place] * count


def threads() -> int:
    """Threads to divide: OMP_NUM_THREADS, or the cores that this process may use."""
    given = os.environ.get("OMP_NUM_THREADS", "")
    return int(given) if given.isdecimal() and int(given) else len(os.sched_getaffinity(0))
