"""`FusedDecoder`: the forward pass of Llama-like models over pages, in ten launches per layer.

Projections of one input are one matrix product, and what lies between the products is one kernel
each (`layer_ops`). Only for models of KNOWN whose layers are exactly as expected; all others run
the forward pass of Transformers. At load its logits are compared with those of the stock model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from optimal_sampling.engines.local.attention import AttentionCall
from optimal_sampling.engines.local.layers import RMSNorm
from optimal_sampling.engines.local.paged.attention_backends import PagePlan
from optimal_sampling.engines.local.paged.layer_ops import (
    HeadNorms,
    Memory,
    Rotary,
    add_rms_norm,
    has_triton,
    rotate_and_store,
    silu_mul,
)
from optimal_sampling.engines.local.rotary import RowRotary

__all__ = ["FusedDecoder", "unfused_reason"]

KNOWN = {"LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"}
"""Classes of Transformers with the same forward pass up to biases, head norms and windows."""
MOST_POSITIONS = 2**17
"""Most positions of which cosines and sines are kept: 64 MiB in heads of 128, in half precision."""
ATTENTION, MLP = ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")


def unfused_reason(model: Any) -> str:
    """Why a model does not run as a `FusedDecoder`; empty where it does."""
    kind = type(model)
    if kind.__name__ not in KNOWN or not kind.__module__.startswith("transformers.models."):
        return f"a {kind.__name__} is none of {', '.join(sorted(KNOWN))}"
    if model.device.type != "cpu" and not has_triton():
        return "Triton is not installed"
    if model.config.hidden_act != "silu":
        return f"its activation is {model.config.hidden_act}"
    if any(m._forward_hooks or m._forward_pre_hooks for m in model.modules()):
        return "its modules have forward hooks"
    return next(filter(None, (_layer_problem(model, layer) for layer in model.model.layers)), "")


def _layer_problem(model: Any, layer: Any) -> str:
    """What of a layer is not as expected; empty where nothing is."""
    attention, mlp = layer.self_attn, layer.mlp
    merged = [getattr(attention, name) for name in ATTENTION]
    merged_mlp = [getattr(mlp, name) for name in MLP]
    linears = [*merged, *merged_mlp, attention.o_proj, mlp.down_proj]
    if any(type(linear) is not nn.Linear for linear in linears):
        return "its linear layers are not plain"
    if any(len({linear.bias is None for linear in group}) > 1 for group in (merged, merged_mlp)):
        return "some of its projections have a bias"
    norms = [layer.input_layernorm, layer.post_attention_layernorm, model.model.norm]
    if hasattr(attention, "q_norm"):
        norms += [attention.q_norm, attention.k_norm]
    if any(not isinstance(norm, RMSNorm) for norm in norms):
        return "its norms are not plain RMS norms"
    rotary: Any = model.model.rotary_emb
    rotary = rotary.inner if isinstance(rotary, RowRotary) else rotary
    if 2 * len(rotary.inv_freq) != attention.head_dim:
        return "its heads are rotated in part"
    return ""


class Merged(NamedTuple):
    """Linear layers of one input as one."""

    weight: Float[Tensor, "outputs inputs"]
    bias: Float[Tensor, " outputs"] | None

    def __call__(self, x: Float[Tensor, "tokens inputs"]) -> Float[Tensor, "tokens outputs"]:
        """Their outputs, behind one another."""
        return F.linear(x, self.weight, self.bias)


def _merge(linears: Sequence[Any]) -> Merged:
    """One memory for the weights of all; theirs become views of it."""
    weight = _join([linear.weight for linear in linears])
    if linears[0].bias is None:
        return Merged(weight, None)
    return Merged(weight, _join([linear.bias for linear in linears]))


def _join(parts: Sequence[nn.Parameter]) -> Tensor:
    """One tensor of which the parts become views, where they are not already."""
    first, sizes = parts[0].data, [len(part) for part in parts]
    if _adjacent(parts):
        return first.as_strided((sum(sizes), *first.shape[1:]), first.stride())
    whole = torch.cat([part.data for part in parts])
    views: tuple[Tensor, ...] = whole.split(sizes)  # type: ignore[no-untyped-call]
    for part, view in zip(parts, views, strict=True):
        part.data = view
    return whole


def _adjacent(parts: Sequence[Tensor]) -> bool:
    """Whether each part begins where the one before it ends, in one memory."""
    memories = {part.untyped_storage().data_ptr() for part in parts}
    starts = [part.storage_offset() for part in parts]
    ends = [part.storage_offset() + part.numel() for part in parts]
    contiguous = all(part.is_contiguous() for part in parts)
    return contiguous and len(memories) == 1 and starts[1:] == ends[:-1]


class FusedLayer:
    """One decoder layer. `call`: what it hands to attention, but for the queries."""

    def __init__(self, layer: Any, call: AttentionCall) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        self.call = call
        self.before_attention: RMSNorm = layer.input_layernorm
        self.before_mlp: RMSNorm = layer.post_attention_layernorm
        self.qkv = _merge([getattr(attention, name) for name in ATTENTION])
        self.gate_up = _merge([getattr(mlp, name) for name in MLP])
        self.o_proj, self.down_proj = attention.o_proj, mlp.down_proj
        self.head_norms: HeadNorms | None = None
        if hasattr(attention, "q_norm"):
            self.head_norms = HeadNorms(attention.q_norm, attention.k_norm)
        kv_heads = attention.k_proj.out_features // attention.head_dim
        self._no_keys = self.qkv.weight.new_empty(0, kv_heads, attention.head_dim)

    def attend(
        self, x: Float[Tensor, "tokens hidden"], rotary: Rotary, plan: PagePlan
    ) -> Float[Tensor, "tokens hidden"]:
        """Attention over the cache, with this pass written to it."""
        plan.layers_called.append(self.call.layer)
        plan.cache.allocate(self.call.layer, self._no_keys, self._no_keys)
        keys, values = plan.cache.layer(self.call.layer)
        memory = Memory(keys, values, plan.write)
        query = rotate_and_store(self.qkv(x), rotary, memory, self.head_norms)
        call = replace(self.call, query=query.transpose(0, 1))
        output: Tensor = self.o_proj(plan.backend(call, keys, values, plan).flatten(1))
        return output

    def mlp(self, x: Float[Tensor, "tokens hidden"]) -> Float[Tensor, "tokens hidden"]:
        """The gated MLP."""
        output: Tensor = self.down_proj(silu_mul(self.gate_up(x)))
        return output


class FusedDecoder:
    """A model for which `unfused_reason` is empty; its weights become views of merged ones.

    The model itself runs as before.
    """

    def __init__(self, model: Any) -> None:
        self.body = model.model
        self.head = model.lm_head
        self._table = _rotary_table(model)
        calls = _attention_calls(model)
        with torch.inference_mode(False), torch.no_grad():
            self.layers = [
                FusedLayer(layer, call) for layer, call in zip(self.body.layers, calls, strict=True)
            ]

    def __call__(
        self, ids: Int[Tensor, " tokens"], plan: PagePlan
    ) -> Float[Tensor, "outputs vocab"]:
        """Logits after the last tokens, as many as the plan's batch wants."""
        residual = self.body.embed_tokens(ids)
        rotary = self._rotary(residual, plan.positions)
        x = None
        for layer in self.layers:
            x = layer.attend(add_rms_norm(residual, x, layer.before_attention), rotary, plan)
            x = layer.mlp(add_rms_norm(residual, x, layer.before_mlp))
        last = slice(-plan.batch.shape.outputs, None)
        normed = add_rms_norm(residual[last], None if x is None else x[last], self.body.norm)
        logits: Tensor = self.head(normed)
        return logits

    def _rotary(self, x: Tensor, positions: Int[Tensor, " tokens"]) -> Rotary:
        if self._table is not None:
            return Rotary(*self._table, positions)
        cos, sin = self.body.rotary_emb(x[None], position_ids=positions[None])
        return Rotary(cos[0], sin[0], torch.arange(len(x), device=x.device))


