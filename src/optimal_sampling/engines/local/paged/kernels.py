"""Flash Attention over runs of pages: which kernel there is, and how it is called.

A kernel gets the queries of all segments, flat, and a layer's whole memory; a `PagedPlan` says where each segment's
keys start and how many it sees.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from typing import TypeAlias

import torch
from jaxtyping import Float, Int32
from torch import Tensor

from optimal_sampling.engines.local.attention import Call
from optimal_sampling.engines.local.paged.cache import PAGE, PagedCache
from optimal_sampling.engines.local.paged.layout import Batch
from optimal_sampling.errors import ConfigError, MissingDependencyError

__all__ = ["Choice", "Kernel", "PagedPlan", "choose_kernel", "flash_attn", "varlen"]

Kernel: TypeAlias = "Callable[[Call, Tensor, Tensor, PagedPlan], Tensor]"
"""(call, keys [all, heads, dim], values, plan) -> [tokens, heads, dim]."""

WIDEST_HEAD = 256


@dataclass(eq=False)
class PagedPlan:
    """What one forward pass needs to attend; the model hands it through to every layer unread."""

    cache: PagedCache
    batch: Batch
    kernel: Kernel
    layers_called: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        """What kernels take, made once and not per layer."""
        self.query_ends, self.key_starts = self.batch.query_ends.int(), self.batch.key_starts.int()
        self.keys_used = self.batch.keys_used.int()

    @cached_property
    def page_table(self) -> Int32[Tensor, "segments pages"]:
        """Pages of each segment's row, as many as the longest has; what lies behind a row's end is never read."""
        pages = torch.arange(
            -(-self.batch.shape.max_keys // PAGE), device=self.key_starts.device, dtype=torch.int32
        )
        return (self.key_starts[:-1, None] // PAGE + pages).clamp(max=self.cache.pages)

    @cached_property
    def key_ends(self) -> Int32[Tensor, " segments+1"]:
        """Cumulative numbers of keys, from 0."""
        return torch.nn.functional.pad(self.keys_used.cumsum(0), (1, 0)).int()

    def attend(
        self,
        call: Call,
        key: Float[Tensor, "kv_heads tokens dim"],
        value: Float[Tensor, "kv_heads tokens dim"],
    ) -> Float[Tensor, "tokens heads dim"]:
        """Store the tokens of this forward pass, then let every segment see its row."""
        self.cache.write(call.layer, self.batch.write, key.transpose(0, 1), value.transpose(0, 1))
        return self.kernel(call, *self.cache.memory(call.layer), self)


def _window(call: Call) -> tuple[int, int]:
    """(keys to the left, keys to the right) of a query's own."""
    return (-1 if call.window is None else call.window - 1, 0)


def _varlen_window(call: Call, queries: int) -> tuple[int, int]:
    """A row's only query sees all keys in any case. Only when told so does the kernel share keys and split them."""
    return (-1, -1) if queries == 1 and call.window is None else _window(call)


def varlen(call: Call, keys: Tensor, values: Tensor, plan: PagedPlan) -> Tensor:
    """PyTorch's own Flash Attention."""
    from torch.nn.attention.varlen import varlen_attn

    shape = plan.batch.shape
    output = varlen_attn(
        call.query.transpose(0, 1).contiguous(),
        keys,
        values,
        plan.query_ends,
        plan.key_starts,
        shape.max_queries,
        shape.max_keys,
        scale=call.scaling,
        window_size=_varlen_window(call, shape.max_queries),
        enable_gqa=call.query.shape[0] != keys.shape[1],
        seqused_k=plan.keys_used,
    )
    assert isinstance(output, Tensor)
    return output


def flash_attn(call: Call, keys: Tensor, values: Tensor, plan: PagedPlan) -> Tensor:
    """The flash-attn package, which takes the number of keys only beside a table of pages."""
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
    """A kernel, or None for PyTorch's SDPA over slots; and a line for people that says which and why."""

    kernel: Kernel | None
    note: str


def choose_kernel(
    asked: str, device: torch.device, dtype: torch.dtype, head_dims: set[int], needs: set[str]
) -> Choice:
    """`asked` is `LocalOptions.attention`; `needs` are attention features that the model uses.

    `auto` falls back to SDPA and says why. Raises ConfigError or MissingDependencyError where a kernel was asked for
    that cannot be had.
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
    if _varlen_exists():
        return Choice(
            varlen,
            "Flash Attention 2 auto-enabled (PyTorch's own)"
            if asked == "auto"
            else "PyTorch varlen",
        )
    if asked == "varlen":
        raise ConfigError(
            f"PyTorch {torch.__version__} has no varlen_attn with seqused_k; it came with 2.12"
        )
    try:
        return Choice(_packaged().kernel, "Flash Attention 2 auto-enabled (flash-attn package)")
    except MissingDependencyError:
        reason = f"PyTorch {torch.__version__} has no varlen_attn with seqused_k, and flash-attn is not installed"
        return Choice(None, f"PyTorch SDPA: {reason}")


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
        return f"Flash Attention needs an Ampere GPU or newer, not {torch.cuda.get_device_name(device)}"
    return ""


def _varlen_exists() -> bool:
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return False
    return "seqused_k" in inspect.signature(varlen_attn).parameters


def _packaged() -> Choice:
    try:
        import flash_attn as package  # noqa: F401
    except ImportError as error:
        message = "attention 'flash_attn' needs the flash-attn package: pip install 'optimal-sampling[flash]'"
        raise MissingDependencyError(message) from error
    return Choice(flash_attn, f"flash-attn {_version('flash-attn')}")


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "of unknown version"
