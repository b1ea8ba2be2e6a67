"""What memory alone allows: bytes that a token has to read, over the bandwidth measured on this machine."""

from __future__ import annotations

import time
from typing import Any

import torch

from optimal_sampling.engines.local.engine import LocalEngine
from optimal_sampling.engines.local.shapes import PackedLinear

__all__ = ["lockstep_bound", "memory_bandwidth", "weight_bytes"]

MEBIBYTES = {"cpu": 512, "cuda": 2048}
"""Size of what is read and copied: far more than caches hold."""


def memory_bandwidth(device: torch.device, mebibytes: int | None = None) -> float:
    """Bytes per second: the faster of a large copy (bytes read and written) and a large sum, best of 5."""
    count = (mebibytes or MEBIBYTES[device.type]) * 2**20 // 4
    source = torch.ones(count, device=device)
    target = torch.empty_like(source)
    copy = min(_seconds(device, lambda: target.copy_(source)) for _ in range(5))
    read = min(_seconds(device, source.sum) for _ in range(5))
    return max(2 * 4 * count / copy, 4 * count / read)


def _seconds(device: torch.device, work: Any) -> float:
    _synchronise(device)
    started = time.perf_counter()
    work()
    _synchronise(device)
    return time.perf_counter() - started


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def weight_bytes(model: Any) -> int:
    """Bytes of the weights that a forward pass reads: all but an embedding that is only looked up."""
    embedding = model.get_input_embeddings().weight
    output = model.get_output_embeddings()
    read = {id(p): p for p in model.parameters() if p is not embedding}
    if getattr(output, "weight", None) is embedding:
        read[id(embedding)] = embedding
    packed = [m for m in model.modules() if isinstance(m, PackedLinear)]
    plain = sum(p.numel() * p.element_size() for p in read.values())
    return int(plain + sum(4 * m.in_features * m.out_features for m in packed))


def lockstep_bound(engine: LocalEngine, batch: int, cached: float, bandwidth: float) -> float:
    """Most tokens per second of lockstep decoding with `batch` rows and `cached` tokens in each cache, on average.

    Every round reads both models' weights (once where they are the same) and both contexts' caches.
    """
    runners = [engine.pair.runners[role] for role in engine.roles]
    weights = sum({id(r): weight_bytes(r.model) for r in runners}.values())
    caches = batch * cached * sum(r.bytes_per_token for r in runners)
    return batch * bandwidth / (weights + caches)
