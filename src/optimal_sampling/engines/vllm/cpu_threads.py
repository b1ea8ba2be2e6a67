"""Number of threads on a CPU. vLLM takes all cores, and waits long where some of them are busy."""

from __future__ import annotations

import os

__all__ = ["choose_threads", "idle_threads"]

_CHOSEN_BY_USER = frozenset({"OMP_NUM_THREADS", "VLLM_CPU_OMP_THREADS_BIND"})


def choose_threads(devices: int) -> str:
    """Leave busy cores of a CPU alone, where the environment does not say how many threads.

    Returns a note, "" where vLLM's own choice is kept: on a GPU and on an idle machine.
    """
    import torch
    from vllm.platforms import current_platform

    if not current_platform.is_cpu() or _CHOSEN_BY_USER & os.environ.keys():
        return ""
    cores = len(os.sched_getaffinity(0))
    busy = min(cores, round(os.getloadavg()[0]))
    if not busy:
        return ""
    threads = idle_threads(cores, busy, devices)
    os.environ["OMP_NUM_THREADS"] = str(threads)
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"  # to cores that may be the busy ones
    torch.set_num_threads(threads)
    return (
        f"{threads} of {cores} cores for each device, because {busy} were busy; "
        "the environment variable OMP_NUM_THREADS sets another number"
    )


def idle_threads(cores: int, busy: int, devices: int) -> int:
    """Threads of each of `devices` processes on the cores that are not busy; at least one."""
    return max(1, (cores - busy) // devices)
