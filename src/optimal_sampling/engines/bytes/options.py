"""Options of tokens that mean nothing for bytes. No torch: they are checked before a run."""

from __future__ import annotations

from optimal_sampling.config import EngineOptions, MixtureConfig
from optimal_sampling.errors import ConfigError
from optimal_sampling.types import Mode

__all__ = ["check_byte_options"]


def check_byte_options(mixture: MixtureConfig, options: EngineOptions, mode: Mode) -> None:
    """Raise ConfigError for options that have no form for a law of bytes.

    Of one model alone, top_p and top_k act on its tokens.
    """
    for name, off in (("top_p", 1.0), ("top_k", -1)):
        if mode == "mixture" and getattr(mixture, name) != off:
            raise ConfigError(
                f"{name} truncates q after mixing, and with two tokenizers q is a law of bytes, "
                f"not of tokens: use temperature, or teacher_support_{name} on the teacher's tokens"
            )
    if getattr(options, "top_tokens", 0):
        raise ConfigError(
            "top_tokens keeps the likeliest tokens of both models and of q, and with two "
            "tokenizers q is a law of bytes: use top_tokens 0"
        )
