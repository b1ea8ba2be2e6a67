"""Flash Attention over pages: which attention backend there is, and how it is called.

A backend gets the queries of all segments, flat, and a layer's whole memory; a `PagePlan` says
where each segment's keys start and how many it sees.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TypeAlias

import torch
from jaxtyping import Float, Int32
from torch import Tensor

from optimal_sampling.distribution import triton_version
from optimal_sampling.engines.local.attention import AttentionCall
from optimal_sampling.engines.local.paged.page_cache import Batch, PageCache
from optimal_sampling.engines.local.paged.page_manager import PAGE
from optimal_sampling.errors import ConfigError, MissingDependencyError

__all__ = [
    "Backend",
    "Choice",
    "FlashOperator",
    "PagePlan",
    "choose_backend",
    "flash_attn",
    "installed_operator",
    "split_or",
    "varlen",
]

Backend: TypeAlias = "Callable[[AttentionCall, Tensor, Tensor, PagePlan], Tensor]"
"""(call, keys [all, heads, dim], values, plan) -> [tokens, heads, dim]."""

WIDEST_HEAD = 256
NEEDED_ARGUMENTS = ("cum_seq_q", "cum_seq_k", "window_size_left", "window_size_right", "seqused_k")
"""What PyTorch's operator must take to read rows in pages: all do from 2.9 on."""
NONE: frozenset[str] = frozenset()
SLOTS_COST = "without CUDA graphs, an estimated 4 to 8 times slower"
"""What a GPU loses with SDPA over slots."""


