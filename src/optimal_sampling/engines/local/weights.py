"""Whether the weights of a model were all there and all used, and adapters that lie beside it."""

from __future__ import annotations

import importlib.util
import re
from typing import Any

from optimal_sampling.errors import MissingDependencyError, ModelError
from optimal_sampling.vocabulary.model_folder import has_adapter

__all__ = ["check_weights", "is_beside_model", "merge_adapter", "takes_adapter"]

LAYER = re.compile(r"\blayers\.(\d+)\.")
BESIDE_MODEL = re.compile(
    r"rotary_emb\.|\.(attn|attention)\.(masked_)?bias$|\.causal_mask$"
    r"|(^|\.)(mtp|vision|visual|audio|image|speech|mm|multi_?modal)(_|\.)"
)
"""Weights of no text model: computed buffers, heads that draft further tokens, other inputs."""


def check_weights(model: Any, info: dict[str, Any], name: str, allow_unused: bool) -> None:
    """Raises ModelError for weights that are missing, of another shape, or not used."""
    absent = sorted({*info["missing_keys"], *(str(key) for key in info["mismatched_keys"])})
    if absent:  # Transformers would go on with random weights
        raise ModelError(f"the weights of {name} lack, or have in another shape: {_listed(absent)}")
    config = model.config.get_text_config()
    unused = sorted(key for key in info["unexpected_keys"] if not is_beside_model(config, key))
    if unused and not allow_unused:
        raise ModelError(
            f"{name} has weights that a {type(model).__name__} of its config.json does not use: "
            f"{_listed(unused)}; without them it may be another model than the one that was "
            "trained. Check config.json, or load it as it is with --allow-unused-weights"
        )


def is_beside_model(config: Any, key: str) -> bool:
    """Whether a weight is a constant, or of a part that drafts tokens or reads no text.

    `config`: of the text model.
    """
    layers = getattr(config, "num_hidden_layers", 0)
    drafting = range(layers, layers + (getattr(config, "num_nextn_predict_layers", 0) or 0))
    numbered = LAYER.search(key)
    return bool(BESIDE_MODEL.search(key) or (numbered and int(numbered[1]) in drafting))


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def takes_adapter(path: str, name: str) -> bool:
    """Whether a LoRA adapter lies beside a model. MissingDependencyError where peft is absent."""
    adapted = has_adapter(path)
    if adapted and importlib.util.find_spec("peft") is None:
        raise MissingDependencyError(
            f"a LoRA adapter lies beside {name}, and applying it needs peft: "
            "pip install peft; or move adapter_config.json away for the model without it"
        )
    return adapted


def merge_adapter(model: Any, path: str, name: str) -> None:
    """Add the weights of the LoRA adapter at `path` to those of the layers that it changes.

    Raises ModelError where the adapter is of another model, or has parts that are no such weights.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    try:
        info = model.load_adapter(path)
    except Exception as error:  # peft has errors of its own for every kind of adapter
        raise ModelError(f"the adapter of {name} could not be loaded: {error}") from error
    if info is not None:
        check_weights(model, info.to_dict(), f"the adapter of {name}", allow_unused=False)
    for parent in list(model.modules()):
        for child_name, child in list(parent.named_children()):
            if isinstance(child, BaseTunerLayer):
                child.merge(safe_merge=True)
                setattr(parent, child_name, child.get_base_layer())
    left = {type(m).__name__ for m in model.modules() if type(m).__module__.startswith("peft.")}
    if left:
        raise ModelError(
            f"the adapter of {name} has parts that cannot be merged here ({', '.join(left)}): "
            "merge it with peft's merge_and_unload, and give the saved result"
        )
