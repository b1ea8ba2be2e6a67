"""Kernel launches of a forward pass over pages, per layer, and of a lockstep round. Needs no GPU.

    python benchmarks/gpu/launches.py

Models are run over meta tensors. Every PyTorch operation that is not a view or an allocation is
one launch, and so is every start of a Triton program. PyTorch's Flash Attention counts as one, but
is two where it splits the keys of a row.
"""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "0"

from collections import Counter
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton.runtime.jit import JITFunction

from optimal_sampling.bench.architectures import ARCHITECTURES, Architecture
from optimal_sampling.config import MixtureConfig, ModelConfig
from optimal_sampling.distribution.gpu.launch import fused_step
from optimal_sampling.distribution.mixture import Drawn
from optimal_sampling.distribution.noise import NoiseKeys, scrambled_ids
from optimal_sampling.engines.local import attention
from optimal_sampling.engines.local.layers import fuse_norms
from optimal_sampling.engines.local.paged.attention_backends import Backend, split_or, varlen
from optimal_sampling.engines.local.paged.page_cache import Batch, BatchShape
from optimal_sampling.engines.local.paged.page_manager import PAGE
from optimal_sampling.engines.local.paged.page_runner import PageRunner

ROWS, PAGES, VOCAB = 32, 8, 512
FREE = {"empty", "empty_like", "empty_strided", "new_empty", "_unsafe_view", "detach"}
"""Operations of the names that start no kernel, though they return no view."""
SMALL = {"hidden": 512, "mlp": 512, "vocab": VOCAB, "head_dim": 64, "heads": 8, "kv_heads": 2}


def _is_view(result: object, args: tuple[object, ...]) -> bool:
    """Whether an operation gave memory that it was given."""
    tensors = [x for x in tree_leaves(args) if isinstance(x, torch.Tensor)]
    given = {x.untyped_storage()._cdata for x in tensors}
    made = [x for x in tree_leaves(result) if isinstance(x, torch.Tensor)]
    return bool(made) and all(x.untyped_storage()._cdata in given for x in made)


class Counted(TorchDispatchMode):
    """Counts launches of the code in its block, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.split("::")[1]
        result = func(*args, **(kwargs or {}))
        writes = any(a.alias_info and a.alias_info.is_write for a in func._schema.arguments)
        if name not in FREE and (writes or not _is_view(result, args)):
            self.names[name] += 1
        return result

    @contextmanager
    def of_triton(self):
        """Starts of Triton programs are counted, and not made."""
        started = JITFunction.run

        def count(program, *args, **kwargs):
            self.names[f"triton {program.fn.__name__}"] += 1

        JITFunction.run = count
        try:
            with self:
                yield self
        finally:
            JITFunction.run = started


def runner_of(shape: Architecture, fused: bool) -> PageRunner:
    """A small model of the shape's family over pages, on the meta device."""
    attention.register()
    model = shape.model(ModelConfig(device="cpu", dtype="bfloat16"), 0)
    model.set_attn_implementation(attention.NAME)
    fuse_norms(model)
    return PageRunner(model.to("meta"), VOCAB, 0, _backend(fused), fused)


def _backend(fused: bool) -> Backend:
    """What runs on a GPU; PyTorch's own beside the layers of Transformers."""
    return split_or(varlen) if fused else varlen


@torch.inference_mode()
def launches(runner: PageRunner) -> Counter[str]:
    """Of one decoding pass over ROWS rows."""
    shape = BatchShape(ROWS, ROWS, 1, 512, ROWS)
    ids = torch.zeros(ROWS, dtype=torch.int64, device="meta")
    batch = Batch(shape, ids, torch.zeros(5 * ROWS + 2, dtype=torch.int64, device="meta"))
    cache = runner.open_cache((0,), PAGES * PAGE, ROWS)
    with Counted().of_triton():
        runner._run(cache, batch)  # makes the memory
    with Counted().of_triton() as counted:
        runner._run(cache, batch)
    return counted.names


@torch.inference_mode()
def mixture_launches() -> Counter[str]:
    """Of drawing the tokens of a round, up to the tensor that is copied to the host."""
    logits = torch.zeros(ROWS, VOCAB, dtype=torch.bfloat16, device="meta")
    integers = torch.zeros(ROWS, dtype=torch.int64, device="meta")
    noise = NoiseKeys(integers, integers)
    scrambled_ids(VOCAB, logits.device)  # made once
    with Counted().of_triton() as counted:
        Drawn(*fused_step(logits, logits, noise, integers, MixtureConfig())).pack()
    return counted.names


def per_layer(architecture: str, fused: bool) -> tuple[Counter[str], Counter[str]]:
    """Launches of one layer, and of what a pass has beside its layers."""
    small = replace(ARCHITECTURES[architecture], **SMALL)
    one, two = (launches(runner_of(replace(small, layers=n), fused)) for n in (1, 2))
    layer = two - one
    return layer, one - layer


def show(title: str, names: Counter[str]) -> None:
    """One line."""
    listed = ", ".join(f"{name} {count}" for name, count in names.most_common())
    print(f"{title}: {names.total()} ({listed})")


def report(fused: bool) -> None:
    """Print a line per architecture, and the sum of a lockstep round."""
    print("fused layers" if fused else "layers of Transformers")
    passes = {}
    for name in ("Qwen2.5-1.5B", "Qwen2.5-3B", "Qwen3-1.7B", "Llama-3.2-1B"):
        layer, beside = per_layer(name, fused)
        show(f"  {name}, per layer", layer)
        passes[name] = layer.total() * ARCHITECTURES[name].layers + beside.total()
    show("  beside the layers of a pass", beside)
    mixture = mixture_launches()
    show("  mixture", mixture)
    both = [passes[name] for name in ("Qwen2.5-3B", "Qwen2.5-1.5B")]
    print(f"  lockstep round, Qwen2.5-3B + 1.5B: {sum(both) + mixture.total()}")


def main() -> None:
    """Print both."""
    print(f"PyTorch {torch.__version__}, {ROWS} rows, one token each")
    for fused in (False, True):
        report(fused)


if __name__ == "__main__":
    main()
