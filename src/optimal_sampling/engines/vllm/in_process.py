"""State that vLLM keeps once per process, held while any engine of this package in it is open.

vLLM ends its distributed groups and drops its workspace whenever one engine ends, which ends all
others of the process.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

__all__ = ["end_with", "starting"]

_open: set[int] = set()
"""Engines that are starting or open, by `id`."""

_workspaces: list[Any] = []
"""Workspaces of open engines: CUDA graphs have their addresses, and vLLM keeps only the last."""


@contextmanager
def starting() -> Iterator[None]:
    """Hold the state while an engine starts: an older one may be collected meanwhile."""
    from vllm.v1.engine import core
    from vllm.v1.worker import workspace

    for module, name in (
        (core, "cleanup_dist_env_and_memory"),
        (workspace, "reset_workspace_manager"),
    ):
        function = getattr(module, name)
        if not isinstance(function, _Held):
            setattr(module, name, _Held(function))
    engine = object()
    _open.add(id(engine))
    try:
        yield
    finally:
        _open.discard(id(engine))


def end_with(client: Any) -> Callable[[], Any]:
    """What ends the engine of this client of vLLM; called when the client is collected, too."""
    from vllm.v1.engine.core_client import InprocClient
    from vllm.v1.worker import workspace

    if not isinstance(client, InprocClient):
        end: Callable[[], Any] = client.shutdown
        return end
    if workspace.is_workspace_manager_initialized():
        _workspaces.append(workspace.current_workspace_manager())
    core = client.engine_core
    _open.add(id(core))
    client._finalizer.detach()  # vLLM's, which would not say which engine ends
    return weakref.finalize(client, _end, core)


class _Held:
    """A function of vLLM that does nothing while an engine is open."""

    def __init__(self, function: Callable[[], None]) -> None:
        self.function = function

    def __call__(self) -> None:
        if not _open:
            self.function()


def _end(core: Any) -> None:
    """End an engine; with the last one, the state of the process."""
    _open.discard(id(core))
    core.shutdown()
    if not _open:
        _workspaces.clear()
        return
    gc.collect()
    if torch.accelerator.is_available():
        torch.accelerator.empty_cache()