@dataclass(eq=False)
class PagePlan:
    """`AttentionPlan` of one forward pass over pages."""

    cache: PageCache
    batch: Batch
    backend: Backend
    layers_called: list[int] = field(default_factory=list)
    needs: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        """Make the arguments of backends once, and not per layer."""
        self.positions, self.write, *segments = self.batch.split()
        self.query_ends, self.key_starts, self.keys_used = (part.int() for part in segments)

    @cached_property
    def page_table(self) -> Int32[Tensor, "segments pages"]:
        """Pages of each segment's row, as many as the longest has; surplus ones are never read."""
        count = -(-self.batch.shape.max_keys // PAGE)
        pages = torch.arange(count, device=self.key_starts.device, dtype=torch.int32)
        return (self.key_starts[:-1, None] // PAGE + pages).clamp(max=self.cache.pages)

    @cached_property
    def key_ends(self) -> Int32[Tensor, " segments+1"]:
        """Cumulative numbers of keys, from 0."""
        return torch.nn.functional.pad(self.keys_used.cumsum(0), (1, 0)).int()

    @cached_property
    def parts(self) -> tuple[PagePlan, PagePlan]:
        """Plans of the chunks alone, and of the rows alone: what a backend needs of a plan."""
        first, rest = (PagePlan(self.cache, part, self.backend) for part in self.batch.parts())
        return first, rest

    def attend(
        self,
        call: AttentionCall,
        key: Float[Tensor, "kv_heads tokens dim"],
        value: Float[Tensor, "kv_heads tokens dim"],
    ) -> Float[Tensor, "tokens heads dim"]:
        """Store the tokens of this forward pass, then attend over every segment's row."""
        self.cache.write(call.layer, self.write, key.transpose(0, 1), value.transpose(0, 1))
        return self.backend(call, *self.cache.layer(call.layer), self)


def _window(call: AttentionCall) -> tuple[int, int]:
    """Keys that a query sees to the left and to the right of its own; -1: all."""
    return (-1 if call.window is None else call.window - 1, 0)


@dataclass(frozen=True, slots=True)
class FlashOperator:
    """What an `aten::_flash_attention_forward` takes, read off its schema.

    Grouped heads are no argument in any version: the kernel compares the shapes.
    """

    takes: frozenset[str]
    """Names of its arguments."""

    @classmethod
    def of(cls, schema: str) -> FlashOperator:
        """Parse a schema, as in native_functions.yaml or as PyTorch prints it."""
        arguments = schema[schema.index("(") + 1 : schema.index(") ->")].split(", ")
        return cls(frozenset(item.split("=")[0].split()[-1] for item in arguments))

    @property
    def problem(self) -> str:
        """Why it cannot read rows in pages; empty if it can."""
        missing = [name for name in NEEDED_ARGUMENTS if name not in self.takes]
        if not missing:
            return ""
        return f"its Flash Attention operator does not take {' and '.join(missing)}"


def installed_operator() -> FlashOperator:
    """That of the installed PyTorch; one without arguments where there is none."""
    operator = getattr(torch.ops.aten, "_flash_attention_forward", None)
    return FlashOperator.of(str(operator.default._schema)) if operator else FlashOperator(NONE)


def varlen(call: AttentionCall, keys: Tensor, values: Tensor, plan: PagePlan) -> Tensor:
    """PyTorch's own Flash Attention: the operator itself.

    `varlen_attn` around it takes numbers of keys from PyTorch 2.12 on only, and launches a kernel
    more.
    """
    shape = plan.batch.shape
    causal, left, right = _own_window(call, shape.max_queries)
    results = torch.ops.aten._flash_attention_forward(
        call.query.transpose(0, 1).contiguous(),
        keys,
        values,
        plan.query_ends,
        plan.key_starts,
        shape.max_queries,
        shape.max_keys,
        0.0,
        causal,
        False,
        scale=call.scaling,
        window_size_left=left,
        window_size_right=right,
        seqused_k=plan.keys_used,
    )
    output: Tensor = results[0]
    return output


def _own_window(call: AttentionCall, queries: int) -> tuple[bool, int, int]:
    """(causal, keys to the left, keys to the right); -1: all.

    A row's only query sees all keys anyway. Only without a window does the operator pack the heads
    of a group and split the keys of a row.
    """
    if call.window is not None:
        return False, *_window(call)
    return (False, -1, -1) if queries == 1 else (True, -1, 0)


def split_or(flash: Backend) -> Backend:
    """Split-KV attention in Triton for rows with a few queries each; `flash` for all else."""
    from optimal_sampling.engines.local.paged.split_attention import (
        MOST_QUERIES,
        split_attention,
        split_count,
    )

    def rows(call: AttentionCall, keys: Tensor, values: Tensor, plan: PagePlan) -> Tensor:
        shape, kv_heads = plan.batch.shape, keys.shape[1]
        group = call.query.shape[0] // kv_heads
        if group * shape.max_queries > MOST_QUERIES:
            return flash(call, keys, values, plan)
        query = call.query.transpose(0, 1)
        starts, used = plan.key_starts[:-1], plan.keys_used
        scale = query.shape[-1] ** -0.5 if call.scaling is None else call.scaling
        splits = split_count(shape.segments, kv_heads, shape.max_keys)
        return split_attention(query, keys, values, starts, used, scale, call.window, splits)

    def attend(call: AttentionCall, keys: Tensor, values: Tensor, plan: PagePlan) -> Tensor:
        shape = plan.batch.shape
        if not shape.chunks:
            return rows(call, keys, values, plan)
        count = shape.tokens - shape.outputs
        chunk_call = replace(call, query=call.query[:, :count])
        row_call = replace(call, query=call.query[:, count:])
        chunk_plan, row_plan = plan.parts
        return torch.cat(
            [
                flash(chunk_call, keys, values, chunk_plan),
                rows(row_call, keys, values, row_plan),
            ]
        )

    return attend


def flash_attn(call: AttentionCall, keys: Tensor, values: Tensor, plan: PagePlan) -> Tensor:
    """The flash-attn package, which takes numbers of keys only together with a page table."""
    from flash_attn import flash_attn_varlen_func

    shape = plan.batch.shape
    output: Tensor = flash_attn_varlen_func(
        call.query.transpose(0, 1).contiguous(),
        keys.view(-1, PAGE, *keys.shape[1:]),
        values.view(-1, PAGE, *values.shape[1:]),
        plan.query_ends,
        plan.key_ends,
        shape.max_queries,
        shape.max_keys,
        softmax_scale=call.scaling,
        causal=True,
        window_size=_window(call),
        block_table=plan.page_table,
    )
    return output


@dataclass(frozen=True, slots=True, eq=False)
class Choice:
    """An attention backend over pages, or None for PyTorch's SDPA over slots."""

    backend: Backend | None
    note: str
    """Which attention runs, and why."""


def choose_backend(
    asked: str,
    device: torch.device,
    dtype: torch.dtype,
    head_dims: set[int],
    needs: set[str],
    operator: FlashOperator | None = None,
) -> Choice:
    """The backend for `asked`, one of "auto", "varlen", "flash_attn" and "sdpa".

    `needs`: attention features that the model uses. `auto` falls back to SDPA and says why.
    `operator`: PyTorch's; None: that of the installed one.
    Raises ConfigError or MissingDependencyError where the backend asked for cannot run.
    """
    if asked == "sdpa":
        return Choice(None, "PyTorch SDPA, as asked")
    problem = _problem(device, dtype, head_dims, needs)
    if asked != "auto" and problem:
        raise ConfigError(
            f"attention {asked!r} was asked for, but {problem}; use attention='sdpa' or 'auto'"
        )
    if problem:
        return Choice(None, f"PyTorch SDPA: {problem}")
    if asked == "flash_attn":
        return _packaged()
    missing = (operator or installed_operator()).problem
    if not missing and asked == "auto":
        return _own(device)
    if not missing:
        return Choice(varlen, "PyTorch varlen")
    missing = f"this is PyTorch {torch.__version__}, and {missing}"
    if asked == "varlen":
        raise ConfigError(f"attention 'varlen' was asked for, but {missing}; take another PyTorch")
    try:
        return Choice(_packaged().backend, "Flash Attention 2 auto-enabled (flash-attn package)")
    except MissingDependencyError:
        return Choice(
            None, f"PyTorch SDPA over slots, {SLOTS_COST}: {missing}; flash-attn is not installed"
        )


def _own(device: torch.device) -> Choice:
    """PyTorch's operator, and split-KV attention beside it where Triton can run."""
    note = "Flash Attention 2 auto-enabled (PyTorch's own)"
    version = triton_version()
    if version is None or device.type != "cuda":
        return Choice(varlen, note)
    return Choice(split_or(varlen), f"{note}, decoding with split-KV (Triton {version})")


def _problem(device: torch.device, dtype: torch.dtype, head_dims: set[int], needs: set[str]) -> str:
    """Why Flash Attention cannot run this model here; empty if it can."""
    if problem := _device_problem(device, dtype):
        return problem
    if needs:
        return f"the model needs {' and '.join(sorted(needs))}"
    if len(head_dims) > 1 or max(head_dims) > WIDEST_HEAD or max(head_dims) % 8:
        return f"the model's heads have dimensions {sorted(head_dims)}"
    return ""


def _device_problem(device: torch.device, dtype: torch.dtype) -> str:
    if device.type != "cuda":
        return "Flash Attention needs a CUDA GPU"
    if dtype not in (torch.float16, torch.bfloat16):
        return f"Flash Attention needs float16 or bfloat16, not {str(dtype).removeprefix('torch.')}"
    if torch.cuda.get_device_capability(device)[0] < 8:
        name = torch.cuda.get_device_name(device)
        return f"Flash Attention needs an Ampere GPU or newer, not {name}"
    return ""


def _packaged() -> Choice:
    try:
        import flash_attn as package
    except ImportError as error:
        message = "attention 'flash_attn' needs the flash-attn package"
        remedy = "pip install 'flash-attn>=2.8'"
        raise MissingDependencyError(f"{message}: {remedy}") from error
    return Choice(flash_attn, f"flash-attn {getattr(package, '__version__', '')}".strip())
