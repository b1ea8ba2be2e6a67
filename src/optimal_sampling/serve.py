"""`optimal-sampling serve`: vLLM's own OpenAI server, whose model is q*.

Knows how vLLM's server is started. What it lets in is `engines/vllm/gate.py`; the rest is vLLM's.
"""

from __future__ import annotations

import ipaddress
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from optimal_sampling.config import MixtureConfig, ModelConfig, VllmOptions
from optimal_sampling.errors import ConfigError

__all__ = ["KEY_VARIABLE", "ServeConfig", "serve"]

KEY_VARIABLE = "OPTIMAL_SAMPLING_API_KEY"
"""Environment variable with the API key. A key is no command-line option: those are seen by everybody on a machine."""


@dataclass(frozen=True)
class ServeConfig:
    """An OpenAI-compatible server of q*. The API key is read from the variable OPTIMAL_SAMPLING_API_KEY."""

    models: ModelConfig = field(default_factory=ModelConfig)
    mixture: MixtureConfig = field(default_factory=MixtureConfig)
    """Of requests that say nothing else; temperature, top_p and top_k are each request's own."""
    engine: VllmOptions = field(
        default_factory=lambda: VllmOptions(batch_size=256, prefill_chunk=8192)
    )
    host: str = "127.0.0.1"
    """Address to listen on. Any other than this machine's own needs an API key."""
    port: int = 8000
    """Port to listen on."""
    served_model_name: str | None = None
    """Name that clients ask for; unset: the teacher's."""
    max_model_len: int | None = None
    """Longest text, prompt included; unset: the shorter of the models' contexts."""
    gpu_memory_utilization: float | None = None
    """Share of the GPU's memory that may be used; unset: vLLM's default."""
    max_n: int = 64
    """Most completions, and most prompts, of one request."""
    max_body_bytes: int = 4 << 20
    """Largest request body."""

    def __post_init__(self) -> None:
        if not 0 < self.port < 65536:
            raise ConfigError(f"port must lie in 1..65535, got {self.port}")
        for name in ("max_n", "max_body_bytes"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name, default in (("temperature", 1.0), ("top_p", 1.0), ("top_k", -1)):
            if getattr(self.mixture, name) != default:
                raise ConfigError(f"{name} is each request's own; the server has none")


def serve(config: ServeConfig, environment: Mapping[str, str] = os.environ) -> None:
    """Run the server until it is told to end. Raises ConfigError, ModelError, MissingDependencyError before that."""
    key = environment.get(KEY_VARIABLE) or None
    if key is None and not _is_own_machine(config.host):
        raise ConfigError(
            f"host {config.host} can be reached from elsewhere: set {KEY_VARIABLE} to an API key"
        )
    from optimal_sampling.engines.vllm.launch import engine_arguments, prepare_environment
    from optimal_sampling.vocabulary import Vocabulary

    prepare_environment()
    import uvloop
    from vllm.entrypoints.launchers.api_server.entry import run_server

    vocabulary = Vocabulary.load(
        config.models.student, config.models.teacher, config.models.trust_remote_code
    )
    given = _vllm_settings(config)
    arguments = engine_arguments(
        config.models, config.mixture, vocabulary, config.engine.drafts_per_step, given
    )
    _open_gate(config, vocabulary, key, arguments)
    uvloop.run(run_server(_namespace(config, arguments)))


def _is_own_machine(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _vllm_settings(config: ServeConfig) -> dict[str, Any]:
    options = config.engine
    settings: dict[str, Any] = {
        "max_num_seqs": options.batch_size,
        "max_num_batched_tokens": options.tokens_per_step,
        "disable_log_stats": False,
        "generation_config": "vllm",  # a model's own defaults would truncate q* unasked
    }
    if options.kv_memory_gib is not None:
        settings["kv_cache_memory_bytes"] = int(options.kv_memory_gib * 2**30)
    for name in ("max_model_len", "gpu_memory_utilization"):
        if getattr(config, name) is not None:
            settings[name] = getattr(config, name)
    return settings


def _open_gate(
    config: ServeConfig, vocabulary: Any, key: str | None, arguments: Mapping[str, Any]
) -> None:
    from optimal_sampling.engines.vllm.gate import Gate, GateSettings

    limit = arguments.get("max_model_len")
    if limit is None:
        raise ConfigError(
            "the models' configs do not say how long a text may be: give max_model_len"
        )
    Gate.settings = GateSettings(
        vocabulary, config.mixture, limit, key, config.max_n, config.max_body_bytes
    )


def _namespace(config: ServeConfig, arguments: Mapping[str, Any]) -> Any:
    """Arguments of vLLM's server: its defaults, and ours over them. Refuses a name that its parser does not know."""
    from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    namespace = make_arg_parser(FlexibleArgumentParser()).parse_args([])
    ours = {
        **arguments,
        "host": config.host,
        "port": config.port,
        "middleware": ["optimal_sampling.engines.vllm.gate.Gate"],
        "served_model_name": [config.served_model_name or config.models.teacher],
        "api_server_count": 1,
        "disable_fastapi_docs": True,
    }
    for name, value in ours.items():
        if not hasattr(namespace, name):
            raise ConfigError(f"this version of vLLM has no server argument {name}")
        setattr(namespace, name, value)
    validate_parsed_serve_args(namespace)
    return namespace
