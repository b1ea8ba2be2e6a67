"""Each model's own config inside the composite model.

vLLM has one config, made for the teacher: its window, its quantisation, its tied or untied head.
"""

from __future__ import annotations

import copy
import re
from typing import Any

from torch import nn
from vllm.config import ModelConfig, VllmConfig, replace
from vllm.model_executor.layers.attention import Attention

from optimal_sampling.errors import ConfigError

__all__ = ["check_windows", "student_config", "teacher_config"]

_ROLE = re.compile(r"^(teacher|student)\.")


def teacher_config(outer: VllmConfig, architectures: list[str]) -> VllmConfig:
    """vLLM's config with the teacher's own architectures in place of the composite model's."""
    config = outer.with_hf_config(outer.model_config.hf_config, architectures=architectures)
    return _for_role(config, config.model_config, outer.quant_config)


def student_config(outer: VllmConfig, folder: str, trust_remote_code: bool) -> VllmConfig:
    """vLLM's config with all that depends on the model taken from the student's folder."""
    shared = outer.model_config
    model = ModelConfig(
        model=folder,
        runner="generate",
        skip_tokenizer_init=True,
        trust_remote_code=trust_remote_code,
        dtype=shared.dtype,
        seed=shared.seed,
        max_model_len=shared.max_model_len,
        enforce_eager=shared.enforce_eager,
    )
    model.maybe_untie_word_embeddings()
    model.is_submodel_config = True
    quantization = VllmConfig.get_quantization_config(model, outer.load_config)
    return _for_role(outer, model, quantization)


def check_windows(role: str, model: nn.Module, config: Any) -> None:
    """Raise ConfigError where vLLM's layers have no windows that the config gives them.

    `config`: of the text model. vLLM implements mixed layers for some architectures only.
    """
    layers = [each for each in model.modules() if isinstance(each, Attention)]
    kinds = getattr(config, "layer_types", None)
    if kinds is None or len(kinds) != len(layers):
        return
    for index, (kind, layer) in enumerate(zip(kinds, layers, strict=True)):
        if (kind == "sliding_attention") != (layer.sliding_window is not None):
            raise ConfigError(
                f"the {role}'s config says {kind!r} of layer {index}, which vLLM does not give a "
                f"{type(model).__name__}: its tokens would be another model's beyond the window. "
                "Use --engine local"
            )


def _for_role(outer: VllmConfig, model: ModelConfig, quantization: Any) -> VllmConfig:
    cache = copy.copy(outer.cache_config)
    cache.sliding_window = _common_window(model.hf_text_config)
    if quantization is not None:
        quantization = _with_checkpoint_names(quantization)
    return replace(outer, model_config=model, cache_config=cache, quant_config=quantization)


def _common_window(config: Any) -> int | None:
    """Window of layers that have none of their own. None where layers differ: they name theirs."""
    kinds = set(getattr(config, "layer_types", None) or ["sliding_attention"])
    window = getattr(config, "sliding_window", None)
    return int(window) if window and kinds == {"sliding_attention"} else None


def _with_checkpoint_names(quantization: Any) -> Any:
    """A copy that finds layers by the names that a checkpoint's own lists have.

    Checkpoints name layers that are not quantised (`ignore`, `modules_to_not_convert`); names of
    the composite model, which begin with the role, would match none of them.
    """
    stock = type(quantization)

    def get_quant_method(self: Any, layer: Any, name: str) -> Any:
        return stock.get_quant_method(self, layer, _ROLE.sub("", name))

    result = copy.deepcopy(quantization)
    result.__class__ = type(stock.__name__, (stock,), {"get_quant_method": get_quant_method})
    return result
