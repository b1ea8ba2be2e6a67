"""Whether a checkpoint holds all weights of its model, and the model uses all of them.

vLLM skips some that it has no place for, and leaves uninitialised memory where one is missing.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from optimal_sampling.engines.local.weights import is_beside_model
from optimal_sampling.errors import ModelError

__all__ = ["WeightCheck"]

_UNSET = -12288.0  # exact in every floating dtype, and no weight
_NOT_READ = re.compile(r"\.g_idx$|\.[qkv]_(scale|zero_point)$")
"""Values of quantised checkpoints that vLLM needs only for some kernels."""


class _Watched(Tensor):
    """A weight that notes that it was used: that anything but its shape or type was asked for."""

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        is_question = getattr(func, "__name__", "") in {"__get__", "size", "dim", "numel"}

        def plain(value: Any) -> Any:
            if not isinstance(value, cls):
                return value
            if not is_question or func == Tensor.data.__get__:  # type: ignore[attr-defined]
                value.unused.discard(value.path)  # type: ignore[attr-defined]
            with torch._C.DisableTorchFunctionSubclass():
                return value.as_subclass(Tensor)

        return func(*tree_map(plain, args), **tree_map(plain, dict(kwargs or {})))


class WeightCheck:
    """The check of several models by role, made before their weights are loaded."""

    def __init__(self, models: Mapping[str, nn.Module], configs: Mapping[str, Any]) -> None:
        self.models = models
        self.configs = configs
        self.unused: set[str] = set()
        for _, parameter in self._checked():
            parameter.data.fill_(_UNSET)

    def watch(self, weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """The same weights. Names begin with the role."""
        for name, weight in weights:
            self.unused.add(name)
            watched = weight.as_subclass(_Watched)
            watched.unused = self.unused  # type: ignore[attr-defined]
            watched.path = name  # type: ignore[attr-defined]
            yield name, watched

    def finish(self) -> None:
        """Raises ModelError for weights that are missing or were not used."""
        missing = [name for name, each in self._checked() if bool((each == _UNSET).any())]
        if missing:
            raise ModelError(f"the weights lack these, or parts of them: {_listed(missing)}")
        unused = sorted(name for name in self.unused if not self._is_needless(name))
        if unused:
            raise ModelError(
                f"vLLM does not use these weights: {_listed(unused)}; without them it may be "
                "another model than the one that was trained. Check its config.json"
            )

    def _is_needless(self, name: str) -> bool:
        role, _, key = name.partition(".")
        text_config = self.configs[role].hf_text_config
        return bool(_NOT_READ.search(key)) or is_beside_model(text_config, key)

    def _checked(self) -> Iterator[tuple[str, Tensor]]:
        """Parameters that are stored in checkpoints as they are. Experts can be padded."""
        for role, model in self.models.items():
            for path, module in model.named_modules(prefix=role):
                kind = type(getattr(module, "quant_method", None)).__name__
                if kind not in {
                    "NoneType",
                    "UnquantizedLinearMethod",
                    "UnquantizedEmbeddingMethod",
                }:
                    continue
                for name, parameter in module.named_parameters(path, recurse=False):
                    if parameter.is_floating_point() and parameter.element_size() > 1:
                        yield name, parameter


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more