@torch.inference_mode()
def _rotary_table(model: Any) -> tuple[Tensor, Tensor] | None:
    """Cosines and sines of all positions, [positions, dim] each, to be computed once.

    None where they depend on the length of a text, or where there are too many to keep.
    """
    rotary = model.model.rotary_emb
    count = getattr(model.config, "max_position_embeddings", None) or MOST_POSITIONS + 1
    varying = isinstance(rotary, RowRotary) or rotary.rope_type in ("dynamic", "longrope")
    if varying or count > MOST_POSITIONS:
        return None
    weight = model.get_input_embeddings().weight
    cos, sin = rotary(weight[None, :1], position_ids=torch.arange(count, device=model.device)[None])
    return cos[0], sin[0]


@dataclass(eq=False)
class _Recording:
    """An `AttentionPlan` that keeps what layers hand to attention."""

    calls: list[AttentionCall] = field(default_factory=list)
    layers_called: list[int] = field(default_factory=list)
    needs: set[str] = field(default_factory=set)

    def attend(self, call: AttentionCall, key: Tensor, value: Tensor) -> Tensor:
        """Zeros."""
        self.calls.append(replace(call, query=call.query[:, :0]))
        return torch.zeros_like(call.query).transpose(0, 1)


@torch.inference_mode()
def _attention_calls(model: Any) -> list[AttentionCall]:
    """Scale and window of every layer, as the model itself hands them to attention."""
    recording = _Recording()
    token = torch.zeros(1, 1, dtype=torch.int64, device=model.device)
    model(input_ids=token, position_ids=token, use_cache=False, plan=recording, logits_to_keep=1)
    return recording.calls
