"""The attention function that Transformers models call inside our forward passes.

One forward pass is one flat row of tokens: prompt chunks, then `width` tokens of every row. The
function hands each layer's call to the `AttentionPlan` of the pass, which stores keys and values
and attends.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from optimal_sampling.errors import ModelError

__all__ = ["NAME", "AttentionCall", "AttentionPlan", "attend", "register"]

NAME = "optimal_sampling"
"""Under this name Transformers finds the function."""


@dataclass(frozen=True, slots=True, eq=False)
class AttentionCall:
    """One layer's call."""

    layer: int
    query: Float[Tensor, "heads tokens key_dim"]
    scaling: float | None
    window: int | None
    softcap: float | None
    sinks: Tensor | None


class AttentionPlan(Protocol):
    """What one forward pass needs to attend; the model hands it to every layer as it is."""

    layers_called: list[int]
    needs: set[str]
    """Features that the model used and that not every attention backend has."""

    def attend(
        self,
        call: AttentionCall,
        key: Float[Tensor, "kv_heads tokens dim"],
        value: Float[Tensor, "kv_heads tokens dim"],
    ) -> Float[Tensor, "tokens heads dim"]:
        """Store the tokens of this forward pass, and attend."""


def attend(
    module: torch.nn.Module,
    query: Float[Tensor, "1 heads tokens key_dim"],
    key: Float[Tensor, "1 kv_heads tokens key_dim"],
    value: Float[Tensor, "1 kv_heads tokens value_dim"],
    attention_mask: Tensor | None,
    scaling: float | None = None,
    plan: AttentionPlan | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Float[Tensor, " heads"] | None = None,
    **unused: Any,
) -> tuple[Float[Tensor, "1 tokens heads value_dim"], None]:
    """Transformers' attention interface. `softcap` and `s_aux` (sinks) as in Gemma 2 and gpt-oss.

    Raises ModelError where the model does not hand `plan` to its layers.
    """
    if plan is None:
        raise ModelError("it does not hand keyword arguments through to its attention layers")
    layer: int = module.layer_idx  # type: ignore[assignment]
    plan.layers_called.append(layer)
    call = AttentionCall(layer, query[0], scaling, sliding_window, softcap, s_aux)
    return plan.attend(call, key[0], value[0])[None], None


def register() -> None:
    """Make the function known to Transformers. As no mask function has NAME, no mask is built."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, attend)
