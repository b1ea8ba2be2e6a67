"""Tensor parallelism: a student that cannot be split over the devices is whole on each of them.

Importing this does not import vLLM.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

__all__ = ["can_split", "initialize_student"]


def can_split(config: Any, devices: int) -> bool:
    """Whether vLLM can split a model with this config of Transformers over so many devices.

    Heads and the width of the MLP must divide; fewer key-value heads than devices are repeated.
    """
    text = config.get_text_config()
    heads = int(text.num_attention_heads)
    kv_heads = int(getattr(text, "num_key_value_heads", None) or heads)
    width = int(getattr(text, "intermediate_size", None) or 0)
    more, fewer = max(kv_heads, devices), min(kv_heads, devices)
    return heads % devices == 0 and more % fewer == 0 and width % devices == 0


def initialize_student(config: Any, prefix: str) -> Any:
    """The student's model of vLLM without its weights. `config`: its VllmConfig."""
    from vllm.model_executor.model_loader.utils import initialize_model

    devices = config.parallel_config.tensor_parallel_size
    if devices == 1 or can_split(config.model_config.hf_config, devices):
        return initialize_model(config, prefix=prefix)
    group = _own_group()
    with _tensor_parallel_group(group):
        model = initialize_model(config, prefix=prefix)
    model.compute_logits = _of_first_device(model.compute_logits)
    for name in ("forward", "load_weights", "compute_logits"):
        setattr(model, name, _within(group, getattr(model, name)))
    return model


def _own_group() -> Any:
    """A group of this rank alone. All ranks must call this."""
    from vllm.distributed import parallel_state

    world = parallel_state.get_world_group()
    return parallel_state.init_model_parallel_group(
        [[rank] for rank in range(world.world_size)],
        world.local_rank,
        str(parallel_state.torch.distributed.get_backend(world.device_group)),
        group_name="student",
    )


@contextmanager
def _tensor_parallel_group(group: Any) -> Iterator[None]:
    """vLLM's layers are built for, and communicate in, this group."""
    from vllm.distributed import parallel_state

    before, parallel_state._TP = parallel_state._TP, group
    try:
        yield
    finally:
        parallel_state._TP = before


def _within(group: Any, method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def call(*args: Any, **kwargs: Any) -> Any:
        with _tensor_parallel_group(group):
            return method(*args, **kwargs)

    return call


def _of_first_device(compute_logits: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """The logits of the first device's hidden states.

    Last bits that differ between devices would let them draw different tokens.
    """
    from vllm.distributed.parallel_state import get_tp_group

    whole = get_tp_group()

    def call(hidden_states: Any) -> Any:
        return compute_logits(whole.broadcast(hidden_states.contiguous(), src=0))

    return call
