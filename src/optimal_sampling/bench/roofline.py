"""What memory alone allows: bytes that a token has to read, over the bandwidth measured on this machine."""

from __future__ import annotations

import time
from typing import Any

import torch

from optimal_sampling.engines.local.engine import LocalEngine

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
    layers = [
        module for module in model.modules() if hasattr(module, "in_features")
    ]  # whatever form they are in
    counted = {id(parameter) for layer in layers for parameter in layer.parameters()}
    counted.add(id(model.get_input_embeddings().weight))
    rest = [p for p in model.parameters() if id(p) not in counted]
    return sum(map(_layer_bytes, layers)) + sum(int(p.numel() * p.element_size()) for p in rest)


def _layer_bytes(layer: Any) -> int:
    """Of a linear layer. Our own forms of it keep float32 weights that are no parameters."""
    parameters = {
        name: p.numel() * p.element_size() for name, p in layer.named_parameters(recurse=False)
    }
    parameters.setdefault("weight", 4 * layer.in_features * layer.out_features)
    return int(sum(parameters.values()))


def lockstep_bound(engine: LocalEngine, batch: int, cached: float, bandwidth: float) -> float:
    """Most tokens per second of lockstep decoding with `batch` rows and `cached` tokens in each cache, on average.

    Every round reads both models' weights (once where they are the same) and both contexts' caches.
    """
    runners = [engine.pair.runners[role] for role in engine.roles]
    weights = sum({id(r): weight_bytes(r.model) for r in runners}.values())
    caches = batch * cached * sum(r.bytes_per_token for r in runners)
    return batch * bandwidth / (weights + caches)
